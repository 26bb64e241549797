"""GPU use by run: from DCGM's series over HTTP to the row, the alert's condition and the reason."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Any

import pytest

from deployments.errors import ConfigError, Unreachable
from flows.gpu_use import GpuUse, Prometheus, gpu_uses, judge, likely_reason, run_of, runs_of_pods, show_gpu
from tests.loopback_kit import JsonHandler, serving

NOW = 1_795_500_000.0
PODS = {"train-3f2a-1": "digits-7"}


def points(values: list[float], *, end: float = NOW) -> list[tuple[float, float]]:
    """Samples 30 s apart that end now."""
    return [(end - 30 * (len(values) - 1 - i), v) for i, v in enumerate(values)]


def series(pod: str, values: list[float], **labels: str) -> dict[str, Any]:
    metric = {"pod": pod, "UUID": "GPU-1", "Hostname": "gpu-0", "gpu": "0", **labels}
    return {"metric": metric, "values": [[t, str(v)] for t, v in points(values)]}


@pytest.fixture
def served() -> Iterator[tuple[str, dict[str, list[dict[str, Any]]]]]:
    """A Prometheus that answers with what the test puts in, by metric."""
    answers: dict[str, list[dict[str, Any]]] = {}

    class Handler(JsonHandler):
        def do_GET(self) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)["query"][0]
            code = 400 if query == "broken" or "bad" in answers else 200
            self.answer(code, {"status": "success", "data": {"result": answers.get(query, [])}})

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url, answers


def steps(each: float, **extra: float) -> list[dict[str, Any]]:
    """Progress lines of an hour: one every 10 s."""
    return [{"step": int(t / each), "max_steps": 10**6, "time": NOW - 3600 + t, **extra} for t in range(0, 3600, 10)]


def test_a_run_is_told_from_others_and_from_the_exporter(served: Any) -> None:
    url, answers = served
    answers["DCGM_FI_DEV_GPU_UTIL"] = [
        series("dcgm-exporter-x", [20.0] * 120, exported_pod="train-3f2a-1-master-0"),
        series("notebook-0", [99.0] * 120, UUID="GPU-2"),
    ]
    answers["DCGM_FI_DEV_FB_USED"] = [series("train-3f2a-1-master-0", [8000.0] * 120)]
    answers["DCGM_FI_DEV_FB_FREE"] = [series("train-3f2a-1-master-0", [72000.0] * 120)]
    [use] = gpu_uses(Prometheus(url=url), pods=PODS, timelines={"digits-7": steps(0.01)}, now=NOW)
    assert (use.run, use.gpus, use.use, use.memory) == ("digits-7", 1, 20.0, 10.0)
    assert use.low_minutes == 60.0 and use.alert
    assert use.hours == 1.0
    assert "small batch: 10 ms a step" in use.reason


def test_slices_are_read_from_the_engine_and_named_as_shared(served: Any) -> None:
    url, answers = served
    answers["DCGM_FI_PROF_GR_ENGINE_ACTIVE"] = [series("train-3f2a-1-worker-1", [0.9] * 10, GPU_I_ID="3")]
    [use] = gpu_uses(Prometheus(url=url), pods=PODS, now=NOW)
    assert use.use == 90.0 and use.shared and not use.alert


def test_nobody_on_a_gpu_is_no_row(served: Any, capsys: pytest.CaptureFixture[str]) -> None:
    uses = gpu_uses(Prometheus(url=served[0]), pods=PODS, now=NOW)
    show_gpu(uses, as_json=False, minutes=60)
    assert uses == [] and "no run had a GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "minutes", "alert"),
    [
        ([40.0] * 60, 30.0, True),
        ([40.0] * 59, 29.5, False),
        ([40.0] * 40 + [51.0] + [40.0] * 40, 20.0, False),
        ([50.0] * 100, 0.0, False),
    ],
)
def test_the_alert_needs_the_whole_time_together(values: list[float], minutes: float, alert: bool) -> None:
    use = judge("r", {"a/0/n/": points(values)})
    assert (use.low_minutes, use.alert) == (minutes, alert)
    assert bool(use.reason) == alert


def test_a_gap_between_two_attempts_ends_a_stretch() -> None:
    first = points([10.0] * 40, end=NOW - 3600)
    assert judge("r", {"a/0/n/": [*first, *points([10.0] * 40)]}).low_minutes == 20.0


def test_idle_is_the_share_of_samples_in_which_nothing_runs() -> None:
    assert judge("r", {"a/0/n/": points([0.0, 4.9, 5.0, 100.0])}).idle == 0.5


def saving(stall: float) -> list[dict[str, Any]]:
    return [{"event": "checkpoint", "stall": stall, "time": NOW - 600 * i} for i in range(6)]


@pytest.mark.parametrize(
    ("lines", "memory", "words"),
    [
        ([*steps(1.0), *saving(200.0)], 50.0, "checkpointing: 33%"),
        (steps(1.0, data_seconds=5.0), 50.0, "data loading: 50%"),
        (steps(0.02, data_seconds=0.1), 12.0, "small batch: 20 ms a step, and 12 %"),
        (steps(1.0), 50.0, "[train] profile = true"),
        (steps(1.0, data_seconds=0.1), 50.0, "neither saving nor data"),
        ([], None, "no steps in this time"),
    ],
)
def test_the_reason_comes_from_the_trainers_timeline(lines: list[Any], memory: float | None, words: str) -> None:
    assert words in likely_reason(lines, memory)


def test_who_a_series_belongs_to() -> None:
    keys = {"0123456789ab": "digits-9"}
    assert run_of({"pod": "train-3f2a-1-worker-12"}, PODS, keys) == "digits-7"
    assert run_of({"pod": "train-3f2a-2-master-0"}, PODS, keys) == ""
    assert run_of({"exported_pod": "train-0123456789ab-3-master-0", "pod": "exporter"}, PODS, keys) == "digits-9"
    assert run_of({"pod": "train-ba9876543210-3-master-0"}, PODS, keys) == ""
    assert run_of({}, PODS, keys) == ""


def test_attempts_of_runs_are_pods() -> None:
    key = "0123456789abcdef"
    old = {"run": "d-1", "started": 1.0, "steps": [{"name": "train_model", "key": key}], "attempts": [{"number": 1}]}
    new = {**old, "run": "d-2", "started": 2.0, "attempts": [{"number": 1}, {"number": 2}]}
    assert runs_of_pods([new, old]) == {"train-0123456789ab-1": "d-2", "train-0123456789ab-2": "d-2"}


def test_the_table_and_the_json_name_the_alert(capsys: pytest.CaptureFixture[str]) -> None:
    use = GpuUse(
        run="d-7", gpus=2, hours=2.0, use=31.0, idle=0.2, memory=12.0, low_minutes=45.0, shared=False, reason="why"
    )
    show_gpu([use], as_json=False, minutes=60)
    row = capsys.readouterr().out.splitlines()[1].split("\t")
    assert row == ["d-7", "2", "2", "31 %", "20%", "12 %", "45 min ALERT", "why"]
    show_gpu([use], as_json=True, minutes=60)
    document = json.loads(capsys.readouterr().out)
    assert document["threshold"] == 50.0 and document["runs"][0]["alert"] is True


def test_what_is_no_prometheus_is_told(served: Any) -> None:
    url, answers = served
    answers["bad"] = []
    with pytest.raises(ConfigError, match=r"400 .*PROMETHEUS_URL"):
        gpu_uses(Prometheus(url=url), pods=PODS, now=NOW)
    with pytest.raises(ConfigError, match="expected http://HOST:PORT"):
        gpu_uses(Prometheus(url="prometheus:9090"), pods=PODS, now=NOW)
    with pytest.raises(Unreachable, match="does not answer"):
        gpu_uses(Prometheus(url="http://127.0.0.1:9"), pods=PODS, now=NOW)
