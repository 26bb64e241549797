"""The log of a workload, line by line, in a thread; a cut resumes where it was.

Best effort: whatever happens here never ends the workload. The kubelet's timestamps are the place to resume at: the API
takes whole seconds, so lines that were read are left out by their own time. Not covered: which pod (cluster_run.py).
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from deployments.errors import StepError
from deployments.kube_api import ApiStatus, KubeApi, Lines

IN_ORDER_SECONDS = 6.0  # a stream that ends in order is the end of the container, mostly: its pod will tell soon
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
                delay = max(delay, IN_ORDER_SECONDS)
            except ApiStatus as status:
                if status.code == 404 or (final and status.code == 400):
                    return
            except (StepError, OSError):  # the server is away, or the stream was cut
                if final and delay > 3:
                    return
            if final:
                self._closed.wait(delay)
                delay *= 2
            else:
                delay = 0.2 if self._ended.wait(delay) else min(5.0 if delay < IN_ORDER_SECONDS else 30.0, delay * 2)

    def read(self, *, follow: bool) -> Iterator[str]:
        """Lines after those read so far. Raises as KubeApi.stream."""
        query = {"container": self.container, "timestamps": "true"}
        if follow:
            query["follow"] = "true"
        if self._last:
            query["sinceTime"] = self._last
        skip = self._same
        self._lines = self.api.stream(self.path, query, quiet_seconds=QUIET_SECONDS)
        if self._closed.is_set():  # while it was being opened
            self._lines.close()
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


class LogFeed:
    """The log of a workload over all its pods: for a listener in the caller's thread, and in a file."""

    def __init__(
        self,
        api: KubeApi,
        pods_path: str,
        container: str,
        event: threading.Event,
        on_line: Callable[[str], None] | None,
        folder: Path | None,
    ) -> None:
        """`event` is set when there are lines to `deliver`. `folder`: for log.txt; None where there is none."""
        self.api, self.pods_path, self.container, self.event, self.on_line = api, pods_path, container, event, on_line
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._read: set[str] = set()  # uids of pods whose log was or is read
        self._current: PodLog | None = None
        self.file: Path | None = None
        self._open: TextIO | None = None
        if folder is not None:
            with contextlib.suppress(OSError):
                self._open, self.file = (folder / "log.txt").open("w", buffering=1), folder / "log.txt"

    def follow(self, pods: list[dict[str, Any]]) -> None:
        """Read the newest pod that has begun (of a training: the master), if it is a new one."""
        begun = [p for p in pods if _has_begun(p) and "-worker-" not in p["metadata"]["name"]]
        begun = [p for p in begun if p["metadata"]["uid"] not in self._read]
        if not begun:
            return
        newest = max(begun, key=lambda p: str(p["metadata"].get("creationTimestamp")))
        self.finish(2.0)
        self._read.add(newest["metadata"]["uid"])
        self._current = PodLog(self.api, f"{self.pods_path}/{newest['metadata']['name']}", self.container)
        self._current.start(self._take)

    def add_tail(self, pod: dict[str, Any]) -> None:
        """The last words of a pod whose log was not read."""
        if pod["metadata"]["uid"] not in self._read:
            name = pod["metadata"]["name"]
            for line in [f"--- {name}", *last_lines(self.api, f"{self.pods_path}/{name}", self.container, 50)]:
                self._take(line)

    def deliver(self) -> None:
        """Hand the lines that have come to the listener, in this thread. Raises what the listener raises."""
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                if self.on_line:
                    self.on_line(line)

    def say(self, text: str) -> None:
        """A line of the place's own."""
        if self.on_line:
            self.on_line(f"cluster: {text}")

    def finish(self, seconds: float) -> None:
        """The pod has ended: read what is left."""
        if self._current is not None:
            self._current.finish(seconds)
            self._current = None

    def close(self) -> None:
        """Stop reading."""
        if self._current is not None:
            self._current.close()
        if self._open is not None:
            self._open.close()

    def _take(self, line: str) -> None:
        if self._open is not None:
            with contextlib.suppress(OSError, ValueError):  # a full volume, or closed meanwhile
                self._open.write(line + "\n")
        self._lines.put(line)
        self.event.set()


def _has_begun(pod: dict[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")


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
