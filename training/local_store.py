"""Checkpoints in a folder. Written under `.writing/`, every file and directory fsynced, committed by a rename.

The rename of the directory is the last step, so that a kill at any moment leaves a whole checkpoint or none. A pruned
one is renamed to `.trash/` before its files go. Not covered: network file systems without atomic rename.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from training.checkpoint_store import PREFIX, QUARANTINE, READ, CheckpointWriteError, Writer, write_failure
from training.manifest import NAME as MANIFEST


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class LocalWriter:
    """Writes page-aligned blocks past the page cache where the file system allows it: training keeps its memory
    bandwidth, and the last fsync has little left to do."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path, self._nbytes, self._written = path, nbytes, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fd = os.open(path, flags | os.O_DIRECT, 0o644)
                self._direct = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()  # some kernels create the file before they refuse the flag
                self._fd = os.open(path, flags, 0o644)
                self._direct = False

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            free = None
            with contextlib.suppress(OSError):
                at = next(p for p in [self._path, *self._path.parents] if p.exists())
                free = shutil.disk_usage(at).free
            raise write_failure(str(self._path), self._nbytes, free, error) from error

    def _cached(self) -> None:
        """Go on through the page cache: for a tail that is no whole page, or a device that wants more than 4 KiB."""
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self._direct = False

    def write(self, data: memoryview) -> None:
        with self._explained():
            while data:
                try:
                    done = os.write(self._fd, data)
                except OSError as error:
                    if not self._direct or error.errno != errno.EINVAL:
                        raise
                    self._cached()
                    continue
                self._written += done
                data = data[done:]
                if self._direct and done % 4096:
                    self._cached()

    def finish(self) -> None:
        with self._explained():
            os.fsync(self._fd)
            os.close(self._fd)

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)
        with contextlib.suppress(OSError):
            self._path.unlink()


class LocalStore:
    """See the module."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.url = f"file://{self.root}"

    def names(self) -> list[str]:
        """Committed directories, newest first. The directory's name is checked here, its contents are not."""
        if not self.root.exists():
            return []
        return sorted((p.name for p in self.root.iterdir() if p.name.startswith(PREFIX)), reverse=True)

    def quarantined(self) -> list[str]:
        folder = self.root / QUARANTINE
        return sorted(p.name for p in folder.iterdir()) if folder.exists() else []

    def _aside(self, name: str) -> Path:
        return self.root / ".writing" / name

    def create(self, name: str, file: str, nbytes: int) -> Writer:
        missing = [folder for folder in (self.root, *self.root.parents) if not folder.exists()]
        writer = LocalWriter(self._aside(name) / file, nbytes)
        for folder in reversed(missing):  # a new store's own entry must survive a power cut too
            _sync_directory(folder.parent)
        return writer

    def settle(self, name: str) -> None:
        """Make this machine's directory entries of an uncommitted checkpoint durable."""
        _sync_directory(self._aside(name))

    def commit(self, name: str, manifest: bytes) -> None:
        aside = self._aside(name)
        writer = LocalWriter(aside / MANIFEST, len(manifest))
        try:
            writer.write(memoryview(manifest))
            writer.finish()
        except CheckpointWriteError:
            writer.drop()
            raise
        _sync_directory(aside)
        if (self.root / name).exists():
            raise CheckpointWriteError(f"checkpoint {self.root / name} exists already and is never overwritten")
        os.rename(aside, self.root / name)
        _sync_directory(self.root)

    def abandon(self, name: str) -> None:
        shutil.rmtree(self._aside(name), ignore_errors=True)

    def read(self, name: str, file: str) -> bytes:
        return (self.root / name / file).read_bytes()

    def size(self, name: str, file: str) -> int:
        return (self.root / name / file).stat().st_size

    def chunks(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]:
        """Fill `buffer` from the file's start, yielding each part as it arrives; less when the file is short."""
        with open(self.root / name / file, "rb", buffering=0) as stream:
            at = 0
            while at < len(buffer) and (got := stream.readinto(buffer[at : at + READ])):
                yield buffer[at : at + got]
                at += got

    def stream(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]:
        """The whole file through one small buffer."""
        with open(self.root / name / file, "rb", buffering=0) as stream:
            while got := stream.readinto(buffer):
                yield buffer[:got]

    def quarantine(self, name: str, reason: str) -> str:
        folder = self.root / QUARANTINE
        folder.mkdir(exist_ok=True)
        target = folder / name
        while target.exists():
            target = folder / f"{name}.{time.time_ns()}"
        os.rename(self.root / name, target)
        with contextlib.suppress(OSError):  # a full disk must not stop the fallback
            (target / "reason.txt").write_text(reason + "\n")
        _sync_directory(folder)
        _sync_directory(self.root)
        return str(target)

    def remove(self, name: str) -> None:
        trash = self.root / ".trash"
        trash.mkdir(exist_ok=True)
        os.rename(self.root / name, trash / name)
        _sync_directory(self.root)
        shutil.rmtree(trash / name, ignore_errors=True)

    def sweep(self, mine: str) -> None:
        """Remove what dead attempts left: everything uncommitted whose name lacks the token `mine`."""
        for folder in (self.root / ".writing", self.root / ".trash"):
            if folder.exists():
                for left in folder.iterdir():
                    if mine not in left.name:
                        shutil.rmtree(left, ignore_errors=True)
