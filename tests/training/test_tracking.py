"""Metrics against a small server that speaks the part of MLflow's REST API which is used; a real one in e2e."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from training.tracking import (
    ChangedParameters,
    MetricLog,
    TrackingRefused,
    TrackingUnavailable,
    end_run,
    find_or_create_run,
    last_steps,
)


class Server:
    """Experiments, runs, parameters and metrics in memory; `away` answers 503, `refusing` 403."""

    def __init__(self) -> None:
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.away = self.refusing = False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlparse(self.path)
                outer.answer(self, url.path, {k: v[0] for k, v in parse_qs(url.query).items()})

            def do_POST(self) -> None:
                outer.answer(self, self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()

    def answer(self, request: BaseHTTPRequestHandler, path: str, body: dict[str, Any]) -> None:
        code, document = (503, {}) if self.away else (403, {}) if self.refusing else self.handle(path, body)
        data = json.dumps(document).encode()
        request.send_response(code)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def handle(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        name = path.removeprefix("/api/2.0/mlflow/")
        if name == "experiments/get-by-name":
            if body["experiment_name"] not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST"}
            return 200, {"experiment": {"experiment_id": self.experiments[body["experiment_name"]]}}
        if name == "experiments/create":
            return 200, {"experiment_id": self.experiments.setdefault(body["name"], str(len(self.experiments)))}
        if name == "runs/search":
            found = re.fullmatch(r"tags\.`reprise\.step_key` = '(.*)'", body["filter"])
            assert found
            return 200, {"runs": [r for r in self.runs.values() if r["tags"]["reprise.step_key"] == found[1]]}
        if name == "runs/create":
            run_id = f"run{len(self.runs)}"
            tags = {t["key"]: t["value"] for t in body["tags"]}
            self.runs[run_id] = {"info": {"run_id": run_id, "status": "RUNNING"}, "data": {"params": []}, "tags": tags}
            return 200, {"run": self.runs[run_id]}
        if name == "runs/get":
            newest: dict[str, Any] = {}
            for metric in self.metrics:
                newest[metric["key"]] = max(metric, newest.get(metric["key"], metric), key=lambda m: int(m["step"]))
            return 200, {"run": {"data": {"metrics": list(newest.values())}}}
        if name == "runs/update":
            self.runs[body["run_id"]]["info"]["status"] = body["status"]
            return 200, {}
        assert name == "runs/log-batch"
        self.batches.append(len(body.get("metrics", [])))
        self.metrics += body.get("metrics", [])
        self.runs[body["run_id"]]["data"]["params"] += body.get("params", [])
        return 200, {}

    def steps(self, key: str = "train_loss") -> list[int]:
        return [m["step"] for m in self.metrics if m["key"] == key]


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.close()


def find(server: Server, **params: Any) -> str:
    return find_or_create_run(server.uri, "digits", "key1", "a name", {"reprise.sha": "abc"}, params)


def test_the_run_is_made_once_and_adopted_then(server: Server) -> None:
    assert find(server, width=3) == find(server, width=3) == "run0"
    assert server.runs["run0"]["tags"] == {"reprise.sha": "abc", "reprise.step_key": "key1"}
    assert server.runs["run0"]["data"]["params"] == [{"key": "width", "value": "3"}]


def test_changed_parameters_are_refused_with_old_and_new(server: Server) -> None:
    find(server, width=3, rate=0.1)
    with pytest.raises(ChangedParameters, match=r"width was '3' and is now '4'"):
        find(server, width=4, rate=0.1)


def test_parameters_that_a_kill_left_out_are_added(server: Server) -> None:
    find(server, width=3)
    find(server, width=3, rate=0.1)
    assert [p["key"] for p in server.runs["run0"]["data"]["params"]] == ["width", "rate"]


@pytest.mark.parametrize(("ended", "found"), [("FAILED", "RUNNING"), ("KILLED", "RUNNING"), ("FINISHED", "FINISHED")])
def test_what_failed_or_was_cancelled_runs_again_and_what_is_finished_stays(
    server: Server, ended: str, found: str
) -> None:
    run = find(server)
    end_run(server.uri, run, ended)
    assert find(server) == run and server.runs[run]["info"]["status"] == found


def test_every_step_arrives_once_in_batches_of_at_most_1000(server: Server) -> None:
    run = find(server)
    log = MetricLog(server.uri, run, pause=0.01)
    for step in range(1, 1301):
        log.log(step, {"train_loss": 1.0 / step, "learning_rate": 0.1})
    assert log.close(10) == 0
    assert server.steps() == list(range(1, 1301))
    assert max(server.batches) <= 1000


def test_a_replayed_tail_is_not_sent_twice_and_the_unsent_one_is_sent(server: Server) -> None:
    run = find(server)
    first = MetricLog(server.uri, run, pause=0.01)
    for step in range(1, 51):
        first.log(step, {"train_loss": 1.0})
    assert first.close(10) == 0
    server.away = True
    cut = MetricLog(server.uri, run, pause=0.01)
    for step in range(51, 61):
        cut.log(step, {"train_loss": 2.0})
    tail = json.loads(json.dumps(cut.unsent()))  # saved at step 60, as the manifest keeps it
    assert cut.close(0.1) == 10
    server.away = False
    # killed at once, resumed from 60; another attempt resumed from an older checkpoint replays 41..50 too
    second = MetricLog(server.uri, run, tail=tail, pause=0.01)
    for step in range(61, 71):
        second.log(step, {"train_loss": 3.0})
    assert second.close(10) == 0
    third = MetricLog(server.uri, run, pause=0.01)
    for step in range(41, 81):
        third.log(step, {"train_loss": 4.0})
    assert third.close(10) == 0
    assert server.steps() == list(range(1, 81))


def test_marks_are_kept_for_each_metric(server: Server) -> None:
    run = find(server)
    server.metrics = [{"key": "train_loss", "value": 1.0, "step": 9, "timestamp": 1}]
    log = MetricLog(server.uri, run, pause=0.01)
    log.log(9, {"train_loss": 1.0})
    log.log(9, {"heldout_accuracy": 0.9})
    assert log.close(10) == 0
    assert server.steps() == [9] and server.steps("heldout_accuracy") == [9]


def test_a_server_that_is_away_delays_and_is_told_once(server: Server) -> None:
    run = find(server)
    server.away = True
    told: list[str] = []
    log = MetricLog(server.uri, run, pause=0.01, problem=told.append)
    log.log(1, {"train_loss": 1.0})
    time.sleep(0.2)
    server.away = False
    assert log.close(10) == 0
    assert server.steps() == [1]
    assert len(told) == 1 and "503" in told[0]


def test_a_server_that_refuses_is_told_and_the_training_goes_on(server: Server) -> None:
    run = find(server)
    server.refusing = True
    told: list[str] = []
    log = MetricLog(server.uri, run, pause=0.01, problem=told.append)
    log.log(1, {"train_loss": 1.0})
    assert log.close(10) == 1
    assert len(told) == 1 and "not logged any more" in told[0]


def test_numbers_that_json_has_no_word_for(server: Server) -> None:
    run = find(server)
    log = MetricLog(server.uri, run, pause=0.01)
    for step, value in enumerate((math.nan, math.inf, -math.inf)):
        log.log(step, {"train_loss": value})
    assert log.close(10) == 0
    assert [m["value"] for m in server.metrics] == ["NaN", "Infinity", "-Infinity"]


def test_errors_have_the_word_of_what_to_do(server: Server) -> None:
    with pytest.raises(TrackingUnavailable, match=r"127\.0\.0\.1:1"):
        find_or_create_run("http://127.0.0.1:1", "e", "k", "n", {}, {})
    server.refusing = True
    with pytest.raises(TrackingRefused, match="403"):
        find(server)


@pytest.mark.e2e
def test_against_a_real_mlflow_server(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    program = shutil.which("mlflow", path=str(Path(sys.executable).parent))
    assert program
    command = [program, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/m.db", "--default-artifact-root", str(tmp_path / "a")]
    with (tmp_path / "log").open("wb") as log_file:
        process = subprocess.Popen(command, stdout=log_file, stderr=log_file, start_new_session=True)
        try:
            wait_until_up(uri)
            run = find_or_create_run(uri, "digits", "key1", "a name", {"a": "b"}, {"width": 3})
            assert find_or_create_run(uri, "digits", "key1", "a name", {"a": "b"}, {"width": 3}) == run
            with pytest.raises(ChangedParameters):
                find_or_create_run(uri, "digits", "key1", "a name", {}, {"width": 4})
            for first, last in ((1, 700), (500, 1200)):
                log = MetricLog(uri, run)
                for step in range(first, last + 1):
                    log.log(step, {"train_loss": math.nan if step == 7 else 1.0 / step, "learning_rate": 0.1})
                assert log.close(60) == 0
            assert last_steps(uri, run) == {"train_loss": 1200, "learning_rate": 1200}
            query = f"metrics/get-history?run_id={run}&metric_key=train_loss&max_results=5000"
            with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/{query}") as response:
                history = json.load(response)["metrics"]
            assert sorted(int(m["step"]) for m in history) == list(range(1, 1201))
            for ended, found in (("KILLED", "RUNNING"), ("FINISHED", "FINISHED")):
                end_run(uri, run, ended)
                assert find_or_create_run(uri, "digits", "key1", "a name", {}, {"width": 3}) == run
                with urllib.request.urlopen(f"{uri}/api/2.0/mlflow/runs/get?run_id={run}") as response:
                    assert json.load(response)["run"]["info"]["status"] == found
        finally:
            import os
            import signal

            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def wait_until_up(uri: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("MLflow did not start")
