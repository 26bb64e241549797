"""A deployment in a process of its own: one that kills itself at a transition, several at once."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict

from tasks.deploy_model import DeployRequest

KILLED = """
import json, os, signal, sys
import deployments.cluster_serving, tasks.rolling_update
from tasks.deploy_model import deploy_model, run
from tasks.step import read_request
deployments.cluster_serving.POLL_SECONDS = tasks.rolling_update.POLL = 0.02
request, after = read_request(deploy_model, json.loads(sys.argv[1])), int(sys.argv[2])
count = 0
def on_phase(phase):
    global count
    count += 1
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    run(request, on_phase)
except Exception as error:
    print(type(error).__name__, error)
"""


def killed_after(request: DeployRequest, transitions: int) -> int:
    """Deploy in a process that kills itself at its Nth transition; returns the exit code."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(asdict(request)), str(transitions)], capture_output=True, timeout=60
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def at_once(requests: list[DeployRequest]) -> None:
    """Deploy all of them in processes at the same time; none may fail or say anything."""
    runs = [
        subprocess.Popen([sys.executable, "-c", KILLED, json.dumps(asdict(r)), "99"], stdout=subprocess.PIPE)
        for r in requests
    ]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert outputs == [b""] * len(runs) and [run.returncode for run in runs] == [0] * len(runs)
