"""One rank of test_checkpoint_ranks: `python checkpoint_ranks.py RANK WORLD RENDEZVOUS FOLDER COMMAND...`.

Each command is MODE:ACTION with MODE ddp, fsdp or plain and ACTION save, load, disagree or fail; prints one JSON line a
command.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from training.checkpoint import Checkpointer, CheckpointWriteError


def build(mode: str, world: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model: torch.nn.Module = torch.nn.Sequential(
        torch.nn.Linear(71, 65), torch.nn.BatchNorm1d(65), torch.nn.Linear(65, 65), torch.nn.Linear(65, 1)
    )
    if mode == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif mode == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def digest(state: dict[str, Any]) -> str:
    found = hashlib.sha256()
    values = [*state["model"].state_dict().values()]
    for entry in state["optimizer"].state_dict()["state"].values():
        values += entry.values()
    for value in values:
        found.update(whole(value.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()


def act(mode: str, action: str, rank: int, world: int, folder: Path) -> dict[str, Any]:
    state = build(mode, world)
    checkpointer = Checkpointer(str(folder), rank=rank, world=world)
    told: dict[str, Any] = {}
    if action == "load":
        info = checkpointer.load(state)
        assert info is not None
        told = {"step": info.step, "mine": info.mine, "per_rank": info.per_rank, "skipped": len(info.skipped)}
    else:
        generator = torch.Generator().manual_seed(rank)
        for step in (1, 2, 3):
            state["model"](torch.randn(8, 71, generator=generator)).sum().backward()
            checkpointer.wait_staged()
            state["optimizer"].step()
            state["optimizer"].zero_grad()
            if action == "fail" and step == 3 and checkpointer.wait_durable() and rank == 1:
                checkpointer.store.create = refuse  # type: ignore[method-assign]
            checkpointer.save(step, state, meta={"step": step}, per_rank={"rank": rank})
        try:
            checkpointer.wait_durable()
        except CheckpointWriteError as error:
            told["error"] = str(error)
    told["digest"] = digest(state)
    checkpointer.close()
    return told


def refuse(name: str, file: str, nbytes: int) -> Any:
    raise CheckpointWriteError(f"checkpoint not written: {file}: disk full on this rank")


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    try:
        for command in sys.argv[5:]:
            mode, action, folder = command.split(":")
            print(json.dumps(act(mode, action, rank, world, Path(sys.argv[4]) / folder)), flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
