"""A notice: flagged while the main thread is blocked, and a forced end. In processes of their own where they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.interruption import STATUS_DIR, Interruption, write_status
from training.spec import EXIT_INTERRUPTED

BLOCKED = """
import ctypes, sys, time
from training.interruption import Interruption
interruption = Interruption(leave_within={leave_within}, on_notice=lambda: print("noticed", flush=True)).install()
{before}
print("ready", flush=True)
ctypes.PyDLL(None)  # nothing of Python's runs in the main thread during the next call
ctypes.CDLL(None).sleep(60); ctypes.CDLL(None).sleep(60)
"""


def run_until_term(program: str, folder: Path) -> tuple[int, list[str], float]:
    environment = os.environ | {STATUS_DIR: str(folder), "RANK": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        lines = process.stdout.read().split()
        return process.wait(30), lines, time.monotonic() - began


def test_a_blocked_rank_is_told_and_ended_after_its_time(tmp_path: Path) -> None:
    code, lines, seconds = run_until_term(BLOCKED.format(leave_within=0.4, before=""), tmp_path)
    assert (code, lines) == (EXIT_INTERRUPTED, ["noticed"])
    assert 0.4 <= seconds < 5
    status = json.loads((tmp_path / "rank-1.json").read_text())
    assert status["code"] == EXIT_INTERRUPTED and "not saved within 0.4 s" in status["reason"]


def test_with_nothing_to_save_a_notice_ends_it_at_once(tmp_path: Path) -> None:
    code, _, seconds = run_until_term(BLOCKED.format(leave_within=30, before="interruption.leave_at_once()"), tmp_path)
    assert code == EXIT_INTERRUPTED and seconds < 5
    assert json.loads((tmp_path / "rank-1.json").read_text())["reason"] == "notice"


def test_install_and_close_give_the_signal_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    interruption = Interruption(leave_within=30).install()
    assert not interruption.noticed
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not interruption.noticed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert interruption.noticed_at == pytest.approx(time.time(), abs=5)
    interruption.close()
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_status_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATUS_DIR, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    write_status(143, "notice")
    write_status(1, "later")
    assert [p.name for p in tmp_path.iterdir()] == ["rank-0.json"]
    assert json.loads((tmp_path / "rank-0.json").read_text())["reason"] == "notice"
