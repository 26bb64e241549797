"""One rank's tensors as one file in the safetensors format, written from one flat buffer and hashed on the way.

The file is what the safetensors library reads: 8 bytes of header length, a JSON header, the tensors' bytes without a
gap. Because the buffer (training/staging.py) has the same layout as the file, writing is a few large writes, no
serialisation. A shard of a larger tensor says so in the header's metadata, with the rank's own small state.
Not covered: which rank writes what (training/checkpoint.py) and where files go (training/checkpoint_store.py).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from training.manifest import StoredFile
from training.segment_digests import SegmentDigests

PAGE = 4096  # the header is padded to it, so that tensor data may be written past the page cache
MANY_PROCESSORS = 4  # with two, steps beside a save took 1.35 to 1.47 of an idle one when it was hashed while written
CHUNK = 16 << 20  # bytes written at a time: large enough to amortise a call, small enough to yield
ALIGN = 64  # bytes; a cache line
PAD = "__pad__"  # names of filler entries: the format allows no gaps

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    **{getattr(torch, f"uint{bits}"): f"U{bits}" for bits in (16, 32, 64) if hasattr(torch, f"uint{bits}")},
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


def shard_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A tensor, or the part of one that a rank holds: `shape` at `offsets` of a tensor of shape `whole`."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    whole: tuple[int, ...]
    start: int  # byte offset in the rank's buffer
    nbytes: int

    @property
    def entry(self) -> str:
        """The name in the file: the key, and for a true part its offsets."""
        return self.key if self.shape == self.whole else f"{self.key}@{','.join(map(str, self.offsets))}"


def _group(part: tuple[Any, ...]) -> tuple[Any, ...]:
    _, dtype, _, _, _, on_device, nbytes = part
    return (not on_device, -dtype.itemsize, str(dtype), nbytes % ALIGN != 0)


def lay_out(
    parts: Iterable[tuple[str, torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]],
) -> Layout:
    """Places for (key, dtype, shape, offsets, whole, on_device): device tensors first, in groups of one type that
    start aligned, and in each group first those that keep the next one aligned: vector copies want that.
    Raises TypeError for a type that the format lacks."""
    pieces: list[Piece] = []
    pads: list[tuple[int, int]] = []
    at = device_bytes = 0
    group: tuple[Any, ...] = ()
    sized = [(*part, math.prod(part[2]) * part[1].itemsize) for part in parts]
    for key, dtype, shape, offsets, whole, on_device, nbytes in sorted(sized, key=_group):
        if dtype not in _DTYPES:
            hint = "convert it, or keep it out of the state"
            raise TypeError(f"{key}: tensors of {dtype} cannot be checkpointed; {hint}")
        if (dtype, on_device) != group and (gap := -at % ALIGN):
            pads.append((at, gap))
            at += gap
        group = (dtype, on_device)
        pieces.append(Piece(key=key, dtype=dtype, shape=shape, offsets=offsets, whole=whole, start=at, nbytes=nbytes))
        at += nbytes
        device_bytes = at if on_device else device_bytes
    return Layout(pieces=tuple(pieces), pads=tuple(pads), nbytes=at, device_bytes=device_bytes)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where each piece lies in a rank's buffer, which is also the data part of its file."""

    pieces: tuple[Piece, ...]
    pads: tuple[tuple[int, int], ...]
    nbytes: int
    device_bytes: int  # the leading part that comes from an accelerator

    def header(self, metadata: dict[str, Any]) -> bytes:
        """The file's first bytes. `metadata` is JSON-able and kept as text under its keys, as the format wants."""
        entries: dict[str, Any] = {}
        parts = {p.entry: [p.key, p.offsets, p.whole] for p in self.pieces if p.shape != p.whole}
        entries["__metadata__"] = {key: json.dumps(value) for key, value in {**metadata, "parts": parts}.items()}
        for p in self.pieces:
            entries[p.entry] = {
                "dtype": _DTYPES[p.dtype],
                "shape": p.shape,
                "data_offsets": [p.start, p.start + p.nbytes],
            }
        for start, size in self.pads:
            entries[f"{PAD}{start}"] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        text = json.dumps(entries).encode()
        text += b" " * (-(8 + len(text)) % PAGE)
        return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a file's header says: `pieces` (their `start` relative to the data) and the metadata."""

    pieces: tuple[Piece, ...]
    metadata: dict[str, Any]
    data_start: int


def read_header(raw: bytes) -> ShardHeader:
    """Parse the header at the start of `raw`, whose digest has been checked."""
    size = 8 + int(struct.unpack("<Q", raw[:8])[0])
    entries = json.loads(raw[8:size])
    metadata = {key: json.loads(value) for key, value in entries.pop("__metadata__").items()}
    parts = metadata.pop("parts")
    pieces = []
    for entry, found in entries.items():
        if entry.startswith(PAD):
            continue
        shape = tuple(found["shape"])
        key, offsets, whole = parts.get(entry, (entry, [0] * len(shape), shape))
        start, end = found["data_offsets"]
        pieces.append(
            Piece(
                key=key,
                dtype=_BY_NAME[found["dtype"]],
                shape=shape,
                offsets=tuple(offsets),
                whole=tuple(whole),
                start=start,
                nbytes=end - start,
            )
        )
    return ShardHeader(pieces=tuple(pieces), metadata=metadata, data_start=size)


class Writer(Protocol):
    """An open file of the store."""

    def write(self, data: memoryview) -> None:
        """Append."""


def has_processors_to_spare() -> bool:
    """Whether this process may use more processors than a training loop keeps busy."""
    return len(os.sched_getaffinity(0)) >= MANY_PROCESSORS


def write_shard(
    writer: Writer, header: bytes, chunks: Iterator[memoryview], *, loop_rests: Callable[[], bool]
) -> StoredFile:
    """Write header and data. Where processors are to spare, other threads hash what this one sends to the disk: durable
    takes the slower of the two then, not their sum. With few processors that is when `loop_rests` says that training
    waits for this file (asked before each chunk); else hashing and writing take turns, or the loop would feel it.
    The calls that cost time release the interpreter lock."""
    spare, size = has_processors_to_spare(), len(header)
    with SegmentDigests(first=len(header)) as digests, mmap.mmap(-1, len(header)) as page:
        page[:] = header  # writes past the page cache want aligned memory
        with memoryview(page) as view:
            digests.add(view, aside=False)
            writer.write(view)
        for chunk in chunks:
            digests.add(chunk, aside=spare or loop_rests())
            writer.write(chunk)
            size += len(chunk)
        return StoredFile(bytes=size, header_bytes=len(header), sha256=digests.finish())


def tensor_in(buffer: Any, header: ShardHeader, piece: Piece) -> torch.Tensor:
    """The piece as a tensor over `buffer`, the whole file's bytes (no copy when aligned)."""
    if not piece.nbytes:
        return torch.empty(piece.shape, dtype=piece.dtype)
    start = header.data_start + piece.start
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=piece.nbytes, offset=start)
    if start % piece.dtype.itemsize:
        flat = flat.clone()
    return flat.view(piece.dtype).reshape(piece.shape)
