"""The store: nothing half-written, locks that die with their process, keys that tell inputs apart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.errors import ConfigError, TryAgain
from tasks.records import Attempt, StepRecord, Store, step_key


def test_a_key_depends_on_every_input_and_on_nothing_else() -> None:
    base = step_key("train_model", "1", {"data": "a", "code": "b"})
    assert base == step_key("train_model", "1", {"code": "b", "data": "a"})
    others = [
        step_key("pull_data", "1", {"data": "a", "code": "b"}),
        step_key("train_model", "2", {"data": "a", "code": "b"}),
        step_key("train_model", "1", {"data": "a", "code": "c"}),
        step_key("train_model", "1", {"data": "ab", "code": ""}),
    ]
    assert len({base, *others}) == 5


def test_a_step_record_comes_back_as_it_was(tmp_path: Path) -> None:
    store = Store(root=f"file://{tmp_path}")
    record = StepRecord(
        key="k", step="pull_data", inputs={"data": "d"}, result={"folder": "/x"}, run="digits-1", started=1.0, ended=2.0
    )
    assert store.step("k") is None
    store.finish_step(record)
    assert store.step("k") == record
    attempts = [Attempt(number=1, started=1.0, ended=2.0, cause="spot", reached_step=9, to_step=7)]
    store.write_attempts("k", attempts)
    assert store.attempts("k") == attempts


def test_another_kind_of_store_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="records need a file:// store"):
        Store(root="s3://bucket/reprise")


def _write_for_ever(root: str) -> None:
    store, n = Store(root=root), 0
    while True:
        n += 1
        store.write("steps/k", {"n": n, "padding": "x" * 20000, "again": n})


def test_a_kill_while_writing_leaves_a_whole_document(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    store = Store(root=str(tmp_path))
    for _ in range(8):
        writer = context.Process(target=_write_for_ever, args=(str(tmp_path),))
        writer.start()
        time.sleep(0.03)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        document = store.read("steps/k")
        assert document is None or document["n"] == document["again"]
    assert store.names("steps") == ["k"]


HOLD = (
    "import sys; from tasks.records import Store\n"
    "with Store(root=sys.argv[1]).lock('l'): print('held', flush=True); input()"
)


def test_a_lock_is_told_with_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    store = Store(root=str(tmp_path))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert store.held("l")
        with pytest.raises(TryAgain, match=f"'l' is held by process {holder.pid}"), store.lock("l"):
            pass
        holder.kill()
        holder.wait()
    with store.lock("l", wait_seconds=5):
        assert json.loads("1") == 1
    assert not store.held("l")
