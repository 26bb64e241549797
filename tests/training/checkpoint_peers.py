"""The ways to save a checkpoint that bench_checkpoint compares, behind one interface; missing peers are named.

Each is used as its own documentation shows for one process on a CPU: what stops the loop is `save` and
`before_update`, what makes the bytes safe is over when `drain` returns.
Not covered: loading, several ranks, GPUs (gpu_checkpoint.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from training.checkpoint import Checkpointer


class Way:
    """One way to save; `folder` is its own. Subclasses override what they do differently."""

    name = ""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        folder.mkdir(parents=True)

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(self, step: int) -> None:
        """Begin or make a checkpoint of this step."""

    def before_update(self) -> None:
        """Wait until the optimizer may change the state."""

    def drain(self) -> None:
        """Wait until the last save is complete."""

    def clean(self, step: int) -> None:
        path = self.path(step)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def close(self) -> None:
        """Stop threads and processes."""


class Reprise(Way):
    name = "Reprise, overlapped"
    blocking = False

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        self.checkpointer = Checkpointer(str(folder))
        self.live = {"model": model, "optimizer": optimizer}
        self.checkpointer.prepare(self.live)

    def save(self, step: int) -> None:
        own = {"torch": torch.get_rng_state()}
        self.checkpointer.save(step, self.live, meta={"step": step}, per_rank=own, blocking=self.blocking)

    def before_update(self) -> None:
        self.checkpointer.wait_staged()

    def drain(self) -> None:
        self.checkpointer.wait_durable()

    def clean(self, step: int) -> None:
        """Nothing: it prunes by itself, and that is part of what it costs."""

    def close(self) -> None:
        self.checkpointer.close()


class RepriseBlocking(Reprise):
    name = "Reprise, blocking copy"
    blocking = True


class TorchSave(Way):
    name = "torch.save"

    def save(self, step: int) -> None:
        torch.save(self.state(), self.path(step))


class TorchSaveFsync(Way):
    name = "torch.save + fsync"

    def save(self, step: int) -> None:
        with open(self.path(step), "wb") as file:
            torch.save(self.state(), file)
            file.flush()
            os.fsync(file.fileno())


class DcpSave(Way):
    name = "dcp.save"

    def save(self, step: int) -> None:
        dcp.save(self.state(), checkpoint_id=self.path(step))


class DcpAsync(Way):
    """A stager made per call, as dcp.async_save does when none is given."""

    name = "dcp.async_save, default"
    options: StagingOptions | None = None
    kind = AsyncCheckpointerType.THREAD

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        self.stager = None if self.options is None else DefaultStager(self.options)
        self.staged: Any = None
        self.done: Any = None

    def save(self, step: int) -> None:
        more = {} if self.stager is None else {"async_stager": self.stager}
        answer = dcp.async_save(self.state(), checkpoint_id=self.path(step), async_checkpointer_type=self.kind, **more)
        self.staged = getattr(answer, "staging_completion", None)
        self.done = getattr(answer, "upload_completion", answer)

    def before_update(self) -> None:
        if self.staged is not None:
            self.staged.result()

    def drain(self) -> None:
        if self.done is not None:
            self.done.result()

    def close(self) -> None:
        if self.stager is not None:
            self.stager.close()


class DcpPersistent(DcpAsync):
    name = "dcp.async_save, persistent stager"
    options = StagingOptions(False, False, False, False)


class DcpAsyncStaging(DcpAsync):
    name = "dcp.async_save, persistent async stager"
    options = StagingOptions(False, False, True, False)


class Lightning(Way):
    name = "Lightning TorchCheckpointIO"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

        self.io = TorchCheckpointIO()

    def save(self, step: int) -> None:
        state = self.state()
        self.io.save_checkpoint(
            {"state_dict": state["model"], "optimizer_states": [state["optimizer"]]}, self.path(step)
        )


class Accelerate(Way):
    name = "Accelerate save_state"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True)
        self.accelerator.prepare(model, optimizer)

    def save(self, step: int) -> None:
        self.accelerator.save_state(str(self.path(step)))


class TorchCheckpointing(Way):
    """Asynchronous, with the staging that its documentation gives for a CPU, in shared memory. Its direct I/O, on by
    default, writes unaligned blocks, which ext4 refuses (EINVAL), so it is off."""

    name = "torch_checkpointing"

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        staging = CheckpointStagerConfig(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
        )
        config = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(staging_config=staging),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
        )
        self.manager = CheckpointManager(config)
        self.manager.prewarm_staging(self.state())
        self.written: Any = None

    def save(self, step: int) -> None:
        self.written = self.manager.save(str(self.path(step)), self.state())

    def before_update(self) -> None:
        with self.manager.lock():  # what it offers: no copy is under way inside
            pass

    def drain(self) -> None:
        if self.written is not None:
            self.written.result()

    def close(self) -> None:
        self.manager.close()


class Memcpy:
    """One `memcpy` of `nbytes` between two warm buffers, by one thread: the yardstick."""

    def __init__(self, nbytes: int) -> None:
        self.source = torch.ones(nbytes, dtype=torch.uint8)
        self.target = torch.ones(nbytes, dtype=torch.uint8)
        self.nbytes = nbytes

    def __call__(self) -> None:
        ctypes.memmove(self.target.data_ptr(), self.source.data_ptr(), self.nbytes)

    def write_and_fsync(self, path: Path) -> None:
        """The other yardstick: the same bytes from one buffer to the disk, no digest, no format."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        try:
            view = memoryview(self.source.numpy())
            for at in range(0, self.nbytes, 16 << 20):
                os.write(fd, view[at : at + (16 << 20)])
            os.fsync(fd)
        finally:
            os.close(fd)


WAYS: tuple[type[Way], ...] = (
    Reprise,
    RepriseBlocking,
    TorchSave,
    TorchSaveFsync,
    DcpSave,
    DcpAsync,
    DcpPersistent,
    DcpAsyncStaging,
    Lightning,
    Accelerate,
    TorchCheckpointing,
)


def make_ways(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    skip: set[str],
    tell: Callable[[str], None],
) -> list[Way]:
    """All ways that are installed and not skipped; `tell` hears of the others."""
    ways = []
    for number, kind in enumerate(WAYS):
        if kind.name in skip:
            tell(f"{kind.name}: skipped")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ways.append(kind(model, optimizer, folder / str(number)))
        except ModuleNotFoundError as error:
            tell(f"{kind.name}: not installed ({error.name})")
    return ways


@contextlib.contextmanager
def closing_all(ways: list[Way]) -> Any:
    """Close every way at the end, whatever happens."""
    try:
        yield
    finally:
        for way in ways:
            with contextlib.suppress(Exception):  # a peer's trouble at the end changes no figure
                way.close()
