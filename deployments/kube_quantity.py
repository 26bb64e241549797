"""Pure: Kubernetes quantities ("100m", "1Gi", "2", "1e3") as exact whole thousandths, and back for a person.

Whole numbers, because sums over thousands of pods must not drift. Not covered: quantities below a thousandth.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

_UNITS = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 1000),
    "": Fraction(1),
    **{unit: Fraction(1000 ** (i + 1)) for i, unit in enumerate(("k", "M", "G", "T", "P", "E"))},
    **{unit: Fraction(1024 ** (i + 1)) for i, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
}
_QUANTITY = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:[eE]([+-]?\d+)|([numkMGTPE]|[KMGTPE]i)?)")


@functools.lru_cache(maxsize=4096)
def milli(value: str | int | float) -> int:
    """The quantity in thousandths, rounded up as Kubernetes does. Raises ValueError for anything else."""
    match = _QUANTITY.fullmatch(str(value).strip())
    if match is None:
        raise ValueError(f"{value!r} is no Kubernetes quantity; expected one such as 500m, 2 or 16Gi")
    number = Fraction(match[1]) * (Fraction(10) ** int(match[2]) if match[2] else _UNITS[match[3] or ""])
    return -int(-number * 1000 // 1)


def shown(resource: str, thousandths: int) -> str:
    """The quantity for a person: memory and storage in binary units, everything else as a number."""
    if any(word in resource for word in ("memory", "storage", "hugepages", "shm")):
        size, units = thousandths / 1000, ["", "Ki", "Mi", "Gi", "Ti", "Pi"]
        while abs(size) >= 1024 and len(units) > 1:
            size, units = size / 1024, units[1:]
        return f"{size:.4g}{units[0]}"
    return f"{thousandths / 1000:g}"
