"""The receiver killed with -9 at every line between receipt and hand-over, over real HTTP: one run, always.

    .venv/bin/pytest -m long tests/flows/test_push_receiver_kills.py    # each line; the default suite takes each 25th

The sender does what forges do: it sends once more when it got no answer, and never when it got one. Prefect is the one
that only remembers (tests.flows.push_kit), with the real server's rule for idempotency keys; tests/flows/triggers does
the same, at fewer points, with the real server.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.push_handover import open_target
from tests.flows.push_kit import SECRET, FakePrefect, Repositories, payload, signed

PROGRAM = Path(__file__).with_name("killed_receiver.py")


class Forks:
    """The helper program, one receiver at a time."""

    def __init__(self, pipeline: Path) -> None:
        self.pipeline = pipeline
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        root = str(PROGRAM.parents[2])
        env = {**os.environ, "REPRISE_PUSH_SECRET": SECRET.decode(), "PYTHONPATH": root}
        argv = [sys.executable, str(PROGRAM), str(pipeline)]
        self.process = subprocess.Popen(
            argv, cwd=root, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.child = 0

    def start(self, victim: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{self.port} {victim}\n")
        self.child = int(self.process.stdout.readline().split()[1])
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise AssertionError("the receiver does not listen")

    def ended(self) -> int:
        assert self.process.stdout
        code = int(self.process.stdout.readline().split()[1])
        self.child = 0
        return code

    def stop(self) -> None:
        os.kill(self.child, signal.SIGTERM)
        self.ended()

    def send(self, body: bytes) -> int:
        """The status code, 0 without an answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/push", body, signed(body))
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        if self.child:  # a test failed in the middle
            os.kill(self.child, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


class Setting:
    """Repositories, Prefect, forks; one push after another goes through it."""

    def __init__(self, root: Path, prefect: FakePrefect) -> None:
        template = Repositories.make_template(root / "template")
        self.repos = Repositories(root / "place", prefect.port, template=template)
        self.prefect = prefect
        self.file = self.repos.checkout / "pipeline.toml"
        self.queue = open_target(str(self.file), "laptop").queue
        self.forks = Forks(self.file)
        self.seed = 7

    def push(self) -> tuple[str, bytes]:
        """(commit, delivery) of a change that retrains."""
        self.seed += 1
        before, after = self.repos.edit(f"seed = {self.seed - 1}", f"seed = {self.seed}")
        return after, payload(before, after)

    def started(self, after: str) -> list[str]:
        return [rev for rev, _ in self.prefect.started() if rev == after]

    def wait(self, after: str) -> None:
        """Until the push is decided and its record says so."""
        until = time.monotonic() + 90
        while time.monotonic() < until:
            found = [e for e in self.queue.entries() if e.push.after == after]
            if found and found[0].state != "waiting":
                assert (len(found), found[0].state, found[0].action) == (1, "started", "retrain")
                return
            time.sleep(0.05)
        raise AssertionError(f"{after} is not decided: {self.queue.entries()[:1]}")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    with FakePrefect() as prefect:
        made = Setting(tmp_path_factory.mktemp("kills"), prefect)
        yield made
        made.forks.close()


def points(setting: Setting) -> list[str]:
    """Every line that a push which is not disturbed comes by, in order."""
    setting.forks.start("record")
    after, body = setting.push()
    assert setting.forks.send(body) == 202
    setting.wait(after)
    time.sleep(0.2)
    setting.forks.stop()
    reached: list[str] = json.loads(setting.file.with_name("reached.json").read_text())
    return reached


def kill_at(setting: Setting, point: str) -> tuple[int, int]:
    """(answer before the death, 0 for none; how the receiver ended)"""
    after, body = setting.push()
    setting.forks.start(point)
    answered = setting.forks.send(body)
    if answered:  # the death comes after the answer
        until = time.monotonic() + 90
        child = setting.forks.child
        while Path(f"/proc/{child}").exists() and time.monotonic() < until:
            if setting.started(after) and setting.queue.entries(1)[0].state != "waiting":
                time.sleep(0.2)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGTERM)  # the line was not reached this time
                break
            time.sleep(0.05)
    code = setting.forks.ended()
    assert len(setting.started(after)) <= 1
    setting.forks.start("nowhere")
    if answered == 0:  # what a forge, or the person who presses Redeliver, does without an answer
        assert setting.forks.send(body) in (200, 202)
    setting.wait(after)
    assert setting.started(after) == [after], f"killed at {point}"
    setting.forks.stop()
    return answered, code


def through(setting: Setting, every: int) -> tuple[int, int, int]:
    """(points tried, deaths before the answer, deaths after it)"""
    reached = points(setting)
    assert len(reached) > 100
    assert {p.split(":")[0] for p in reached} == {
        "push_receiver", "push_signature", "push_payload", "push_queue", "push_handover", "fetch", "prefect_api",
    }  # fmt: skip
    ends = [kill_at(setting, point) for point in reached[::every]]
    killed = [answered for answered, code in ends if code == -signal.SIGKILL]
    return len(ends), killed.count(0), len(killed) - killed.count(0)


def test_at_each_twenty_fifth_line(setting: Setting) -> None:
    tried, before, after = through(setting, 25)
    assert before and after and before + after >= 0.8 * tried


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_at_every_line(setting: Setting) -> None:
    tried, before, after = through(setting, 1)
    print(f"{tried} points: {before} deaths before the answer, {after} after it, one run each")
    assert before > 20 and after > 50 and before + after >= 0.9 * tried
