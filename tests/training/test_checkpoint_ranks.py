"""Checkpoints of several ranks: replicas written once, shards resharded, one rank's failure known to all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from training.checkpoint import verify

PROGRAM = Path(__file__).with_name("checkpoint_ranks.py")


def run(folder: Path, world: int, *commands: str) -> list[list[dict[str, Any]]]:
    """What each rank said of each command: [command][rank]."""
    meeting = folder / f"meeting-{world}-{len(list(folder.iterdir()))}"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(world), str(meeting), str(folder), *commands],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=PROGRAM.parents[2],
            env={"PYTHONPATH": str(PROGRAM.parents[2]), "GLOO_SOCKET_IFNAME": "lo", "PATH": ""},
        )
        for rank in range(world)
    ]
    said = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
            said.append([json.loads(line) for line in out.splitlines()])
    finally:
        for rank in ranks:
            rank.kill()
    return [list(each) for each in zip(*said, strict=True)]


def test_two_ranks_and_one(tmp_path: Path) -> None:
    ddp, fsdp, failed = run(tmp_path, 2, "ddp:save:ddp", "fsdp:save:fsdp", "ddp:fail:failed")
    for name in ("ddp", "fsdp"):
        audits = verify(str(tmp_path / name))
        assert [(a.step, a.world, a.error) for a in audits] == [(3, 2, ""), (2, 2, "")]
        sizes = [f.stat().st_size for f in sorted((tmp_path / name / audits[0].name).glob("rank-*"))]
        assert len(sizes) == 2 and max(sizes) < 2 * min(sizes), "replicas must be shared out between the ranks"

    told = [rank["error"] for rank in failed]
    assert all("disk full on this rank" in text for text in told) and "rank 1 could not write" in told[0]
    assert [a.step for a in verify(str(tmp_path / "failed"))] == [2, 1]
    assert not any((tmp_path / "failed" / ".writing").iterdir())

    again = run(tmp_path, 2, "ddp:load:ddp", "fsdp:load:fsdp", "fsdp:load:ddp")
    for loaded, saved in zip(again, (ddp, fsdp, ddp), strict=True):
        assert [rank["mine"] for rank in loaded] == [{"rank": 0}, {"rank": 1}]
        assert all(rank["per_rank"] == [{"rank": 0}, {"rank": 1}] and rank["step"] == 3 for rank in loaded)
        # Running statistics differ between ranks: rank 0's are stored.
        assert {rank["digest"] for rank in loaded} == {saved[0]["digest"]}

    file = next((tmp_path / "ddp").glob("step-0000000003-*/rank-00001.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    alone = run(tmp_path, 1, "plain:load:fsdp", "fsdp:load:fsdp", "plain:load:ddp")
    assert [command[0]["digest"] for command in alone[:2]] == [fsdp[0]["digest"]] * 2
    assert alone[0][0]["mine"] is None and alone[0][0]["per_rank"] == [{"rank": 0}, {"rank": 1}]
    assert (alone[2][0]["step"], alone[2][0]["skipped"]) == (2, 1)
