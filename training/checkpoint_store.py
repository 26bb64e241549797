"""Where checkpoints lie: a folder of this machine, or an object store behind fsspec. One directory per checkpoint.

On files a checkpoint is written under `.writing/`, every file and directory fsynced, and committed by the rename of its
directory. An object store has no rename: there the PUT of the manifest, which comes last, is the commit. A directory
without its manifest does not exist for readers. Nothing is ever overwritten, and what is pruned first loses what makes
it look committed. Not covered: what is in the files, and who decides to prune (training/checkpoint.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from training.manifest import NAME as MANIFEST

PREFIX = "step-"
QUARANTINE = "quarantine"
READ = 16 << 20


class CheckpointWriteError(RuntimeError):
    """A checkpoint could not be written; the ones before it stand. Names the path, bytes needed and bytes free."""


class Writer(Protocol):
    """A file being written. `finish` returns when its bytes are durable; `drop` gives up and leaves nothing."""

    def write(self, data: memoryview) -> None: ...
    def finish(self) -> None: ...
    def drop(self) -> None: ...


class Store(Protocol):
    """One training's checkpoints. `name` is a checkpoint's directory, `file` a file in it."""

    url: str

    def names(self) -> list[str]: ...
    def quarantined(self) -> list[str]: ...
    def create(self, name: str, file: str, nbytes: int) -> Writer: ...
    def settle(self, name: str) -> None: ...
    def commit(self, name: str, manifest: bytes) -> None: ...
    def abandon(self, name: str) -> None: ...
    def read(self, name: str, file: str) -> bytes: ...
    def size(self, name: str, file: str) -> int: ...
    def chunks(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]: ...
    def stream(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]: ...
    def quarantine(self, name: str, reason: str) -> str: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, mine: str) -> None: ...


def open_store(url: str) -> Store:
    """The store behind a plain path, a file:// URL, or any other URL that fsspec knows (s3://bucket/prefix)."""
    if url.startswith("file://"):
        return LocalStore(Path(url.removeprefix("file://")))
    if "://" in url:
        return ObjectStore(url)
    return LocalStore(Path(url))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lacking(path: str, nbytes: int, free: int | None, error: BaseException) -> CheckpointWriteError:
    room = "" if free is None else f", {free} bytes free there"
    return CheckpointWriteError(
        f"checkpoint not written: {path} ({nbytes} bytes needed{room}): {error}. "
        "The earlier checkpoints stand. Free space, keep fewer checkpoints, or give another store URL"
    )


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
            raise _lacking(str(self._path), self._nbytes, free, error) from error

    def _cached(self) -> None:
        """Go on through the page cache: for a tail that is no whole page, or a device that wants more than 4 KiB."""
        import fcntl

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
        return LocalWriter(self._aside(name) / file, nbytes)

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


class ObjectWriter:
    """Uploads in parts; nothing is visible under the name before `finish`."""

    def __init__(self, fs: Any, path: str, nbytes: int) -> None:
        self._fs, self._path, self._nbytes = fs, path, nbytes
        self._stream = fs.open(path, "wb", block_size=32 << 20)

    def write(self, data: memoryview) -> None:
        try:
            self._stream.write(data)
        except Exception as error:  # each client library has its own errors
            raise _lacking(self._path, self._nbytes, None, error) from error

    def finish(self) -> None:
        try:
            self._stream.close()
        except Exception as error:
            raise _lacking(self._path, self._nbytes, None, error) from error

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # the first error is the one worth telling
            self._stream.discard()
        self._stream.closed = True


class ObjectStore:
    """See the module. Credentials and endpoint come from the environment, as the client library reads them."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        # Listings must be true after another process wrote; files are written once, so nothing else is cached.
        self._fs, self.root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)

    def _names(self) -> list[str]:
        try:
            found = self._fs.ls(self.root, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rsplit("/", 1)[-1] for path in found]

    def names(self) -> list[str]:
        names = [n for n in self._names() if n.startswith(PREFIX) and self._fs.exists(f"{self.root}/{n}/{MANIFEST}")]
        return sorted(names, reverse=True)

    def quarantined(self) -> list[str]:
        return sorted(n.removeprefix(f"{QUARANTINE}-") for n in self._names() if n.startswith(QUARANTINE))

    def create(self, name: str, file: str, nbytes: int) -> Writer:
        return ObjectWriter(self._fs, f"{self.root}/{name}/{file}", nbytes)

    def settle(self, name: str) -> None:
        """Nothing to do: an upload that was acknowledged is durable."""

    def commit(self, name: str, manifest: bytes) -> None:
        path = f"{self.root}/{name}/{MANIFEST}"
        try:
            self._fs.pipe_file(path, manifest)
        except Exception as error:
            raise _lacking(path, len(manifest), None, error) from error

    def abandon(self, name: str) -> None:
        with contextlib.suppress(Exception):  # swept at the next start
            self._fs.rm(f"{self.root}/{name}", recursive=True)

    def read(self, name: str, file: str) -> bytes:
        return bytes(self._fs.cat_file(f"{self.root}/{name}/{file}"))

    def size(self, name: str, file: str) -> int:
        return int(self._fs.info(f"{self.root}/{name}/{file}")["size"])

    def chunks(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]:
        path, at = f"{self.root}/{name}/{file}", 0
        while at < len(buffer):
            part = self._fs.cat_file(path, start=at, end=min(at + READ, len(buffer)))
            if not part:
                return
            buffer[at : at + len(part)] = part
            yield buffer[at : at + len(part)]
            at += len(part)

    def stream(self, name: str, file: str, buffer: memoryview) -> Iterator[memoryview]:
        """The whole file through one small buffer."""
        with self._fs.open(f"{self.root}/{name}/{file}", "rb", block_size=READ, cache_type="readahead") as stream:
            while got := stream.readinto(buffer):
                yield buffer[:got]

    def quarantine(self, name: str, reason: str) -> str:
        """The manifest goes aside, so that nobody loads it again; the files stay for whoever investigates."""
        aside = f"{self.root}/{QUARANTINE}-{name}/{MANIFEST}"
        manifest = self._fs.cat_file(f"{self.root}/{name}/{MANIFEST}")
        self._fs.pipe_file(aside, manifest)
        self._fs.pipe_file(f"{self.root}/{QUARANTINE}-{name}/reason.txt", reason.encode())
        self._fs.rm_file(f"{self.root}/{name}/{MANIFEST}")
        return f"{self.root}/{QUARANTINE}-{name}"

    def remove(self, name: str) -> None:
        self._fs.rm_file(f"{self.root}/{name}/{MANIFEST}")
        self.abandon(name)

    def sweep(self, mine: str) -> None:
        committed, aside = set(self.names()), set(self.quarantined())
        for name in self._names():
            if name.startswith(PREFIX) and name not in committed | aside and mine not in name:
                self.abandon(name)
