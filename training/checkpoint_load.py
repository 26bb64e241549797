"""Reading a checkpoint so that nothing unverified reaches the training: every byte is hashed, then tensors move.

Order matters: the manifest proves the headers, the headers decide what a rank needs, the files are hashed while they
are read, and only then, when all ranks are content, is the live state touched. So damage is never mistaken for
"another model". A rank holds the files it needs in memory until it has taken them.
Not covered: which checkpoint, and what happens to a damaged one (training/checkpoint.py).
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from training.checkpoint_audit import manifest_of, prove
from training.checkpoint_plan import Read, plan_load, stored_shapes
from training.checkpoint_store import Store
from training.manifest import DamagedCheckpoint, Manifest, StoredFile
from training.segment_digests import SegmentDigests
from training.shard_file import ShardHeader, read_header, shard_name, tensor_in
from training.staging import Arena
from training.state_codec import decode
from training.state_tree import restore, targets


class IdentityMismatch(ValueError):
    """The checkpoint was made by other code, another configuration or other data."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A checkpoint whose bytes are proved, as far as this rank read them, ready to be taken."""

    manifest: Manifest
    headers: Mapping[str, ShardHeader]
    wanted: Mapping[str, torch.Tensor]
    reads: Mapping[str, list[Read]]
    buffers: Mapping[str, Arena]


def verify_for(
    store: Store, name: str, state: Mapping[str, Any], identity: Mapping[str, str], rank: int, world: int
) -> Verified:
    """Read and prove checkpoint `name` for this rank. A file that no rank needs is hashed by one of them.

    Raises DamagedCheckpoint; IdentityMismatch or StateMismatch for a sound one that does not fit; OSError when the
    store cannot be reached, which says nothing about the checkpoint."""
    try:
        manifest = manifest_of(store, name)
        _check_identity(f"{store.url}/{name}", manifest, identity)
        headers = {file: _header(store, name, file, stored) for file, stored in manifest.files.items()}
        first = headers[shard_name(0)].metadata
        wanted = targets(state, first["objects"], first["aliases"], stored_shapes(headers))
        reads = plan_load(headers, wanted)
        buffers = {}
        for i, (file, stored) in enumerate(sorted(manifest.files.items())):
            if file in reads or i % world == rank:
                arena = _read_proved(store, name, file, stored)
                if file in reads:
                    buffers[file] = arena
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{name}: {error}") from error
    except OSError as error:
        if error.errno == errno.EIO:  # the medium itself; a refused or lost connection damages nothing
            raise DamagedCheckpoint(f"{name}: {error}") from error
        raise
    return Verified(manifest=manifest, headers=headers, wanted=wanted, reads=reads, buffers=buffers)


def take(found: Verified, state: Mapping[str, Any]) -> tuple[Any, ...]:
    """Put a proved checkpoint into the live state; returns every saving rank's own state, by rank."""
    with torch.no_grad():
        for file, reads in found.reads.items():
            for read in reads:
                source = tensor_in(found.buffers[file].view, found.headers[file], read.piece)
                for dim, (start, length) in enumerate(zip(read.offsets, read.lengths, strict=True)):
                    source = source.narrow(dim, start, length)
                read.target.copy_(source)
    restore(state, decode(found.headers[shard_name(0)].metadata["objects"]), found.wanted)
    ranks = range(found.manifest.world)
    return tuple(decode(found.headers[shard_name(rank)].metadata["per_rank"]) for rank in ranks)


def _check_identity(where: str, manifest: Manifest, identity: Mapping[str, str]) -> None:
    for key in sorted(set(identity) | set(manifest.identity)):
        found, expected = manifest.identity.get(key), identity.get(key)
        if found != expected:
            raise IdentityMismatch(
                f"{where}: {key} has changed since it was saved: the checkpoint has {found!r}, this training has "
                f"{expected!r}. Resume with the same {key}, or train into another store URL"
            )


def _header(store: Store, name: str, file: str, stored: StoredFile) -> ShardHeader:
    if (size := store.size(name, file)) != stored.bytes:
        raise DamagedCheckpoint(f"{name}/{file}: {size} bytes, {stored.bytes} were written")
    raw = bytearray(stored.header_bytes)
    for _ in store.chunks(name, file, memoryview(raw)):
        pass
    if hashlib.sha256(raw).hexdigest() != stored.sha256[0]:
        raise DamagedCheckpoint(f"{name}/{file}: the sha256 of its header is not that of the one written")
    return read_header(bytes(raw))


def _read_proved(store: Store, name: str, file: str, stored: StoredFile) -> Arena:
    """The file's bytes, hashed by other threads while more are read: nobody trains now, so processors are to spare."""
    arena = Arena(stored.bytes, touched=False)
    with SegmentDigests(first=stored.header_bytes) as digests:
        for chunk in store.chunks(name, file, arena.view):
            digests.add(chunk, aside=True)
        prove(f"{name}/{file}", digests, stored)
    return arena
