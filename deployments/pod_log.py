"""The log of one container, line by line, in a thread; a cut resumes where it was.

Best effort: whatever happens here never ends the workload. The kubelet's timestamps are the place to resume at: the API
takes whole seconds, so lines that were read are left out by their own time. Not covered: which pod (cluster_run.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from deployments.errors import StepError
from deployments.kube_api import ApiStatus, KubeApi, Lines

QUIET_SECONDS = 300.0  # a log may be silent for long; the server's own limit is 4 hours


class PodLog:
    """Reads a container's log from its beginning."""

    def __init__(self, api: KubeApi, pod_path: str, container: str) -> None:
        """`pod_path`: /api/v1/namespaces/N/pods/NAME."""
        self.api, self.path, self.container = api, f"{pod_path}/log", container
        self._last, self._same = "", 0  # time of the last line, and how many lines had it
        self._ended, self._closed = threading.Event(), threading.Event()
        self._lines: Lines | None = None
        self._sink: Callable[[str], None] = print
        self._thread = threading.Thread(target=self._run, name=f"log {pod_path}", daemon=True)

    def start(self, sink: Callable[[str], None]) -> None:
        """Read in a thread; `sink` is called there with each line."""
        self._sink = sink
        self._thread.start()

    def finish(self, seconds: float) -> None:
        """The container has ended: read what is left, for at most `seconds`."""
        self._ended.set()
        self._thread.join(seconds)
        self.close()

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()
        if (lines := self._lines) is not None:
            lines.close()

    def _run(self) -> None:
        delay = 0.2
        while not self._closed.is_set():
            final = self._ended.is_set()
            try:
                for line in self.read(follow=True):
                    self._sink(line)
                    delay = 0.2
                if final or self._closed.is_set():
                    return
            except ApiStatus as status:
                if status.code == 404 or (final and status.code == 400):
                    return
            except (StepError, OSError):  # the server is away, or the stream was cut
                if final and delay > 3:
                    return
            self._closed.wait(delay) if final else self._ended.wait(delay)
            delay = min(5.0, delay * 2)

    def read(self, *, follow: bool) -> Iterator[str]:
        """Lines after those read so far. Raises as KubeApi.stream."""
        query = {"container": self.container, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        if self._last:
            query["sinceTime"] = self._last
        skip = self._same
        self._lines = self.api.stream(self.path, query, quiet_seconds=QUIET_SECONDS)
        before = self._last
        for raw in self._lines:
            stamp, _, text = raw.decode(errors="replace").rstrip("\r").partition(" ")
            if not stamp[:1].isdigit():  # the server's own words, such as an error while reading
                continue
            if before and _order(stamp) <= _order(before) and (stamp != before or skip > 0):
                skip -= stamp == before
                continue
            self._same = self._same + 1 if stamp == self._last else 1
            self._last = stamp
            yield text.rpartition("\r")[2]


def last_lines(api: KubeApi, pod_path: str, container: str, count: int) -> list[str]:
    """The last lines of a container's log; [] if there is none any more."""
    query = {"container": container, "tailLines": str(count)}
    with contextlib.suppress(ApiStatus, StepError, OSError):
        return [line.decode(errors="replace") for line in api.stream(f"{pod_path}/log", query, quiet_seconds=10)]
    return []


def _order(stamp: str) -> tuple[str, str]:
    """A key that sorts RFC 3339 times of different precision (2026-01-01T00:00:00.5Z, ...00Z)."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return whole, fraction.ljust(9, "0")
