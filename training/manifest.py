"""The manifest of a checkpoint: what it is, which files it has, and their digests. Written last, it is the commit.

A person can read it (`manifest.json`), and whoever asks whether a training is complete asks it. It carries its own
sha256, so that no flipped bit goes unseen. Not covered: where it lies (training/checkpoint_store.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

FORMAT = "reprise-checkpoint-2"
NAME = "manifest.json"
_UNSET = "0" * 64


class DamagedCheckpoint(Exception):
    """What is stored is not what was written: says which file and how."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a checkpoint. `sha256` has a digest of the header, so that it may be believed before the rest is
    read, then of each segment of training.segment_digests.SEGMENT bytes."""

    bytes: int
    header_bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See the module. `meta` is the caller's (epoch, samples seen, ...); `identity` the digests of code, config and
    data; `environment` where it was written (versions, processor), to explain a result that differs."""

    step: int
    complete: bool
    world: int
    created: str  # ISO 8601, UTC
    meta: Mapping[str, Any]
    identity: Mapping[str, str]
    environment: Mapping[str, str]
    files: Mapping[str, StoredFile]
    format: str = FORMAT

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.bytes for file in self.files.values())

    def to_json(self) -> bytes:
        """The file's bytes, sealed with their own digest."""
        body = {"format": self.format, **{k: v for k, v in asdict(self).items() if k != "format"}, "sha256": _UNSET}
        text = json.dumps(body, indent=1).encode() + b"\n"
        return _sealed(text)


def _sealed(text: bytes) -> bytes:
    """`text` with the digest of itself in the place of the last 64 zeros."""
    head, tail = text.rsplit(_UNSET.encode(), 1)
    return head + hashlib.sha256(text).hexdigest().encode() + tail


def read_manifest(raw: bytes, where: str) -> Manifest:
    """Parse and check a manifest's bytes. Raises DamagedCheckpoint, or ValueError for a format of another version."""
    try:
        body = json.loads(raw)
        seal = body.pop("sha256").encode()
        head, tail = raw.rsplit(seal, 1)
        intact = _sealed(head + _UNSET.encode() + tail) == raw
        if intact and body["format"] != FORMAT:
            raise ValueError(
                f"{where}: format {body['format']!r}, this version reads {FORMAT!r}; use the one that wrote it"
            )
        files = {
            name: StoredFile(**{**found, "sha256": tuple(found["sha256"])}) for name, found in body.pop("files").items()
        }
        manifest = Manifest(**{f.name: body[f.name] for f in fields(Manifest) if f.name != "files"}, files=files)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedCheckpoint(f"{where}: unreadable ({type(error).__name__}: {error})") from error
    except ValueError as error:
        if "format" in str(error) and "this version reads" in str(error):
            raise
        raise DamagedCheckpoint(f"{where}: unreadable ({error})") from error
    if not intact:
        raise DamagedCheckpoint(f"{where}: its own sha256 does not match")
    return manifest
