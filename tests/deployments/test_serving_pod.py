from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp
from deployments.rollout_diagnosis import VERDICT
from deployments.serving_pod import Answered, all_ready, fetch, main, prove, ready, with_settings


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "digits.mar").write_bytes(b"archive")
    rows = [
        {"name": f"s{n}", "body_b64": base64.b64encode(b"%d" % n).decode(), "label": 9, "answer": {"label": n}}
        for n in range(8)
    ]
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "models").mkdir()
    return tmp_path


SHA = hashlib.sha256(b"archive").hexdigest()


def test_fetch_copies_the_archive_and_some_golden_requests(store: Path) -> None:
    fetch(store / "digits.mar", SHA, store / "heldout.jsonl", 3, store / "models")
    assert (store / "models" / "digits.mar").read_bytes() == b"archive"
    rows = json.loads((store / "models" / "golden.json").read_text())
    assert [(r["name"], r["label"]) for r in rows] == [("s0", 0), ("s1", 1), ("s2", 2)]  # the model's answer counts
    fetch(store / "digits.mar", SHA, store / "heldout.jsonl", 3, store / "models")  # an init container may run twice


def test_fetch_believes_only_the_digest(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (store / "digits.mar").write_bytes(b"other")
    with pytest.raises(GiveUp, match=f"packaged was {SHA}"):
        fetch(store / "digits.mar", SHA, store / "heldout.jsonl", 3, store / "models")
    assert list((store / "models").iterdir()) == []
    arguments = ["--mar", str(store / "none.mar"), "--sha256", SHA, "--golden", "x", "--to", str(store)]
    assert main(["fetch", *arguments]) == 1  # it may come yet
    assert "none.mar is missing on the state volume" in capsys.readouterr().err


def test_an_archive_that_is_another_one_is_a_verdict(store: Path) -> None:
    arguments = [
        "--mar",
        str(store / "digits.mar"),
        "--sha256",
        "0" * 64,
        "--golden",
        "x",
        "--to",
        str(store / "models"),
    ]
    assert main(["fetch", *arguments]) == VERDICT


def test_fetch_without_a_golden_request_is_refused(store: Path) -> None:
    (store / "heldout.jsonl").write_text("")
    with pytest.raises(GiveUp, match="holds no golden request"):
        fetch(store / "digits.mar", SHA, store / "heldout.jsonl", 3, store / "models")


class Model:
    """Answers like the handler: the label is the body, unless told otherwise."""

    def __init__(self) -> None:
        self.status, self.version, self.wrong = 200, "3.x", False
        self.wrong_at: int | None = None
        model = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                document: dict[str, Any] = {"label": -1 if model.wrong or int(body) == model.wrong_at else int(body)}
                data = json.dumps(document).encode()
                self.send_response(model.status)
                if model.version:
                    self.send_header("x-model-label", model.version)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def model() -> Iterator[Model]:
    running = Model()
    yield running
    running.server.shutdown()
    running.server.server_close()


def test_ready_asks_the_model_itself(store: Path, model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    fetch(store / "digits.mar", SHA, store / "heldout.jsonl", 5, store / "models")
    golden = store / "models" / "golden.json"

    def ask(label: str = "3.x") -> Answered:
        return ready(model.url, "digits", label, golden)

    assert ask() == Answered(right=True, loaded=True, text="")
    assert "version '3.x' answers, expected '4.x'" in ask("4.x").text
    model.wrong = True
    assert "answered -1, expected" in ask().text and ask().loaded
    arguments = ["--url", model.url, "--model", "digits", "--label", "3.x", "--golden", str(golden)]
    arguments += ["--state", str(store)]
    assert main(["ready", *arguments]) == 1 and "not answered all" in capsys.readouterr().out
    (store / "proved").touch()
    assert main(["ready", *arguments]) == 1 and "answered -1" in capsys.readouterr().out
    model.wrong = False
    model.wrong_at = 4
    assert all_ready(model.url, "digits", "3.x", golden).text == "s4: answered -1, expected 4"
    model.wrong_at = None
    assert all_ready(model.url, "digits", "3.x", golden).right
    assert main(["ready", *arguments]) == 0
    model.status, model.version = 503, ""
    assert (ask().right, ask().loaded) == (False, False)
    assert not ready("http://127.0.0.1:9", "digits", "3.x", golden, timeout=1).loaded


def answers(*rows: Answered) -> Any:
    left = list(rows)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def none() -> set[int]:
    return set()


YET = Answered(right=False, loaded=False, text="not yet")
WRONG = Answered(right=False, loaded=True, text="answered 1, expected 2")
RIGHT = Answered(right=True, loaded=True, text="")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setattr("deployments.serving_pod.ASK_SECONDS", 0.01)
    monkeypatch.setattr("deployments.serving_pod.BROKEN_SECONDS", 0.1)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def test_a_pod_proves_itself_before_it_waits(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    told = threading.Event()
    assert prove(answers(YET, YET, WRONG, RIGHT), none, tmp_path, server, told) == ""
    assert "answers wrongly: answered 1, expected 2" in prove(answers(YET, WRONG), none, tmp_path, server, told)
    (tmp_path / "model_log.log").write_text("MODEL_LOG - RuntimeError: size mismatch\n")
    assert "does not load: RuntimeError: size mismatch" in prove(answers(YET), none, tmp_path, server, told)
    (tmp_path / "model_log.log").unlink()
    pids = iter(range(100))
    assert "4 worker processes died" in prove(answers(YET), lambda: {next(pids)}, tmp_path, server, told)
    told.set()
    assert prove(answers(YET), none, tmp_path, server, told) == ""  # told to leave meanwhile


def test_a_server_that_ends_by_itself_is_not_waited_for(server: subprocess.Popen[bytes], tmp_path: Path) -> None:
    server.kill()
    server.wait()
    assert prove(answers(YET), none, tmp_path, server, threading.Event()) == ""


def test_a_cluster_tunes_the_server_and_opens_nothing(tmp_path: Path) -> None:
    rendered = "management_address=http://127.0.0.1:8081\njob_queue_size=100\nvmargs=-Xmx512m -XX:+A=b\n"
    assert with_settings(rendered, tmp_path) == rendered
    given = "# c=d\nmanagement_address=http://0.0.0.0:8081\njob_queue_size=7\nallowed_urls=.*\nvmargs=\n"
    (tmp_path / "config.properties").write_text(given)
    assert with_settings(rendered, tmp_path).splitlines() == [
        "management_address=http://127.0.0.1:8081",
        "vmargs=-Xmx512m -XX:+A=b",
        "job_queue_size=7",
    ]
