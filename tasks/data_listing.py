"""Which files a DVC digest stands for, and whether a folder holds exactly them. Standard library only.

A folder's digest is the md5 of its listing, a JSON document of (relpath, md5) in the cache; so a listing whose own md5
fits, and files whose md5 fit the listing, are the data. Not covered: getting them (tasks.pull_data).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deployments.errors import ConfigError, GiveUp

Listing = dict[str, str]  # path below the data folder -> md5


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """A file that is not what the digest says."""

    path: str
    expected: str
    found: str  # md5, or "" for a file that is not there


def md5_of(path: Path) -> str:
    """md5 of a file's bytes, "" if there is no such file."""
    try:
        with path.open("rb") as source:
            return hashlib.file_digest(source, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except FileNotFoundError:
        return ""


def object_path(cache: Path, md5: str) -> Path:
    """Where DVC's cache keeps an object."""
    return cache / "files" / "md5" / md5[:2] / md5[2:]


def read_listing(cache: Path, digest: str, name: str) -> Listing | None:
    """The files of a digest; `name` is for a digest that is one file's. None: the cache lacks it, or has it damaged.

    Raises GiveUp for a listing that leads outside the folder.
    """
    if not digest.endswith(".dir"):
        return {name: digest}
    try:
        raw = object_path(cache, digest).read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.md5(raw, usedforsecurity=False).hexdigest() != digest.removesuffix(".dir"):
        return None
    listing: Listing = {}
    for entry in json.loads(raw):
        path = PurePosixPath(entry["relpath"])
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise GiveUp(
                f"{name}: its listing {digest} names {entry['relpath']!r}, outside the data; expected paths below it; "
                "remove that file and dvc add again"
            )
        listing[str(path)] = entry["md5"]
    return listing


def wrong_files(folder: Path, listing: Listing, *, on_file: Callable[[int], None] | None = None) -> list[Wrong]:
    """Every file of the listing whose bytes are others or that is missing; all are read."""
    wrong: list[Wrong] = []
    for number, (path, expected) in enumerate(sorted(listing.items()), start=1):
        if (found := md5_of(folder / path)) != expected:
            wrong.append(Wrong(path=path, expected=expected, found=found))
        if on_file is not None:
            on_file(number)
    return wrong


def seal(folder: Path, listing: Listing, seal_file: Path) -> int:
    """Note size and time of each verified file, so that `sealed` is cheap; returns the bytes of all."""
    rows: dict[str, tuple[str, int, int]] = {}
    for path, md5 in listing.items():
        stat = (folder / path).stat()
        rows[path] = (md5, stat.st_size, stat.st_mtime_ns)
    aside = seal_file.with_name(f".{seal_file.name}.{os.getpid()}")
    aside.write_text(json.dumps(rows, sort_keys=True))
    aside.replace(seal_file)
    return sum(size for _, size, _ in rows.values())


def sealed(folder: Path, seal_file: Path) -> tuple[Listing, int] | None:
    """Listing and bytes of a folder that was verified before and still stands; None if it does not.

    A file of unchanged size and time is taken as unchanged, any other is read. Files that do not belong make it None.
    """
    try:
        rows: dict[str, tuple[str, int, int]] = json.loads(seal_file.read_text())
        there = {str(p.relative_to(folder).as_posix()) for p in folder.rglob("*") if not p.is_dir()}
        if not rows or there != set(rows):
            return None
        for path, (md5, size, time_ns) in rows.items():
            stat = (folder / path).stat()
            if stat.st_size != size or (stat.st_mtime_ns != time_ns and md5_of(folder / path) != md5):
                return None
    except (FileNotFoundError, ValueError):
        return None
    return {path: row[0] for path, row in rows.items()}, sum(row[1] for row in rows.values())


def split_digest(listing: Listing, split: str) -> str:
    """sha256 over the sorted (path, md5) of a split: a file, or a folder's files. Raises ConfigError if it is empty."""
    part = {p.removeprefix(f"{split}/"): md5 for p, md5 in listing.items() if p == split or p.startswith(f"{split}/")}
    if not part:
        there = sorted({p.split("/")[0] for p in listing})
        raise ConfigError(
            f"[data] split {split!r}: the data has no such file or folder, or it is empty; "
            f"expected one of: {', '.join(there[:8]) or 'nothing, the data is empty'}"
        )
    return hashlib.sha256(json.dumps(sorted(part.items())).encode()).hexdigest()
