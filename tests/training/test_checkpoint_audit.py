"""What whoever asks for a checkpoint is told, without torch: completion, soundness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.training.checkpoint_state import make
from training.checkpoint import Checkpointer, newest_complete


def test_completion_is_asked_of_the_manifest_only(tmp_path: Path) -> None:
    assert newest_complete(str(tmp_path / "nothing")) is None
    state = make()
    checkpointer = Checkpointer(str(tmp_path))
    checkpointer.save(1, state, meta={}, per_rank={}, complete=True)
    checkpointer.wait_durable()
    checkpointer.close()
    found = next(tmp_path.glob("step-*/rank-00000.safetensors"))
    found.write_bytes(found.read_bytes()[:-1])
    assert newest_complete(str(tmp_path)) is None


def test_the_program_lists_what_is_there(tmp_path: Path) -> None:
    checkpointer = Checkpointer(str(tmp_path))
    for step in (7, 8):
        checkpointer.save(step, make(), meta={}, per_rank={}, complete=step == 8)
        checkpointer.wait_durable()
    checkpointer.close()
    command = [sys.executable, "-m", "training.checkpoint_audit", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3 and "yes" in lines[1] and "sound" in lines[1], done.stderr
    file = next(tmp_path.glob("step-0000000008-*/rank-00000.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 5 and "sha256" in found[0]["error"] and not found[1]["error"]
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-c", "import training.checkpoint_audit, sys; print(*sys.modules)"],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout.split()
    ), "whoever asks whether training is complete must not need torch"
