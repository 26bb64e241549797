"""This process among the workers of the training: joining, leaving, and kernels that repeat to the bit.

NCCL where every worker of the node has a GPU of its own, gloo elsewhere. Not covered: starting workers (launch.py).
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.deterministic

from training.light_start import use_light_optimizers
from training.spec import TrainSpec

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)  # a rank that hangs; one that died is noticed at once
PATIENCE = datetime.timedelta(days=7)  # for rank 0's evaluation at the end; whatever ends it ends the others too


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process's place among the workers of the training."""

    rank: int
    world: int
    device: torch.device
    group: Any = None  # a gloo group of its own for checkpoints, whose collectives run beside the loop's

    def wait_for_all(self) -> None:
        """Until every worker is here, however long rank 0 evaluates: leaving NCCL's group waits with a limit."""
        if self.world > 1:
            dist.monitored_barrier(group=self.group, timeout=PATIENCE)


@contextlib.contextmanager
def join() -> Iterator[Workers]:
    """Find the other workers (torchrun's environment) and leave them in order at the end."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world == 1:
        yield Workers(rank=rank, world=world, device=device)
        return
    # two ranks on one GPU are possible with gloo only
    alone = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    dist.init_process_group("nccl" if alone and dist.is_nccl_available() else "gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        yield Workers(rank=rank, world=world, device=device, group=group)
    finally:  # without it an interpreter's end may abort, which reads like a crash
        dist.destroy_process_group()


def make_exact(spec: TrainSpec, device: torch.device) -> None:
    """Threads and kernels whose results do not depend on the moment."""
    torch.set_num_threads(spec.threads)
    if not spec.compile:
        use_light_optimizers()
    if spec.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs time, and helps only to find bugs
        torch.backends.cudnn.benchmark = False
