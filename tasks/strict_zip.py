"""A zip read strictly: one meaning, whoever reads it, and never more bytes than it claims.

TorchServe's Java reads an archive from its front, Python from the directory at its end. Archives exist that are two
archives to these two; here both must tell the same, entry by entry, with no byte between that only one of them sees.
Not covered: what the entries may be called or contain (tasks.archive), streamed or encrypted entries (refused).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from deployments.errors import GiveUp

MAX_ENTRIES = 1000
BLOCK = 1 << 20
ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A member of the archive as both of its headers tell it. Sizes in bytes."""

    name: str
    method: int
    crc: int
    packed: int
    size: int
    start: int  # of its local header
    data: int  # of its bytes


def read_entries(handle: BinaryIO, size: int, where: str) -> list[Entry]:
    """The members, from directory and local headers, which must agree and leave no gap. Raises GiveUp."""
    if size < 22:
        raise GiveUp(f"{where}: {size} bytes are no archive")
    end = at(handle, size - 22, 22)
    magic, disk, cd_disk, here, count, cd_size, cd_start, comment = struct.unpack("<4sHHHHIIH", end)
    if magic != b"PK\5\6" or comment:
        raise GiveUp(f"{where}: not a zip, or bytes follow its end")
    cd_end = size - 22
    if size >= 42 + 56 and at(handle, size - 42, 4) == b"PK\6\7":  # from 2 GiB on; narrow fields may still be filled in
        narrow = (count, here, cd_size, cd_start)
        cd_end, count, here, cd_size, cd_start = read_zip64_end(handle, size, where)
        if narrow != (min(count, 0xFFFF), min(here, 0xFFFF), min(cd_size, ZIP64), min(cd_start, ZIP64)):
            raise GiveUp(f"{where}: its two directories differ")
    if disk or cd_disk or here != count:
        raise GiveUp(f"{where}: an archive in several parts")
    if not 0 < count <= MAX_ENTRIES:
        raise GiveUp(f"{where}: {count} entries; expected 1 to {MAX_ENTRIES}")
    if cd_start + cd_size != cd_end or cd_size > 1 << 24:
        raise GiveUp(f"{where}: its directory does not lie where it should")
    directory, offset, entries = at(handle, cd_start, cd_size), 0, []
    for _ in range(count):
        entry, offset = read_member(handle, directory, offset, cd_start, where)
        entries.append(entry)
    if offset != len(directory):
        raise GiveUp(f"{where}: bytes follow its last entry")
    position = 0
    for entry in sorted(entries, key=lambda e: e.start):
        if entry.start != position:
            raise GiveUp(
                f"{where}: bytes hidden before {entry.name!r}: readers from the front and the end would differ"
            )
        position = entry.data + entry.packed
    if position != cd_start:
        raise GiveUp(f"{where}: bytes hidden before its directory")
    return entries


def read_zip64_end(handle: BinaryIO, size: int, where: str) -> tuple[int, int, int, int, int]:
    """Where the directory is in a large archive: (end, count, count here, size, start)."""
    magic, _, record, disks = struct.unpack("<4sIQI", at(handle, size - 42, 20))
    if magic != b"PK\6\7" or disks != 1 or record != size - 42 - 56:
        raise GiveUp(f"{where}: damaged directory")
    fields = struct.unpack("<4sQHHIIQQQQ", at(handle, record, 56))
    if fields[0] != b"PK\6\6" or fields[1] != 44 or fields[4] or fields[5]:
        raise GiveUp(f"{where}: damaged directory")
    return record, fields[7], fields[6], fields[8], fields[9]


def read_member(handle: BinaryIO, directory: bytes, offset: int, limit: int, where: str) -> tuple[Entry, int]:
    """One entry of the directory with its local header, and the offset of the next. Raises GiveUp if they differ."""
    fields = struct.unpack_from("<4sHHHHHHIIIHHHHHII", directory, offset)
    (
        magic,
        made_by,
        _,
        flags,
        method,
        time,
        date,
        crc,
        packed,
        size,
        n_name,
        n_extra,
        n_comment,
        disk,
        _,
        mode,
        start,
    ) = fields
    raw = directory[offset + 46 : offset + 46 + n_name]
    extra = directory[offset + 46 + n_name : offset + 46 + n_name + n_extra]
    name = raw.decode("ascii")
    if magic != b"PK\1\2" or disk or n_comment:
        raise GiveUp(f"{where}: damaged directory")
    if method not in (0, 8):
        raise GiveUp(f"{where}: {name!r} is packed by method {method}; expected stored or deflated")
    if flags & ~0x0800:
        raise GiveUp(f"{where}: {name!r} is encrypted or streamed; its size cannot be known before it is read")
    kind = mode >> 16 & 0o170000
    if made_by >> 8 == 3 and kind not in (0, 0o100000):
        raise GiveUp(f"{where}: {name!r} is a link or no regular file")
    size, packed, start = wide(extra, (size, packed, start), where)
    if start + 30 > limit:
        raise GiveUp(f"{where}: {name!r} lies outside the archive")
    local = struct.unpack("<4sHHHHHIIIHH", at(handle, start, 30))
    l_magic, _, l_flags, l_method, l_time, l_date, l_crc, l_packed, l_size, l_n_name, l_n_extra = local
    rest = at(handle, start + 30, l_n_name + l_n_extra)
    l_size, l_packed = wide(rest[l_n_name:], (l_size, l_packed), where)
    here = (l_flags, l_method, l_time, l_date, l_crc, l_packed, l_size, rest[:l_n_name])
    if l_magic != b"PK\3\4" or here != (flags, method, time, date, crc, packed, size, raw):
        raise GiveUp(f"{where}: {name!r}: its two headers differ, so two readers would see two archives")
    data = start + 30 + l_n_name + l_n_extra
    if data + packed > limit:
        raise GiveUp(f"{where}: {name!r} lies outside the archive")
    entry = Entry(name=name, method=method, crc=crc, packed=packed, size=size, start=start, data=data)
    return entry, offset + 46 + n_name + n_extra


def wide(extra: bytes, values: tuple[int, ...], where: str) -> tuple[int, ...]:
    """Replace values that only a zip64 field can hold. Any other extra field is refused: nothing here needs one."""
    if not extra:
        return values
    kind, length = struct.unpack_from("<HH", extra)
    if kind != 1 or length != len(extra) - 4 or length % 8:
        raise GiveUp(f"{where}: unknown extra field {kind:#x}")
    wider = list(struct.unpack_from(f"<{length // 8}Q", extra, 4))
    replaced = tuple(wider.pop(0) if value == ZIP64 and wider else value for value in values)
    if wider and ZIP64 in values:
        raise GiveUp(f"{where}: damaged size field")
    return replaced


def unpacked(handle: BinaryIO, entry: Entry, where: str) -> Iterator[bytes]:
    """The entry's bytes, in blocks, never more than it claims. Raises GiveUp if size or checksum are not as claimed."""
    unpack = zlib.decompressobj(-15) if entry.method == 8 else None
    crc, length, read = 0, 0, 0
    while read < entry.packed:
        packed = at(handle, entry.data + read, min(BLOCK, entry.packed - read))
        read += len(packed)
        while packed:
            block = unpack.decompress(packed, BLOCK) if unpack else packed
            packed = unpack.unconsumed_tail if unpack else b""
            crc, length = zlib.crc32(block, crc), length + len(block)
            if length > entry.size or (unpack and unpack.unused_data):
                raise GiveUp(f"{where}: entry {entry.name!r} holds more than it claims")
            yield block
    if length != entry.size or crc != entry.crc or (unpack and not unpack.eof):
        raise GiveUp(f"{where}: entry {entry.name!r} is damaged: size or checksum are not as claimed")


def at(handle: BinaryIO, offset: int, length: int) -> bytes:
    """Exactly these bytes. Raises ValueError if the file ends before."""
    handle.seek(offset)
    data = handle.read(length)
    if len(data) != length:
        raise ValueError(f"ends at byte {offset + len(data)}")
    return data
