"""Questions about a store's checkpoints from outside a training: what is there, is it sound, is the training complete.

    python -m training.checkpoint_audit URL [--json] [--no-hash]

prints one line per checkpoint, newest first, after hashing every byte (`--no-hash`: manifests and sizes only); exit 0
when the newest is sound, 5 when it is not, 0 with a note when there has never been one. Standard library only (and
fsspec for s3://), so that a step without torch may ask. Not covered: loading (training/checkpoint.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from training.checkpoint_store import READ, Store, open_store
from training.manifest import NAME, DamagedCheckpoint, Manifest, StoredFile, read_manifest
from training.segment_digests import SegmentDigests, difference


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What is known of one checkpoint; `error` is empty when it is sound."""

    name: str
    step: int | None
    complete: bool
    world: int | None
    created: str
    bytes: int
    error: str


def hash_file(store: Store, name: str, file: str, stored: StoredFile) -> None:
    """Raises DamagedCheckpoint unless the file has the bytes that were written."""
    buffer = memoryview(bytearray(min(READ, stored.bytes)))
    with SegmentDigests(first=stored.header_bytes, threads=1) as digests:
        for chunk in store.stream(name, file, buffer):
            digests.add(chunk, aside=False)  # the next one comes into the same memory
        prove(f"{name}/{file}", digests, stored)


def prove(where: str, digests: SegmentDigests, stored: StoredFile) -> None:
    """Raises DamagedCheckpoint unless what was hashed is what was written."""
    if wrong := difference(digests.finish(), stored.sha256, first=stored.header_bytes, nbytes=stored.bytes):
        raise DamagedCheckpoint(f"{where}: {wrong}")


def manifest_of(store: Store, name: str) -> Manifest:
    """The manifest of one checkpoint; raises DamagedCheckpoint."""
    try:
        return read_manifest(store.read(name, NAME), f"{name}/{NAME}")
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{name}/{NAME}: missing") from error


def newest_complete(url: str) -> Manifest | None:
    """The newest checkpoint that says the training is complete and has an intact manifest and files of the right
    sizes; None while there is none. Its bytes are hashed when it is loaded, not here."""
    store = open_store(url)
    for name in store.names():
        try:
            manifest = manifest_of(store, name)
            _check_sizes(store, name, manifest)
        except DamagedCheckpoint:
            continue
        if manifest.complete:
            return manifest
    return None


def _check_sizes(store: Store, name: str, manifest: Manifest) -> None:
    for file, stored in manifest.files.items():
        try:
            size = store.size(name, file)
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{name}/{file}: missing") from error
        if size != stored.bytes:
            raise DamagedCheckpoint(f"{name}/{file}: {size} bytes, {stored.bytes} were written")


def verify(url: str, *, hashes: bool = True) -> list[Audit]:
    """Every checkpoint at `url`, newest first. Changes nothing: quarantine is what `Checkpointer.load` does."""
    store, found = open_store(url), []
    for name in store.names():
        manifest, error = None, ""
        try:
            manifest = manifest_of(store, name)
            _check_sizes(store, name, manifest)
            if hashes:
                for file, stored in manifest.files.items():
                    hash_file(store, name, file, stored)
        except DamagedCheckpoint as damage:
            error = str(damage)
        found.append(
            Audit(
                name=name,
                step=manifest.step if manifest else None,
                complete=bool(manifest and manifest.complete),
                world=manifest.world if manifest else None,
                created=manifest.created if manifest else "",
                bytes=manifest.nbytes if manifest else 0,
                error=error,
            )
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The program of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m training.checkpoint", description="List and verify checkpoints.")
    parser.add_argument("url", help="folder, file:// or s3:// URL of one training's checkpoints")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--no-hash", action="store_true", help="check manifests and sizes only")
    options = parser.parse_args(arguments)
    found = verify(options.url, hashes=not options.no_hash)
    if options.json:
        print(json.dumps([asdict(audit) for audit in found], indent=1))
    elif not found:
        print(f"{options.url}: no checkpoint")
    else:
        print(f"{'step':>10}  {'world':>5}  {'bytes':>14}  {'complete':8}  {'written (UTC)':23}  state")
        for a in found:
            step, world = ("?" if value is None else str(value) for value in (a.step, a.world))
            state = a.error or ("sound" if not options.no_hash else "sound, not hashed")
            done = "yes" if a.complete else "no"
            print(f"{step:>10}  {world:>5}  {a.bytes:>14}  {done:8}  {a.created[:23]:23}  {state}")
    return 5 if found and found[0].error else 0


if __name__ == "__main__":
    sys.exit(main())
