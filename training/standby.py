"""A warm standby: the wrapper imports torch once, torchrun's agent and all workers are forked from it.

From a kill to the first new step most of the time goes into starting Python and importing torch, in the agent and then
in every worker. Here the wrapper (one thread, no CUDA context, so safe to fork) pays it once, at its own start; a
restart costs two forks. torchrun stays torchrun: its argument parser, its agent, its rendezvous, with functions as
workers in place of a script.
Not covered: the user's module and data, which every worker reads afresh; a standby on another node.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import logging
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1


class Agent:
    """torchrun's agent in a forked process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None  # minus the signal's number if one ended it

    def poll(self) -> int | None:
        """The return code once it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, if it has not ended."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def warm_up(*, compiler: bool) -> None:
    """Import what agents and workers need, torch's compiler only on request. Starts no thread, touches no device."""
    for name in ("torch.distributed.run", "training.train", *(("torch._dynamo",) if compiler else ())):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is imported is never collected: its pages stay shared


def start_agent(torchrun: Sequence[str], environment: Mapping[str, str], spec_file: Path, scratch: Path) -> Agent:
    """Fork torchrun's agent with these arguments; its workers train that spec. Returns at once."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return Agent(pid)
    _run_agent(torchrun, environment, spec_file, scratch)


def _run_agent(torchrun: Sequence[str], environment: Mapping[str, str], spec_file: Path, scratch: Path) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the wrapper, which makes it a notice
        os.environ.update(environment)
        tempfile.tempdir = str(scratch)  # error files; workers get the usual place back
        logging.disable(logging.ERROR)  # the wrapper tells what happened, in one line
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        parsed = parse_args([*torchrun, "training.train"])  # type: ignore[no-untyped-call]
        config, _, _ = config_from_args(parsed)
        config.start_method = "fork"
        try:
            elastic_launch(config, _worker)(str(spec_file))
            code = 0
        except (ChildFailedError, SignalException):
            pass  # statuses and manifest say more
        except UnboundLocalError as error:  # a signal in the first line of torch's timing wrapper
            if not isinstance(error.__context__, SignalException):
                raise
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _worker(spec_file: str) -> None:
    """In a worker: undo what the agent set for itself, then train."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    tempfile.tempdir = None
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from training.train import main

    code = main(["--spec", spec_file])
    if code:
        sys.stdout.flush()
        os._exit(code)
