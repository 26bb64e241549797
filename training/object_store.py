"""Checkpoints in an object store behind fsspec, s3:// above all. The manifest's PUT, which comes last, is the commit.

An object store has no rename; an upload is visible when it is complete, and a checkpoint when its manifest is. Parts of
uploads that a killed attempt left are invisible and cost money: the next attempt aborts them.
Not covered: credentials and endpoint, which the client library reads from the environment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from training.checkpoint_store import PREFIX, QUARANTINE, READ, Writer, write_failure
from training.manifest import NAME as MANIFEST


class ObjectWriter:
    """Uploads in parts; nothing is visible under the name before `finish`."""

    def __init__(self, fs: Any, path: str, nbytes: int) -> None:
        self._fs, self._path, self._nbytes = fs, path, nbytes
        self._stream = fs.open(path, "wb", block_size=32 << 20)

    def write(self, data: memoryview) -> None:
        try:
            self._stream.write(data)
        except Exception as error:  # each client library has its own errors
            raise write_failure(self._path, self._nbytes, None, error) from error

    def finish(self) -> None:
        try:
            self._stream.close()
        except Exception as error:
            raise write_failure(self._path, self._nbytes, None, error) from error

    def drop(self) -> None:
        with contextlib.suppress(Exception):  # the first error is the one worth telling
            self._stream.discard()
        self._stream.closed = True


class ObjectStore:
    """See the module."""

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
            raise write_failure(path, len(manifest), None, error) from error

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
        if "s3" in self._fs.protocol:
            self._abort_uploads(mine)

    def _abort_uploads(self, mine: str) -> None:
        bucket, _, prefix = self.root.partition("/")
        found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
        for upload in found.get("Uploads", []):
            if mine not in upload["Key"]:
                place = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                self._fs.call_s3("abort_multipart_upload", **place)
