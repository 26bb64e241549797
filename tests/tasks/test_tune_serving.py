"""The choice among measured settings, and one real measurement on a scratch TorchServe."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest

from deployments.errors import GiveUp
from tasks.tune_serving import Point, Setting, TuneRequest, candidates, choose, draw, point, serve_toml, tune_serving
from tests.tasks.serving_kit import make_toy, package
from tests.tasks.torchserve_stub import torchserve_stub

REQUEST = TuneRequest(pipeline="toy", mar="/m.mar", heldout="/h", out="/o")


def measured(
    size: int, per_second: float, *, delay: int = 5, workers: int = 1, p95: float = 10.0, failed: int = 0
) -> Point:
    setting = Setting(batch_size=size, max_batch_delay_ms=delay, workers=workers)
    return Point(setting=setting, per_second=per_second, failed=failed, p50_ms=p95 / 2, p95_ms=p95, p99_ms=2 * p95)


def test_every_setting_once_and_batch_one_first() -> None:
    found = candidates(TuneRequest(pipeline="t", mar="", heldout="", out="", batch_sizes=[8, 2, 8], delays_ms=[5, 1]))
    assert [(s.batch_size, s.max_batch_delay_ms) for s in found] == [(1, 1), (2, 1), (2, 5), (8, 1), (8, 5)]


@pytest.mark.parametrize(
    ("points", "chosen"),
    [
        ([measured(1, 100), measured(8, 500), measured(32, 400)], 8),
        ([measured(1, 100), measured(8, 490), measured(16, 495), measured(32, 500)], 8),  # nearly as fast is enough
        ([measured(1, 100), measured(8, 60), measured(32, 40)], 1),  # batching does not always help
        ([measured(1, 100), measured(32, 900, p95=2000.0)], 1),  # too slow for a client
        ([measured(1, 100), measured(32, 900, failed=1)], 1),
    ],
)
def test_the_fastest_within_bounds_or_a_humbler_one(points: list[Point], chosen: int) -> None:
    assert choose(points, 1.0).setting.batch_size == chosen


def test_nothing_within_bounds() -> None:
    with pytest.raises(GiveUp, match=r"no setting keeps p95 within 0\.001 s .*batch 1: p95 10\.0 ms, 0 failed"):
        choose([measured(1, 100)], 0.001)


def test_client_processes_are_added_up_and_the_worst_tail_counts() -> None:
    rows = [
        {"per_second": 10.0, "failed": 0, "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 9.0},
        {"per_second": 12.5, "failed": 1, "p50_ms": 2.0, "p95_ms": 1.0, "p99_ms": 3.0},
    ]
    both = point(Setting(batch_size=1, max_batch_delay_ms=1), rows)
    assert (both.per_second, both.failed, both.p50_ms, both.p95_ms, both.p99_ms) == (22.5, 1, 2.0, 2.0, 9.0)


def test_the_values_are_toml_that_the_settings_take() -> None:
    text = serve_toml(Setting(batch_size=16, max_batch_delay_ms=5, workers=2), REQUEST)
    assert tomllib.loads(text) == {"serve": {"batch_size": 16, "max_batch_delay": "5ms", "workers": 2}}


def test_the_picture(tmp_path: Path) -> None:
    points = [measured(1, 100), measured(8, 500), measured(8, 400, delay=1), measured(32, 450, workers=2)]
    for name in ("a.svg", "b.svg"):
        draw(points, points[1], tmp_path / name, REQUEST)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert all(text in drawn for text in ("answers per second", "p99, ms", "2 workers, 5 ms", "chosen"))


def clients(url: str, heldout: Path, number: int, seconds: float) -> dict[str, float]:
    argv = [sys.executable, "-m", "tasks.load_clients", url, str(heldout), str(number), str(seconds)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_clients_count_answers_and_failures(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", samples=5)
    _, packaged = package(toy, tmp_path / "models")
    with torchserve_stub(tmp_path / "models") as stub:
        stub.client.register("toy", Path(packaged.mar).name, workers=1)
        url = f"{stub.client.inference_url}/predictions/toy"
        fine = clients(url, toy.heldout, 3, 0.5)
        assert fine["failed"] == 0 and fine["per_second"] > 20 and 0 < fine["p50_ms"] <= fine["p99_ms"]
        stub.faults[packaged.label] = "raises"
        bad = clients(url, toy.heldout, 2, 0.3)
        assert bad["requests"] == bad["failed"] > 0 and bad["per_second"] == 0


def test_clients_survive_a_server_that_hangs_up(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", samples=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def hang_up() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=hang_up)
        thread.start()
        found = clients(f"http://127.0.0.1:{port}/predictions/toy", toy.heldout, 2, 0.3)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert found["requests"] == found["failed"] > 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_real_measurement(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy")
    _, packaged = package(toy, tmp_path / "models")
    request = TuneRequest(
        pipeline="toy", mar=packaged.mar, heldout=str(toy.heldout), out=str(tmp_path / "out"), concurrency=8,
        seconds=2.0, batch_sizes=[1, 8], delays_ms=[1], workers=[1, 2],
    )  # fmt: skip
    tuned = tune_serving(request)
    assert len(tuned.points) == 4 and all(p.failed == 0 and p.per_second > 10 for p in tuned.points)
    assert tuned.times_batch_one >= 1.0 and Path(tuned.picture).is_file()
    assert tomllib.loads(Path(tuned.serve_toml).read_text())["serve"]["batch_size"] == tuned.best.batch_size
