"""`reprise gpu` against a real Prometheus that holds an hour of DCGM's metrics: `pytest -m e2e`.

The metrics are written as DCGM's exporter tells them (names, labels, units), into blocks by promtool; skipped where
Debian's prometheus is not installed. Not covered: the exporter, scraping.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.__main__ import main
from flows.example import create_project
from flows.gpu_use import Prometheus, gpu_uses, runs_of_keys
from tasks.records import Store

pytestmark = pytest.mark.e2e
PORT, MINUTES, STEP = 18451, 60, 30
KEYS = {"digits-7": "a" * 40, "digits-8": "b" * 40, "digits-9": "c" * 40}


def device(run: str, number: int, **more: str) -> str:
    pod = f"train-{KEYS[run][:12]}-1-master-0"
    labels = {"Hostname": "gpu-0", "UUID": f"GPU-{number}", "gpu": str(number), "pod": "dcgm-exporter-x", **more}
    labels |= {"exported_pod": pod, "exported_namespace": "reprise", "exported_container": "pytorch"}
    return ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))


def recorded(now: float) -> str:
    """OpenMetrics text: one run that waits for data, one that is well, one on a slice that is used less than half."""
    slow, well = device("digits-7", 0), device("digits-8", 1)
    part = device("digits-9", 2, GPU_I_ID="1", GPU_I_PROFILE="1g.10gb")
    other = device("digits-7", 3).replace(KEYS["digits-7"][:12], "d" * 12)  # somebody else's
    families: dict[str, list[tuple[str, float]]] = {
        "DCGM_FI_DEV_GPU_UTIL": [(slow, 18.0), (well, 93.0), (other, 1.0)],
        "DCGM_FI_PROF_GR_ENGINE_ACTIVE": [(part, 0.42), (well, 0.91)],
        "DCGM_FI_DEV_FB_USED": [(slow, 8000.0), (well, 60000.0)],
        "DCGM_FI_DEV_FB_FREE": [(slow, 72000.0), (well, 20000.0)],
        "reprise_training_running": [
            (f'key="{key[:12]}",pipeline="digits",run="{run}",capacity="spot"', 1.0) for run, key in KEYS.items()
        ],
    }
    lines = []
    for name, series in families.items():
        lines.append(f"# TYPE {name} gauge")
        for labels, value in series:
            for index in range(MINUTES * 60 // STEP, -1, -1):
                lines.append(f"{name}{{{labels}}} {value} {now - index * STEP:.3f}")
    return "\n".join([*lines, "# EOF"]) + "\n"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    program, tool = shutil.which("prometheus"), shutil.which("promtool")
    if program is None or tool is None:
        pytest.skip("no prometheus and promtool on PATH; Debian: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    (folder / "metrics").write_text(recorded(time.time()))
    blocks = [tool, "tsdb", "create-blocks-from", "openmetrics", str(folder / "metrics"), str(folder / "data")]
    subprocess.run(blocks, check=True, capture_output=True)
    (folder / "prometheus.yml").write_text("scrape_configs: []\n")
    argv = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    argv += [f"--web.listen-address=127.0.0.1:{PORT}"]
    url = f"http://127.0.0.1:{PORT}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"{url}/-/ready", timeout=2):
                        break
                except (urllib.error.URLError, OSError):
                    assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()[-2000:]
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(20)


def test_an_hour_of_metrics_becomes_rows(prometheus: str) -> None:
    server = Prometheus(url=prometheus)
    keys = runs_of_keys(server, minutes=MINUTES)
    assert keys == {key[:12]: run for run, key in KEYS.items()}
    uses = gpu_uses(server, keys=keys, minutes=MINUTES)
    assert [(u.run, u.use, u.alert, u.shared) for u in uses] == [
        ("digits-7", 18.0, True, False),
        ("digits-9", 42.0, True, True),  # a slice has no GPU_UTIL
        ("digits-8", 91.0, False, False),
    ]
    assert [u.memory for u in uses] == [10.0, None, 75.0]
    assert all(0.9 < u.hours <= 1.02 and u.gpus == 1 for u in uses)
    assert uses[0].low_minutes > 55


def test_the_command_names_the_run_and_the_reason(
    prometheus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    create_project("digits", tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    root, now, key = tmp_path / "state" / "store", time.time(), KEYS["digits-7"]
    steps = [{"name": "train_model", "key": key}]
    document = {"run": "digits-7", "started": now - 4000, "ended": None, "steps": steps, "attempts": [{"number": 1}]}
    Store(root=str(root)).write("runs/digits-7", document)
    (root / "trainings" / key).mkdir(parents=True)
    lines: list[dict[str, Any]] = [{"step": n, "time": now - 3500 + n, "data_seconds": 6.5} for n in range(1, 3400, 10)]
    (root / "trainings" / key / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    place = tmp_path / "place.toml"
    place.write_text(f'[place]\nkind = "laptop"\nstate = "{tmp_path}/state"\n')
    with pytest.raises(SystemExit) as end:
        main(["gpu", "--place", str(place), "--prometheus", prometheus])
    assert end.value.code == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("digits-7")).split("\t")
    assert row[3] == "18 %" and "ALERT" in row[6] and row[7].startswith("data loading: 65%")
    assert "digits-8" not in out  # not a run of this store
    assert "alert: below 50 % for 30 minutes together" in out
