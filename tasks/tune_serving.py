"""Which batch size, delay and number of workers serve a model best on this machine, under a given concurrency.

Each setting is measured on a scratch TorchServe with the packaged archive itself, then the fastest one whose p95 and
failures are within bounds is chosen; of settings within 5 % of it, the one with the smallest batch, delay and workers.
Batching is no general truth: on a CPU it gave 0.4 to 12 times the throughput of batch 1, depending on the model, so
measure. Written: `serve.toml` with the values for [serve], `serving-curve.svg`, `serving.json` with every figure.
Not covered: other machines than this one (a GPU's curve has to be measured on a GPU), memory limits.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deployments.errors import GiveUp
from deployments.scratch_torchserve import scratch_torchserve
from deployments.serving import TorchServe
from deployments.torchserve_launch import worker_error
from tasks.archive import validate_archive
from tasks.golden import judge, read_golden

CLOSE = 0.95  # of the best throughput: not worth more latency or memory


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to serve."""

    batch_size: int
    max_batch_delay_ms: int
    workers: int = 1


@dataclass(frozen=True, kw_only=True)
class Point:
    """A setting with what clients saw. Latencies in milliseconds."""

    setting: Setting
    per_second: float
    failed: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """What to measure. `out` is a folder; seconds are per setting."""

    pipeline: str
    mar: str
    heldout: str
    out: str
    concurrency: int = 16
    seconds: float = 5.0
    max_p95_seconds: float = 1.0
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    delays_ms: list[int] = field(default_factory=lambda: [1, 5])
    workers: list[int] = field(default_factory=lambda: [1])
    client_processes: int = 1
    start_seconds: float = 120.0
    tolerance: float = 1e-3  # only a sanity check of the answers here; half precision differs more than float32


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The chosen setting and the whole curve."""

    best: Setting
    points: list[Point]
    times_batch_one: float  # throughput of the best / of batch size 1 with one worker
    serve_toml: str  # path
    picture: str  # path


def tune_serving(request: TuneRequest) -> Tuned:
    """Measure every setting and choose. Raises GiveUp if none is within bounds."""
    validate_archive(Path(request.mar), pipeline=request.pipeline)
    settings = candidates(request)
    with tempfile.TemporaryDirectory(prefix="tune-") as name:
        folder = Path(name)
        (folder / "models").mkdir()
        mar = Path(shutil.copy(request.mar, folder / "models"))
        with scratch_torchserve(folder / "state", folder / "models") as server:
            points = [measure(server, request, mar.name, setting, folder / "state" / "logs") for setting in settings]
    best = choose(points, request.max_p95_seconds)
    one = next(
        point for point in points if point.setting.batch_size == 1 and point.setting.workers == settings[0].workers
    )
    out = Path(request.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "serve.toml").write_text(serve_toml(best.setting, request))
    (out / "serving.json").write_text(json.dumps([asdict(point) for point in points], indent=1))
    draw(points, best, out / "serving-curve.svg", request)
    return Tuned(
        best=best.setting,
        points=points,
        times_batch_one=round(best.per_second / one.per_second, 2) if one.per_second else 0.0,
        serve_toml=str(out / "serve.toml"),
        picture=str(out / "serving-curve.svg"),
    )


def candidates(request: TuneRequest) -> list[Setting]:
    """Every combination once, batch 1 first; a delay means nothing to a batch of one."""
    found = []
    for workers in sorted(set(request.workers)):
        for size in sorted({1, *request.batch_sizes}):
            delays = [1] if size == 1 else sorted(set(request.delays_ms))
            found += [Setting(batch_size=size, max_batch_delay_ms=delay, workers=workers) for delay in delays]
    return found


def measure(server: TorchServe, request: TuneRequest, mar: str, setting: Setting, logs: Path) -> Point:
    """One setting under load, alone on the server; its answers are checked first."""
    model = request.pipeline
    server.register(model, mar, workers=setting.workers, batch=(setting.batch_size, setting.max_batch_delay_ms))
    try:
        give_up = time.monotonic() + request.start_seconds
        if server.versions(model)[0].workers != setting.workers:  # the archive's own number wins when it registers
            server.scale(model, setting.workers)
        while server.versions(model)[0].ready < setting.workers:
            if time.monotonic() > give_up:
                raise GiveUp(f"tuning {model}: its worker does not start: {worker_error(logs)}")
            time.sleep(0.1)
        for sample in read_golden(request.heldout, 4):
            answer = server.predict(model, sample.body, timeout=60)
            verdict = judge(answer.document(), sample.answer, request.tolerance)
            if answer.status != 200 or not verdict.agrees:
                raise GiveUp(f"tuning {model}: {sample.name} is answered wrongly: {answer.status} {verdict.why}")
        return point(setting, load(f"{server.inference_url}/predictions/{model}", request))
    finally:
        for version in server.versions(model):
            server.unregister(model, version.label)


def load(url: str, request: TuneRequest) -> list[dict[str, float]]:
    """The figures of each client process."""
    share = max(1, request.concurrency // request.client_processes)
    argv = [sys.executable, "-m", "tasks.load_clients", url, request.heldout, str(share), str(request.seconds)]
    root = Path(__file__).parent.parent
    runs = [subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=root) for _ in range(request.client_processes)]
    figures = []
    for one in runs:
        out, _ = one.communicate(timeout=request.seconds + 120)
        if one.returncode != 0:
            raise GiveUp(f"the clients failed with exit code {one.returncode}; their error stands above")
        figures.append(json.loads(out))
    return figures


def point(setting: Setting, figures: list[dict[str, float]]) -> Point:
    """All client processes together; percentiles are the worst of them."""
    return Point(
        setting=setting,
        per_second=round(sum(row["per_second"] for row in figures), 1),
        failed=int(sum(row["failed"] for row in figures)),
        **{name: max(row[name] for row in figures) for name in ("p50_ms", "p95_ms", "p99_ms")},
    )


def choose(points: list[Point], max_p95_seconds: float) -> Point:
    """The fastest within bounds, or a humbler one that is nearly as fast. Raises GiveUp if none is."""
    allowed = [one for one in points if one.failed == 0 and one.per_second > 0 and one.p95_ms <= max_p95_seconds * 1000]
    if not allowed:
        rows = "; ".join(f"batch {p.setting.batch_size}: p95 {p.p95_ms} ms, {p.failed} failed" for p in points[:4])
        raise GiveUp(
            f"no setting keeps p95 within {max_p95_seconds:g} s without failures ({rows}); lower the concurrency"
        )
    fastest = max(one.per_second for one in allowed)
    near = [one for one in allowed if one.per_second >= CLOSE * fastest]
    return min(near, key=lambda p: (p.setting.workers, p.setting.batch_size, p.setting.max_batch_delay_ms))


def serve_toml(setting: Setting, request: TuneRequest) -> str:
    """The values for pipeline.toml."""
    return (
        f"# measured with {request.concurrency} clients\n[serve]\nbatch_size = {setting.batch_size}\n"
        f'max_batch_delay = "{setting.max_batch_delay_ms}ms"\nworkers = {setting.workers}\n'
    )


def draw(points: list[Point], best: Point, path: Path, request: TuneRequest) -> None:
    """Throughput and p99 over batch size, one line per delay and number of workers."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Words stay words; same input, same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "reprise"}):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
        lines = sorted({(p.setting.workers, p.setting.max_batch_delay_ms) for p in points if p.setting.batch_size > 1})
        for workers, delay in lines or [(1, 1)]:
            row = [
                p for p in points
                if p.setting.workers == workers and (p.setting.max_batch_delay_ms == delay or p.setting.batch_size == 1)
            ]  # fmt: skip
            sizes = [p.setting.batch_size for p in row]
            name = f"{workers} worker{'s' * (workers > 1)}, {delay} ms"
            above.plot(sizes, [p.per_second for p in row], marker="o", label=name)
            below.plot(sizes, [p.p99_ms for p in row], marker="o")
        above.plot(
            [best.setting.batch_size], [best.per_second], marker="*", markersize=16, color="black", label="chosen"
        )
        above.set(
            ylabel="answers per second", title=f"{request.pipeline}: {request.concurrency} clients", ylim=(0, None)
        )
        below.set(xlabel="batch size", ylabel="p99, ms", xscale="log", ylim=(0, None))
        ticks = sorted({p.setting.batch_size for p in points})
        below.set_xticks(ticks, [str(size) for size in ticks])
        below.minorticks_off()
        above.legend()
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
