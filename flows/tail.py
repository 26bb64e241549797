"""Follow a file that others append to, from a thread: the trainer's progress for whoever watches.

Not covered: logs of steps (the Runner follows those).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.1


@contextmanager
def following(path: Path, on_line: Callable[[str], None]) -> Iterator[None]:
    """While the block runs, `on_line` gets each whole line appended from now on. The file may come into being later."""
    stop = threading.Event()
    start = path.stat().st_size if path.exists() else 0

    def follow() -> None:
        offset, rest = start, b""
        while True:
            last = stop.is_set()
            if path.exists():
                with path.open("rb") as file:
                    file.seek(offset)
                    *lines, rest = (rest + (chunk := file.read())).split(b"\n")
                    offset += len(chunk)
                for line in lines:
                    on_line(line.decode(errors="replace"))
            if last:
                return
            stop.wait(POLL_SECONDS)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
