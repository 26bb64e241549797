"""The folder of one workload on the laptop, and what each file in it says.

request.json (what was asked), result.json (what the program answered), log.txt, start.json (when and how it was
started), process.json (the same, and its supervisor), exit (its code, written by the supervisor), ending.json (why the
place ended it, if it did), outcome.json (what was told about its end), lock; log.N.txt and outcome.N.json of earlier
starts under the same name.
Not covered: when it is started or ended (laptop.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deployments import processes
from deployments.processes import JOB_MARK as MARK


class JobFolder:
    """The folder of one workload and the files in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.request, self.result = (folder / "log.txt", folder / "request.json", folder / "result.json")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while it is decided whether to start, and while an end is recorded; freed by the death of its holder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def read(self, name: str) -> dict[str, Any] | None:
        """A JSON object of ours; None if there is none, or none that can be read."""
        try:
            value = json.loads((self.folder / name).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write(self, name: str, value: Any) -> None:
        """Write and rename, so that a reader never sees half of it."""
        aside = self.folder / f".{name}.{os.getpid()}"
        aside.write_text(json.dumps(value, indent=1, sort_keys=True))
        aside.replace(self.folder / name)

    def supervisor(self) -> processes.Identity | None:
        """Who runs it, or ran it last; None if it was never started."""
        found = processes.recall(self.folder / "process.json")
        return found[0] if found else None

    def record(self, supervisor: processes.Identity) -> None:
        """Write down who runs what start.json says."""
        processes.remember(self.folder / "process.json", supervisor, **(self.read("start.json") or {}))

    def exit(self) -> tuple[int, float] | None:
        """The exit code and when it was written (unix seconds). Only to be asked once the supervisor is gone."""
        path = self.folder / "exit"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return int(path.read_text()), path.stat().st_mtime
        return None

    def kill(self, *, spare: processes.Identity | None = None) -> set[int]:
        """SIGKILL everything of this job, with `spare` but for its supervisor."""
        own = self.supervisor()
        roots = {own.pid} if own and own.alive() else set()
        return processes.kill_tree(MARK, str(self.folder), roots=roots, spare={spare.pid} if spare else set())

    def archive(self) -> None:
        """Make room for a new start under the same name; logs and outcomes stay, numbered."""
        number = 1 + sum(1 for _ in self.folder.glob("log.*.txt"))
        for path in (self.log, self.folder / "outcome.json"):
            if path.exists():
                path.replace(path.with_name(f"{path.stem}.{number}{path.suffix}"))
        for name in ("start.json", "process.json", "exit", "ending.json", "result.json"):
            (self.folder / name).unlink(missing_ok=True)
