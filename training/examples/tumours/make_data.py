"""Write the breast cancer set that scikit-learn carries as CSV: `python -m training.examples.tumours.make_data FOLDER`.

FOLDER/train.csv and FOLDER/heldout.csv: 30 measurements and the diagnosis; of each diagnosis every fifth row is kept
back. Every time the same bytes. Not covered: giving them to DVC (flows.example).
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path
from typing import Any


def make_data(folder: Path) -> int:
    """Write both splits below `folder`; returns how many rows."""
    from sklearn.datasets import load_breast_cancer

    bunch: Any = load_breast_cancer()
    names = [name.replace(" ", "_") for name in bunch.feature_names]
    rows: dict[str, list[list[Any]]] = {"train": [], "heldout": []}
    seen: Counter[str] = Counter()
    for values, target in zip(bunch.data, bunch.target, strict=True):
        diagnosis = str(bunch.target_names[target])
        rows["heldout" if seen[diagnosis] % 5 == 4 else "train"].append([*(f"{v:.10g}" for v in values), diagnosis])
        seen[diagnosis] += 1
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        with (folder / f"{split}.csv").open("w", newline="") as out:
            csv.writer(out, lineterminator="\n").writerows([[*names, "diagnosis"], *lines])
    return sum(seen.values())


def add_data(folder: Path, round_number: int, count: int = 40) -> int:
    """What measuring again gives: `count` training rows once more, each number a little larger. Returns how many."""
    with (folder / "train.csv").open(newline="") as source:
        header, *rows = csv.reader(source)
    first = (round_number * count) % len(rows)
    again = [[*(f"{float(v) * 1.01:.10g}" for v in row[:-1]), row[-1]] for row in rows[first : first + count]]
    with (folder / "train.csv").open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows([header, *rows, *again])
    return len(again)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m training.examples.tumours.make_data FOLDER")
    print(f"{make_data(Path(sys.argv[1]))} rows in {sys.argv[1]}")
