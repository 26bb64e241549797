"""A save that fails, for whatever reason, is told and leaves the checkpoints before it as they were."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.checkpoint_state import make
from training.checkpoint import Checkpointer, CheckpointWriteError, verify


def test_what_cannot_be_pruned_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(str(tmp_path))

    def refuse(name: str) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(checkpointer.store, "remove", refuse)
    for step in (1, 2, 3):
        checkpointer.save(step, make(), meta={}, per_rank={})
        checkpointer.wait_durable()
    assert "could not be removed" in caplog.text and len(verify(str(tmp_path))) == 3
    monkeypatch.undo()
    checkpointer.save(4, make(), meta={}, per_rank={})
    checkpointer.close()
    assert [audit.step for audit in verify(str(tmp_path))] == [4, 3]


def test_a_failure_is_told_although_later_saves_went_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))

    def broken(name: str, file: str, nbytes: int) -> Any:
        raise CheckpointWriteError("no room today")

    monkeypatch.setattr(checkpointer.store, "create", broken)
    checkpointer.save(1, state, meta={}, per_rank={})
    while checkpointer.busy:
        pass
    monkeypatch.undo()
    with pytest.raises(CheckpointWriteError, match="no room today"):
        checkpointer.save(2, state, meta={}, per_rank={})
    assert checkpointer.wait_durable() is None
    checkpointer.save(2, state, meta={}, per_rank={})
    info = checkpointer.wait_durable()
    assert info is not None and info.step == 2
    checkpointer.close()


FULL_DISK = """
import resource, sys, torch
from training.checkpoint import Checkpointer, CheckpointWriteError, verify
model = torch.nn.Linear(300, 300)
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"model": model}, meta={}, per_rank={})
checkpointer.wait_durable()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for step, wait in ((2, checkpointer.wait_durable), (3, None)):
    checkpointer.save(step, {"model": model}, meta={}, per_rank={})
    try:
        if wait is None:
            while checkpointer.busy:
                pass
            checkpointer.save(4, {"model": model}, meta={}, per_rank={})
        else:
            wait()
    except CheckpointWriteError as error:
        print(error)
    else:
        sys.exit("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpointer.save(5, {"model": model}, meta={}, per_rank={})
checkpointer.close()
assert [(a.step, a.error) for a in verify(sys.argv[1])] == [(5, ""), (1, "")]
"""


def test_a_full_disk_leaves_the_old_one_and_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    for told in (first, second):
        assert str(tmp_path) in told and "bytes needed" in told and "bytes free" in told and "earlier" in told
    assert list((tmp_path / ".writing").iterdir()) == []


def test_no_space_when_the_manifest_is_written_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={})
    checkpointer.wait_durable()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpointer.save(2, state, meta={"note": "x" * 2_000_000}, per_rank={})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(CheckpointWriteError, match=r"manifest.json"):
            checkpointer.wait_durable()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    checkpointer.close()
    assert [audit.step for audit in verify(str(tmp_path))] == [1]
    assert list((tmp_path / ".writing").iterdir()) == []


def test_an_unreachable_store_damages_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, make(), meta={}, per_rank={})
    checkpointer.wait_durable()

    def refused(name: str, file: str) -> bytes:
        raise PermissionError(13, "Permission denied", file)

    monkeypatch.setattr(checkpointer.store, "read", refused)
    with pytest.raises(PermissionError):
        checkpointer.load(make())
    monkeypatch.undo()
    assert checkpointer.load(make()) is not None
    checkpointer.close()
