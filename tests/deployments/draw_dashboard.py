"""Draws the Grafana dashboard from a real Prometheus, without Grafana: every panel's own query, answered and plotted.

    python tests/deployments/draw_dashboard.py OUT.png [PORT]

Six hours of made-up samples (two trainings, one of which starves its GPUs and is interrupted; a model under growing
load) are written into Prometheus' blocks, the recording rules are evaluated over them, then each panel is asked. It
fails if a panel has no answer. Needs prometheus and promtool (Debian: prometheus) and matplotlib.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).resolve().parents[2] / "deployments" / "k8s" / "components" / "monitoring"
STEP, HOURS = 60, 6
UNITS = {"percentunit": (100.0, "%"), "bytes": (1 / 2**30, "GiB"), "µs": (1e-3, "ms"), "s": (1 / 60, "min")}
Sample = tuple[str, str, float]  # metric, labels, value


def samples(minute: int, now: int, random_: random.Random) -> Iterator[Sample]:
    """What is scraped in one minute."""
    starving, cuts = minute < 240, sum(minute >= m for m in (70, 165, 260))
    for key, pipeline, run, node, use in (
        ("5a7a2ed7e3f8", "digits", "digits-7", f"spot-{cuts}", 0.31 if starving else 0.83),
        ("b1fe02c6d4aa", "letters", "letters-2", "gpu-1", 0.9),
    ):
        starts_over = pipeline == "digits"
        attempt = cuts + 1 if starts_over else 1
        away = starts_over and any(m <= minute < m + 4 for m in (70, 165, 260))
        labels = f'key="{key}",pipeline="{pipeline}"'
        on = f'{labels},namespace="reprise",component="train",Hostname="{node}",pod="train-{key}-{attempt}-master-0"'
        if not away:
            for gpu in range(2):
                busy = min(1.0, max(0.0, use + random_.gauss(0, 0.05)))
                yield "DCGM_FI_PROF_GR_ENGINE_ACTIVE", f'{on},gpu="{gpu}"', busy
                yield "DCGM_FI_DEV_FB_USED", f'{on},gpu="{gpu}"', 21000 + 18000 * (pipeline == "letters")
        lost = (3, 11, 4)[: cuts if pipeline == "digits" else 0]
        step = min(90000.0, 210.0 * minute - 400 * sum(lost))
        run_of = f'{labels},run="{run}"'
        yield "reprise_training_step", run_of, step
        yield "reprise_training_steps", run_of, 90000
        yield "reprise_training_attempts", run_of, 1 + len(lost)
        yield "reprise_training_steps_lost", run_of, 400 * sum(lost)
        yield "reprise_training_checkpoint_timestamp_seconds", run_of, now - 60 * (minute % 10)
        capacity = "spot" if pipeline == "digits" else "on-demand"
        yield "reprise_training_running", f'{run_of},capacity="{capacity}"', 1
        yield "reprise_steps_lost_total", f'pipeline="{pipeline}"', 400 * sum(lost)
        yield "reprise_attempts_ended_total", f'cause="spot",pipeline="{pipeline}"', len(lost)
    yield "reprise_gpu_price_per_hour", 'capacity="spot"', 1.2
    yield "reprise_gpu_price_per_hour", 'capacity="on-demand"', 3.4
    asked = 60.0 * sum(20 + 15 * math.sin(m / 60) + m / 12 for m in range(minute))
    model = 'model_name="digits",model_version="default",namespace="reprise",pod="serve-digits-0"'
    yield "ts_inference_requests_total", model, asked
    yield "ts_queue_latency_microseconds", model, asked * (3000 + 90 * minute)
    yield "ts_inference_latency_microseconds", model, asked * (21000 + 110 * minute)
    yield "Requests2XX", 'Level="Host",namespace="reprise",pod="serve-digits-0"', asked * 0.999
    yield "Requests5XX", 'Level="Host",namespace="reprise",pod="serve-digits-0"', asked * 0.001


def openmetrics(path: Path, start: int) -> None:
    """All samples, one family after the other, as promtool takes them."""
    random_, families = random.Random(0), dict[str, list[str]]()
    for minute in range(HOURS * 60 + 1):
        now = start + minute * STEP
        for metric, labels, value in samples(minute, now, random_):
            families.setdefault(metric, []).append(f"{metric}{{{labels}}} {value!r} {now}")
    with path.open("w") as out:
        for metric, lines in families.items():
            out.write(f"# TYPE {metric} unknown\n" + "\n".join(lines) + "\n")
        out.write("# EOF\n")


def ask(port: int, expression: str, start: int, end: int) -> list[dict[str, Any]]:
    """query_range."""
    query = urllib.parse.urlencode({"query": expression, "start": start, "end": end, "step": STEP})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query_range?{query}") as answer:
        return list(json.load(answer)["data"]["result"])


def filled(expression: str) -> str:
    """Grafana's variables, as it would put them in."""
    for name, value in {"$pipeline": ".*", "$run": ".*", "$__rate_interval": "5m", "$__range": f"{HOURS}h"}.items():
        expression = expression.replace(name, value)
    return expression


def draw(panels: list[dict[str, Any]], port: int, start: int, end: int, out: Path) -> None:
    """One picture, panels where Grafana would put them. Raises SystemExit for a panel without an answer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels)
    figure = plt.figure(figsize=(16, rows * 0.32))
    grid = figure.add_gridspec(rows, 24, hspace=6, wspace=6, left=0.04, right=0.99, top=0.97, bottom=0.03)
    for panel in panels:
        at = panel["gridPos"]
        gap = 0 if panel["type"] == "row" else 2  # for the titles
        axes = figure.add_subplot(grid[at["y"] : at["y"] + at["h"] - gap, at["x"] : at["x"] + at["w"]])
        axes.set_title(panel["title"], fontsize=9, loc="left", weight="bold" if panel["type"] == "row" else "normal")
        axes.tick_params(labelsize=7)
        if panel["type"] == "row":
            axes.axis("off")
            continue
        answers = [(t, ask(port, filled(t["expr"]), start, end)) for t in panel["targets"]]
        if not any(found for _, found in answers):
            raise SystemExit(f"{panel['title']}: no answer to {[filled(t['expr']) for t in panel['targets']]}")
        factor, unit = UNITS.get(panel["fieldConfig"]["defaults"]["unit"], (1.0, ""))
        if panel["type"] == "stat":
            axes.axis("off")
            axes.text(0.02, 0.3, f"{float(answers[0][1][0]['values'][-1][1]):,.4g}", fontsize=20, color="tab:blue")
        elif panel["type"] == "table":
            axes.axis("off")
            runs = sorted({s["metric"]["run"] for _, found in answers for s in found})
            cells = [
                [
                    run,
                    *(
                        f"{float(s['values'][-1][1]):g}"
                        for _, found in answers
                        for s in found
                        if s["metric"]["run"] == run
                    ),
                ]
                for run in runs
            ]
            table = axes.table(
                cells,
                colLabels=["run", "step", "of", "attempts", "lost", "checkpoint age, s", "running"],
                loc="upper left",
            )
            table.auto_set_font_size(False)
            table.set_fontsize(7)
        else:
            bars = panel["fieldConfig"]["defaults"]["custom"]["drawStyle"] == "bars"
            for target, found in answers:
                for series in found:
                    legend = target["legendFormat"]
                    for name, value in series["metric"].items():
                        legend = legend.replace("{{" + name + "}}", value)
                    hours = [(float(t) - start) / 3600 for t, _ in series["values"]]
                    values = [float(v) * factor for _, v in series["values"]]
                    if bars:
                        axes.bar(hours, values, width=0.06, label=legend)
                    else:
                        axes.plot(
                            hours, values, linewidth=1.2, label=legend, linestyle="--" if "alert" in legend else "-"
                        )
            axes.set_xlim(0, HOURS)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(unit, fontsize=7)
            axes.legend(fontsize=6, loc="upper left", frameon=False)
            axes.grid(alpha=0.2)
    figure.savefig(out, dpi=80)


def main() -> None:
    """Fill, evaluate, ask, draw."""
    out, port = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 19090
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    end = int(time.time()) // 7200 * 7200 - 7200
    start = end - HOURS * 3600
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        openmetrics(folder / "samples", start)
        (folder / "rules.yaml").write_text(
            yaml.safe_dump(yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"])
        )
        (folder / "prometheus.yml").write_text("global: {scrape_interval: 1m}\n")
        fill = ["promtool", "tsdb", "create-blocks-from"]
        subprocess.run([*fill, "openmetrics", "samples", "data"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        serve = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
        serve += [f"--web.listen-address=127.0.0.1:{port}", "--storage.tsdb.retention.time=3d", "--log.level=error"]
        for passed in range(3):  # rules may ask for rules: as many passes as they are deep
            server = subprocess.Popen(serve, cwd=folder)
            try:
                for _ in range(100):
                    try:
                        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready").close()
                        break
                    except OSError:
                        time.sleep(0.2)
                if passed == 2:
                    draw(panels, port, start, end, out)
                    return
                rules = [*fill, "rules", f"--url=http://127.0.0.1:{port}", "--eval-interval=1m"]
                rules += [f"--start={start}", f"--end={end}", "--output-dir=made", "rules.yaml"]
                subprocess.run(rules, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            finally:
                server.terminate()
                server.wait()
            for block in (folder / "made").iterdir():
                block.rename(folder / "data" / block.name)


if __name__ == "__main__":
    main()
