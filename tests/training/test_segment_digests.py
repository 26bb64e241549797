"""Digests by segment are those of hashlib whatever the chunks, and a difference is told by its place."""

from __future__ import annotations

import hashlib
import itertools
import os

import pytest

import training.segment_digests
from training.segment_digests import SegmentDigests, difference

FIRST, SEGMENT = 5, 7


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.segment_digests, "SEGMENT", SEGMENT)


def expected(data: bytes) -> tuple[str, ...]:
    bounds = [0, FIRST, *range(FIRST + SEGMENT, len(data), SEGMENT), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(bounds)]
    return tuple(hashlib.sha256(part).hexdigest() for part in parts if part)


@pytest.mark.parametrize("size", [FIRST, FIRST + 1, FIRST + SEGMENT, FIRST + SEGMENT + 1, FIRST + 4 * SEGMENT, 50])
@pytest.mark.parametrize("chunk", [1, 3, FIRST, SEGMENT, 1000])
@pytest.mark.parametrize("aside", ["never", "always", "in turn"])
def test_whatever_the_chunks(size: int, chunk: int, aside: str) -> None:
    data = os.urandom(size)
    with SegmentDigests(first=FIRST) as digests:
        for number, at in enumerate(range(0, size, chunk)):
            digests.add(
                memoryview(data)[at : at + chunk], aside={"never": False, "always": True}.get(aside, number % 2)
            )
        assert digests.finish() == expected(data)


def test_hashing_aside_is_over_when_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory is used again then."""
    memory = bytearray(os.urandom(64 << 20))
    monkeypatch.setattr(training.segment_digests, "SEGMENT", 8 << 20)
    with pytest.raises(OSError, match="disk"), SegmentDigests(first=FIRST) as digests:
        digests.add(memoryview(memory), aside=True)
        raise OSError("disk full")
    memory.extend(b"x")  # refused while a view of it lives


def test_a_difference_is_told_by_its_place() -> None:
    data = bytes(range(24))
    sound = expected(data)
    assert difference(sound, sound, first=FIRST, nbytes=24) == ""

    def told(damaged: bytes) -> str:
        return difference(expected(damaged), sound, first=FIRST, nbytes=24)

    assert told(b"x" + data[1:]) == "the sha256 of bytes 0 to 5 is not that of the bytes written"
    assert told(data[:13] + b"x" + data[14:]) == "the sha256 of bytes 12 to 19 is not that of the bytes written"
    assert told(data[:23] + b"x").startswith("the sha256 of bytes 19 to 24 is not")
    assert told(data[:7] + b"x" + data[8:23] + b"x") == (
        "the sha256 of bytes 5 to 12 is not that of the bytes written, nor that of 1 more"
    )
    assert told(data[:19]) == "3 segments, 4 were written"
    assert told(data[:22]).startswith("the sha256 of bytes 19 to 24 is not")
    assert told(data + bytes(9)).startswith("the sha256 of bytes 19 to 24 is not")
