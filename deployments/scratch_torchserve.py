"""A TorchServe for a few seconds, on free ports, that does not outlive whoever asked for it.

It is started by a guard, a process of this file that holds a pipe from its parent: when the parent ends in any way, the
pipe closes and the guard ends the server. Not covered: a guard that is killed itself (then the parent's own tree is).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deployments.errors import TryAgain
from deployments.serving import TorchServe
from deployments.torchserve_launch import Launch, free_ports, private_tmp, stop_torchserve, torchserve_command


@contextmanager
def scratch_torchserve(folder: Path, model_store: Path, *, start_seconds: float = 60.0) -> Iterator[TorchServe]:
    """A server with its state in `folder`, ended with the block. Raises TryAgain if it does not come up."""
    ports = free_ports()
    launch = torchserve_command(folder, model_store, ports)
    argv = [
        sys.executable,
        "-m",
        "deployments.scratch_torchserve",
        json.dumps([launch.argv, launch.env, str(launch.cwd)]),
    ]
    root = Path(__file__).parent.parent  # where the guard finds this package, wherever the caller stands
    guard = subprocess.Popen(argv, stdin=subprocess.PIPE, cwd=root, start_new_session=True)
    server = TorchServe(f"http://127.0.0.1:{ports.management}", f"http://127.0.0.1:{ports.inference}")
    try:
        try:
            server.wait_until_up(start_seconds)
        except TryAgain as error:
            console = (folder / "console.log").read_text(errors="replace").strip().splitlines()
            raise TryAgain(f"TorchServe did not start: {console[-1] if console else error}") from error
        yield server
    finally:
        assert guard.stdin
        with suppress(BrokenPipeError):
            guard.stdin.close()
        guard.wait()


def guard(launch: Launch) -> None:
    """Start the server, wait for the end of the pipe, end the server."""
    with (launch.cwd / "console.log").open("wb") as log:
        process = subprocess.Popen(
            launch.argv, env=launch.env, cwd=launch.cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        sys.stdin.buffer.read()
    finally:
        stop_torchserve(process)
        shutil.rmtree(private_tmp(launch.cwd), ignore_errors=True)  # it may lie outside the caller's folder


if __name__ == "__main__":
    argv_, env_, cwd_ = json.loads(sys.argv[1])
    guard(Launch(argv_, env_, Path(cwd_)))
