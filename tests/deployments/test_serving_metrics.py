"""The autoscaling query on a real Prometheus fed by a real TorchServe: it rises with queueing and falls without."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deployments.errors import TryAgain
from deployments.serving import call
from deployments.serving_metrics import LATENCY, QUEUE, REQUESTS, queue_wait_microseconds, stalled
from tests.tasks.serving_kit import MODULE, make_toy, package, torchserve, wait_for

PORT, PROMETHEUS = 18140, 18149
SLOW = MODULE.replace("shares = ", "import time; time.sleep(0.02)\n    shares = ")


def test_the_queries() -> None:
    assert queue_wait_microseconds("digits") == (
        '(sum(rate(ts_queue_latency_microseconds{model_name="digits"}[2m])) or vector(0)) / '
        'clamp_min(sum(rate(ts_inference_requests_total{model_name="digits"}[2m])) or vector(0), 0.001)'
    )
    assert "Requests2XX[1m]" in stalled("digits", "1m")


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Callable[[str], float | None]]:
    """A Prometheus that scrapes every second; gives the function that asks it."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus on PATH; Debian: apt-get install prometheus")
    (folder / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s}\nscrape_configs:\n  - job_name: torchserve\n"
        f'    metrics_path: /metrics\n    static_configs: [{{targets: ["{target}"]}}]\n'
    )
    argv = [program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    argv += [f"--web.listen-address=127.0.0.1:{PROMETHEUS}"]
    url = f"http://127.0.0.1:{PROMETHEUS}"

    def ready() -> bool:
        try:
            return call("GET", f"{url}/-/ready", None, timeout=2).status == 200
        except TryAgain:
            return False

    def ask(query: str) -> float | None:
        answer = call("GET", f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", None)
        document = json.loads(answer.body)
        assert document["status"] == "success", document
        rows = document["data"]["result"]
        return float(rows[0]["value"][1]) if rows else None

    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    try:
        wait_for(ready, 30)
        yield ask
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def load(url: str, heldout: Path, clients: int) -> Iterator[None]:
    """Closed-loop clients for as long as the block runs."""
    argv = [sys.executable, "-m", "tasks.load_clients", url, str(heldout), str(clients), "60"]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_it_rises_with_queueing_and_falls_without(tmp_path: Path) -> None:
    """A model of 20 ms, one at a time: one client waits for nobody, sixteen wait for fifteen others."""
    toy = make_toy(tmp_path / "toy", module=SLOW)
    _, packaged = package(toy, tmp_path / "models", serve={"batch_size": 1})
    (tmp_path / "prometheus").mkdir()
    query = queue_wait_microseconds("toy", "5s")
    with (
        torchserve(tmp_path, PORT, models={"toy": Path(packaged.mar).name}) as serving,
        prometheus(tmp_path / "prometheus", f"127.0.0.1:{PORT + 2}") as ask,
    ):
        url = f"{serving.server.inference_url}/predictions/toy"
        wait_for(lambda: any(found.ready for found in serving.server.versions("toy")), 60)
        assert ask(query) == 0.0  # nothing yet: no traffic is no queue, and no missing series
        figures = {}
        for name, clients in (("one client", 1), ("sixteen clients", 16), ("one again", 1)):
            with load(url, toy.heldout, clients):
                time.sleep(12)
                figures[name] = ask(query) or 0.0
            time.sleep(1)
        time.sleep(6)
        figures["none"] = ask(query) or 0.0
        names = call("GET", f"http://127.0.0.1:{PORT + 2}/metrics", None).body.decode()
        assert ask(stalled("toy", "5s")) is None
    print("mean queue wait in microseconds:", {name: round(value) for name, value in figures.items()})
    assert figures["sixteen clients"] > 100_000 and figures["one client"] < 20_000
    assert figures["one again"] < figures["sixteen clients"] / 10 and figures["none"] < figures["sixteen clients"] / 10
    assert all(f"# TYPE {name} counter" in names for name in (REQUESTS, LATENCY, QUEUE))
