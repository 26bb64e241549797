"""A receiver that dies by SIGKILL at a given line of the code between receipt and hand-over; for its test.

    python tests/flows/killed_receiver.py PIPELINE < commands

Imports once, then forks: each command `PORT FILE:LINE` runs the real app in a child that dies when a push has come in
and that line is reached for the first time; `PORT record` writes the lines that were reached, in order, when it is told
to end. Answers: `ready`, then `ended CODE`. Which lines count: FILES, whatever thread runs them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

import flows.push_handover
from flows.push_handover import open_target
from flows.push_receiver import guard, make_app

FILES = ("push_receiver", "push_signature", "push_payload", "push_queue", "push_handover", "fetch", "prefect_api")
FOLDER = str(Path(flows.push_handover.__file__).parent)


class Points:
    """Counts lines once a push is being received; kills at one of them."""

    def __init__(self, victim: str) -> None:
        self.victim, self.armed = victim, False
        self.reached: dict[str, None] = {}

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(FOLDER) or Path(path).stem not in FILES or frame.f_code.co_name == "lifespan":
            return None
        # The handler of POST /push; the loop that decides is traced from then on too.
        self.armed = self.armed or (frame.f_code.co_name == "push" and path.endswith("push_receiver.py"))
        return self.line

    def line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if self.armed and event == "line":
            point = f"{Path(frame.f_code.co_filename).stem}:{frame.f_lineno}"
            if point == self.victim:
                os.kill(os.getpid(), signal.SIGKILL)
            self.reached[point] = None
        return self.line


def receive(pipeline: str, port: int, victim: str) -> None:
    """The app as `reprise hook serve` runs it, in this process."""
    points = Points(victim)
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # uvicorn sends it to itself once more at its end
    threading.settrace(points.trace)
    sys.settrace(points.trace)
    flows.push_handover.POLL_SECONDS = 0.05
    app = make_app(guard([open_target(pipeline, "laptop")]))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False)
    if victim == "record":
        Path(pipeline).with_name("reached.json").write_text(json.dumps(list(points.reached)))


def main() -> None:
    """Fork for each line of standard input; a second line, `end`, ends a child that was not killed."""
    for command in sys.stdin:
        port, victim = command.split()
        child = os.fork()
        if child == 0:
            receive(sys.argv[1], int(port), victim)
            os._exit(0)
        print(f"pid {child}", flush=True)
        _, status = os.waitpid(child, 0)
        print(f"ended {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
