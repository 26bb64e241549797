from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments import processes

MARK = processes.JOB_MARK
# A parent with a child in a session of its own, as torchrun has, and a grandchild whose parent is gone (init's now).
FAMILY = """
import os, subprocess, sys, time
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
subprocess.Popen(sleep, start_new_session=True)
subprocess.Popen(["sh", "-c", '"$@" &', "sh", *sleep]).wait()
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    yield str(tmp_path)
    processes.kill_tree(MARK, str(tmp_path))


def start(mark: str, code: str, folder: Path) -> processes.Identity:
    log = folder / "log"
    return processes.spawn([sys.executable, "-c", code], env={**os.environ, MARK: mark}, log=log)


def wait_for(what: object, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


def test_an_identity_dies_with_its_process_and_is_not_its_pid_alone(mark: str, tmp_path: Path) -> None:
    mine = processes.Identity.of(os.getpid())
    assert mine.alive()
    assert not processes.Identity(pid=os.getpid(), start="another:1").alive()
    one = start(mark, "import time; time.sleep(60)", tmp_path)
    assert one.alive()
    os.kill(one.pid, signal.SIGKILL)
    wait_for(lambda: not one.alive())
    assert processes.start_mark(one.pid) == ""


def test_a_zombie_is_not_alive(mark: str, tmp_path: Path) -> None:
    one = start(mark, "pass", tmp_path)
    wait_for(lambda: processes.start_mark(one.pid) == "")  # nobody has collected it: a zombie now
    os.waitpid(one.pid, 0)


def test_spawn_gives_a_session_of_its_own_and_appends_to_the_log(mark: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("before\n")
    one = start(mark, "import os, sys; print(os.getsid(0) == os.getpid()); sys.exit('to stderr')", tmp_path)
    wait_for(lambda: not one.alive())
    assert (tmp_path / "log").read_text() == "before\nTrue\nto stderr\n"


def test_spawn_of_a_missing_program_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        processes.spawn(["no-such-program-here"], env={}, log=tmp_path / "log")


def test_kill_tree_finds_other_sessions_and_orphans(mark: str, tmp_path: Path) -> None:
    one = start(mark, FAMILY, tmp_path)
    wait_for(lambda: "up" in (tmp_path / "log").read_text())
    wait_for(lambda: len(processes.tree(MARK, mark)) == 3)
    family = processes.tree(MARK, mark)
    assert one.pid in family
    assert processes.kill_tree(MARK, mark) == family
    assert processes.tree(MARK, mark) == set()
    assert not one.alive()


def test_kill_tree_spares_whom_it_shall_and_other_marks(mark: str, tmp_path: Path) -> None:
    one = start(mark, FAMILY, tmp_path)
    other = start(f"{mark}-other", "import time; time.sleep(60)", tmp_path)
    wait_for(lambda: len(processes.tree(MARK, mark)) == 3)
    processes.kill_tree(MARK, mark, spare={one.pid})
    assert processes.tree(MARK, mark) == {one.pid}
    assert other.alive()
    processes.kill_tree(MARK, f"{mark}-other")
    assert not other.alive()


def test_we_never_kill_ourselves(mark: str, tmp_path: Path) -> None:
    inside = start(
        mark,
        f"from deployments import processes; processes.kill_tree({MARK!r}, {mark!r}); print('still here')",
        tmp_path,
    )
    wait_for(lambda: not inside.alive())
    assert "still here" in (tmp_path / "log").read_text()
