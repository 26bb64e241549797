"""Write the UCI digits that scikit-learn carries as PGM files: `python -m training.examples.digits.make_data FOLDER`.

FOLDER/{train,heldout}/<label>/<nnnn>.pgm, 8 x 8, largest value 16; of each digit every fifth image is held out. Every
time the same bytes. Not covered: giving them to DVC (flows.example).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any


def make_data(folder: Path) -> int:
    """Write both splits below `folder`; returns how many files."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    seen: Counter[int] = Counter()
    for number, (image, target) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        label = int(target)
        split = "heldout" if seen[label] % 5 == 4 else "train"
        seen[label] += 1
        file = folder / split / str(label) / f"{number:04}.pgm"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"P5\n8 8\n16\n" + bytes(int(v) for v in image.flatten()))
    return sum(seen.values())


def add_data(folder: Path, round_number: int, count: int = 100) -> int:
    """What a second look at the same digits gives: `count` new training images, each an old one moved by a pixel.

    Another round takes other images. Returns how many files were added.
    """
    old = [p for p in sorted((folder / "train").glob("*/*.pgm")) if "-moved" not in p.name]
    step = max(1, len(old) // count)
    added = 0
    for file in old[round_number % step :: step][:count]:
        pixels = file.read_bytes()[-64:]
        rows = [pixels[8 * r : 8 * r + 8] for r in range(8)]
        moved = [row[1:] + b"\0" for row in rows] if round_number % 2 else [*rows[1:], bytes(8)]
        file.with_name(f"{file.stem}-moved{round_number}.pgm").write_bytes(b"P5\n8 8\n16\n" + b"".join(moved))
        added += 1
    return added


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m training.examples.digits.make_data FOLDER")
    print(f"{make_data(Path(sys.argv[1]))} images in {sys.argv[1]}")
