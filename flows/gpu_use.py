"""`reprise gpu`: how well the runs use their GPUs, by DCGM's metrics in a Prometheus, and why not where they do not.

    uses = gpu_uses(Prometheus(url="http://prometheus:9090"), pods={"train-3f2a-1": "digits-7"}, minutes=60)

A run whose GPUs were below 50 % for 30 minutes together is named, the threshold of the alert GPUUnderutilized. The
likely reason comes from the trainer's own step timeline (progress lines): saving, waiting for data, or small steps.
Not covered: collecting the metrics (deployments/k8s), a profile of single operations (training.profile).
"""

from __future__ import annotations

import json
import math
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deployments.errors import ConfigError, Unreachable
from flows.display import say, seconds, show_json, table

Json = Mapping[str, Any]
THRESHOLD = 50.0  # per cent; below it a GPU is under-used
ALERT_MINUTES = 30.0  # and for so long together the alert fires
IDLE = 5.0  # per cent; below it a GPU does nothing
STEP_SECONDS = 30  # between samples; DCGM's exporter is read that often
GAP_SAMPLES = 3  # so many samples missing end a stretch
# GPU_UTIL does not exist on MIG devices; GR_ENGINE_ACTIVE, a share of 1, does.
USE = ("DCGM_FI_PROF_GR_ENGINE_ACTIVE", "DCGM_FI_DEV_GPU_UTIL")
MEMORY_USED, MEMORY_FREE = "DCGM_FI_DEV_FB_USED", "DCGM_FI_DEV_FB_FREE"  # MiB
ELSEWHERE = "its steps are told on the state volume: run this where that is mounted, or set [train] profile = true"
_TRAINING = re.compile(r"train-(?P<key>[0-9a-f]{12})-\d+")
_POD = re.compile(r"(?P<workload>.+)-(?:master|worker)-\d+")


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """A Prometheus over HTTP."""

    url: str
    timeout: float = 10.0  # seconds

    def range(self, query: str, start: float, end: float, step: float) -> list[Json]:
        """Series of a query: [{"metric": labels, "values": [[unix seconds, text], ...]}].

        Raises Unreachable if it does not answer, ConfigError if it answers something else.
        """
        arguments = {"query": query, "start": f"{start:.0f}", "end": f"{end:.0f}", "step": f"{step:g}"}
        url = f"{self.url.rstrip('/')}/api/v1/query_range?{urllib.parse.urlencode(arguments)}"
        hint = "set --prometheus or PROMETHEUS_URL to the address that its Service has"
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"Prometheus {self.url!r}: expected http://HOST:PORT; {hint}")
        try:
            with urllib.request.urlopen(url, timeout=self.timeout) as answer:
                document = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(300).decode(errors="replace").split())
            raise ConfigError(f"Prometheus {self.url}: {error.code} {said}; {hint}") from error
        except OSError as error:
            why = getattr(error, "reason", error)
            raise Unreachable(f"Prometheus {self.url} does not answer: {why}; {hint}") from error
        except ValueError as error:
            raise ConfigError(f"Prometheus {self.url}: not its API ({error}); {hint}") from error
        return list((document.get("data") or {}).get("result") or [])


@dataclass(frozen=True, kw_only=True)
class GpuUse:
    """How one run used its GPUs in the window."""

    run: str
    gpus: int  # devices seen
    hours: float  # GPU hours seen
    use: float  # per cent, mean over all devices and samples
    idle: float  # share of samples below 5 %, 0..1
    memory: float | None  # per cent of GPU memory, the highest seen
    low_minutes: float  # the longest time together below the threshold
    shared: bool  # time-sliced or MIG: the numbers are the device's, perhaps of others too
    reason: str = ""  # likely, where it was below the threshold so long that the alert fires

    @property
    def alert(self) -> bool:
        """Whether the alert's condition held."""
        return self.low_minutes >= ALERT_MINUTES


def gpu_uses(
    prometheus: Prometheus,
    *,
    pods: Mapping[str, str] | None = None,
    keys: Mapping[str, str] | None = None,
    timelines: Mapping[str, Sequence[Json]] | None = None,
    verdicts: Mapping[str, str] | None = None,
    minutes: float = 60.0,
    now: float | None = None,
) -> list[GpuUse]:
    """Use by run over the last minutes, the lowest first.

    `pods`: name of a training workload -> run; `keys`: the first 12 of a training's key -> run. `timelines`: run -> the
    trainer's progress lines; None: they are not to be had here. `verdicts`: run -> what its profile said. GPUs of other
    pods are left out. Raises as `Prometheus.range`.
    """
    end = time.time() if now is None else now
    start = end - minutes * 60

    def read(metric: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
        found: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for series in prometheus.range(metric, start, end, STEP_SECONDS):
            labels = series.get("metric") or {}
            run = run_of(labels, pods or {}, keys or {})
            if run:
                points = [(float(t), float(v)) for t, v in series.get("values") or () if math.isfinite(float(v))]
                found.setdefault((run, device_of(labels)), []).extend(points)
        return found

    engine, util = (read(metric) for metric in USE)
    use = {**util, **{key: [(t, 100 * v) for t, v in points] for key, points in engine.items()}}
    used, free = read(MEMORY_USED), read(MEMORY_FREE)
    found = []
    for run in sorted({run for run, _ in use}):
        devices = {device: sorted(points) for (owner, device), points in use.items() if owner == run and points}
        if devices:
            memory = _memory(run, used, free)
            told = None if timelines is None else timelines.get(run, ())
            said = (verdicts or {}).get(run, "")
            found.append(judge(run, devices, memory=memory, timeline=told, verdict=said, window=(start, end)))
    return sorted(found, key=lambda u: u.use)


def run_of(labels: Json, pods: Mapping[str, str], keys: Mapping[str, str]) -> str:
    """The run whose pod a series is of; "" for anybody else's."""
    # Without honorLabels a scrape renames the exporter's own label, and `pod` is the exporter.
    pod = str(labels.get("exported_pod") or labels.get("pod") or "")
    match = _POD.fullmatch(pod)
    workload = match["workload"] if match else pod
    training = _TRAINING.fullmatch(workload)
    return pods.get(workload, "") or (keys.get(training["key"], "") if training else "")


def device_of(labels: Json) -> str:
    """One device: its UUID, and the slice of it."""
    parts = [str(labels.get(name) or "") for name in ("UUID", "gpu", "Hostname", "GPU_I_ID")]
    return "/".join(parts)


def judge(
    run: str,
    devices: Mapping[str, Sequence[tuple[float, float]]],
    *,
    memory: float | None = None,
    timeline: Sequence[Json] | None = (),
    verdict: str = "",
    window: tuple[float, float] = (0.0, math.inf),
) -> GpuUse:
    """Pure: samples (unix seconds, per cent) of a run's devices -> how it used them, and why not better."""
    values = [value for points in devices.values() for _, value in points]
    low = max((_longest_low(points) for points in devices.values()), default=0.0) / 60
    reason = ""
    if low >= ALERT_MINUTES:
        within = (line for line in timeline or () if window[0] <= float(line.get("time", 0)) <= window[1])
        reason = likely_reason(list(within), memory) if timeline is not None else ELSEWHERE
        reason = f"its profile: {verdict}" if verdict else reason
    return GpuUse(
        run=run,
        gpus=len(devices),
        hours=round(len(values) * STEP_SECONDS / 3600, 2),
        use=round(sum(values) / len(values), 1),
        idle=round(sum(value < IDLE for value in values) / len(values), 3),
        memory=memory,
        low_minutes=round(low, 1),
        shared=any(device.rpartition("/")[2] for device in devices),
        reason=reason,
    )


def _longest_low(points: Sequence[tuple[float, float]]) -> float:
    """Seconds of the longest stretch of samples below the threshold; a gap ends a stretch."""
    longest, began, last = 0.0, None, 0.0
    for moment, value in points:
        if value >= THRESHOLD or (began is not None and moment - last > GAP_SAMPLES * STEP_SECONDS):
            began = None
        if value < THRESHOLD:
            began = moment if began is None else began
            longest = max(longest, moment - began + STEP_SECONDS)
        last = moment
    return longest


def _memory(
    run: str,
    used: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
    free: Mapping[tuple[str, str], Sequence[tuple[float, float]]],
) -> float | None:
    shares = []
    for key, points in used.items():
        if key[0] != run or key not in free:
            continue
        left = dict(free[key])
        shares += [100 * v / (v + left[t]) for t, v in points if t in left and v + left[t] > 0]
    return round(max(shares), 1) if shares else None


def likely_reason(lines: Sequence[Json], memory: float | None) -> str:
    """What the trainer's own timeline says: the largest share of time that was no computation, and what to do."""
    steps = [line for line in lines if "step" in line and "event" not in line]
    if len(steps) < 2:
        return "no steps in this time: it was starting, waiting for its peers, or stuck; reprise logs shows more"
    span = float(steps[-1]["time"]) - float(steps[0]["time"])
    taken = max(1, int(steps[-1]["step"]) - int(steps[0]["step"]))
    if span <= 0:
        return ""
    saving = sum(float(line.get("stall") or 0) for line in lines if line.get("event") == "checkpoint") / span
    waits = [line for line in steps if "data_seconds" in line]
    data = sum(float(line["data_seconds"]) for line in waits) / span if waits else None
    if saving > 0.2 and saving >= (data or 0.0):
        return f"checkpointing: {saving:.0%} of the time; raise [train.checkpoint] min_interval, or use faster storage"
    if data is not None and data > 0.2:
        return f"data loading: {data:.0%} of the time; keep the data in memory, or decode it before training"
    each = span / taken
    if each < 0.05 and (memory is None or memory < 50):
        room = f", and {memory:.0f} % of the memory is the most that was used" if memory is not None else ""
        return f"small batch: {each * 1000:.0f} ms a step{room}; raise [train] batch_size, or set compile = true"
    if data is None:
        return f"data loading or a small batch ({each:.2g} s a step); [train] profile = true tells which"
    return (
        f"neither saving nor data ({each:.2g} s a step): a small batch or work on the CPU; [train] profile = true tells"
    )


def show_gpu(uses: Iterable[GpuUse], *, as_json: bool, minutes: float) -> None:
    """`reprise gpu`"""
    rows = list(uses)
    if as_json:
        limits = {"threshold": THRESHOLD, "alert_minutes": ALERT_MINUTES, "window_minutes": minutes}
        show_json({**limits, "runs": [{**asdict(u), "alert": u.alert} for u in rows]})
        return
    if not rows:
        say(f"no run had a GPU in the last {seconds(minutes * 60)}, as far as this Prometheus knows")
        return
    table(
        ["run", "GPUs", "GPU hours", "use", "idle", "memory", f"below {THRESHOLD:.0f} %", "likely reason"],
        [
            [
                u.run + (" (shared)" if u.shared else ""),
                str(u.gpus),
                f"{u.hours:g}",
                f"{u.use:.0f} %",
                f"{u.idle:.0%}",
                "" if u.memory is None else f"{u.memory:.0f} %",
                f"{u.low_minutes:.0f} min" + (" ALERT" if u.alert else ""),
                u.reason,
            ]
            for u in rows
        ],
    )
    say(f"alert: below {THRESHOLD:.0f} % for {ALERT_MINUTES:.0f} minutes together", style="dim")


def runs_of_keys(prometheus: Prometheus, *, minutes: float, now: float | None = None) -> dict[str, str]:
    """The first 12 of a training's key -> run, as the run metrics tell it (deployments.run_metrics).

    Raises as `Prometheus.range`.
    """
    end = time.time() if now is None else now
    newest: dict[str, tuple[float, str]] = {}
    for series in prometheus.range("reprise_training_running", end - minutes * 60, end, STEP_SECONDS):
        labels, values = series.get("metric") or {}, series.get("values") or ()
        if values and labels.get("key"):
            last = (float(values[-1][0]), str(labels.get("run") or ""))
            newest[str(labels["key"])] = max(newest.get(str(labels["key"]), last), last)
    return {key: run for key, (_, run) in newest.items() if run}


def runs_of_pods(documents: Iterable[Json]) -> dict[str, str]:
    """Training workloads of runs: `train-<key>-<attempt>` -> run id, from the runs' documents.

    A training that several runs share (the same step key) belongs to the newest of them.
    """
    found: dict[str, str] = {}
    for document in sorted(documents, key=lambda d: float(d.get("started") or 0)):
        key = next((s["key"] for s in document.get("steps") or () if s["name"] == "train_model"), "")
        for attempt in document.get("attempts") or ():
            found[f"train-{key[:12]}-{attempt['number']}"] = str(document["run"])
    return found
