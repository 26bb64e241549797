"""Deploying steps that are killed at each transition, meet each other or find another archive, under load.

    KUBECONFIG=... pytest -m cluster -s tests/test_cluster_serving_faults.py

Whatever happens, record, alias, Deployment and answers are one version in the end. Not covered: versions that are bad
themselves (test_cluster_serving.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.kube_api import KubeApi
from deployments.workload import Outcome
from tasks.deploy_model import DeployRequest
from tests.cluster_serving_kit import Home, endpoint, serving_home, why

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
TRANSITIONS = 11  # of a rolling update, see tests/tasks/test_rolling_update.py

# A deploying step whose process is killed, or the archive changed, at its Nth transition. The main process of a
# container cannot be killed from within, so the step is its child.
AT = """
import json, os, signal, subprocess, sys
if sys.argv[1] != "child":
    code = open("/proc/self/cmdline").read().split(chr(0))[2]
    done = subprocess.run([sys.executable, "-c", code, "child", *sys.argv[1:]])
    sys.exit(137 if done.returncode == -signal.SIGKILL else done.returncode)
from tasks.deploy_model import deploy_model, run
from tasks.step import read_request
request = read_request(deploy_model, json.load(open(sys.argv[2])))
count = 0
def on_phase(phase):
    global count
    count += 1
    print(phase, flush=True)
    if sys.argv[3] == "tamper" and phase == "applying":
        with open(request.mar, "ab") as mar:
            mar.write(b"x")
    if sys.argv[3] == str(count):
        os.kill(os.getpid(), signal.SIGKILL)
run(request, on_phase)
"""


@pytest.fixture(scope="module")
def home(api: KubeApi, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with serving_home(api, tmp_path_factory.mktemp("toys")) as made:
        yield made


def deploy_at(home: Home, request: DeployRequest, what: str) -> tuple[Outcome, list[str]]:
    """The step with a fault, and the transitions that it told."""
    lines: list[str] = []
    wanted = home.workload(request, ("python", "-c", AT, "{request}", what))
    return home.cluster.run(wanted, on_line=lines.append), lines


def test_an_archive_that_is_not_the_one_packaged(home: Home) -> None:
    home.deploy(home.requests["1"])
    revision = home.revision()
    assert "packaged was 000" in why(home.deploy(replace(home.requests["6"], sha256="0" * 64)))
    assert home.revision() == revision  # refused before anything was applied
    began, mar = time.monotonic(), Path(home.requests["6"].mar)
    good = mar.read_bytes()
    with home.load() as load:
        outcome, lines = deploy_at(home, home.requests["6"], "tamper")
    mar.write_bytes(good)
    assert outcome.cause == "user_error" and "(exit 4)" in outcome.reason and "packaged was" in outcome.reason
    assert load.failures == [] and load.versions == {"1"} and "reconciled" in lines
    home.holds("1")
    print(f"\ndigest: undone after {time.monotonic() - began:.1f} s; {load.told()}")


@pytest.mark.parametrize("number", range(1, TRANSITIONS + 1), ids=lambda number: f"transition-{number}")
def test_a_step_that_is_killed_and_run_again_is_one_rollout(home: Home, number: int) -> None:
    one = {name: replace(request, cluster=replace(home.target, replicas=1)) for name, request in home.requests.items()}
    before, after = "12" if number % 2 else "21"
    endpoint(home.deploy(one[before]))
    revision = home.revision()
    with home.load() as load:
        killed, lines = deploy_at(home, one[after], str(number))
        again = endpoint(home.deploy(one[after]))
    assert killed.exit_code == 137 and len(lines) == number, (killed.reason, lines)
    assert again["version"] == after and home.revision() == revision + 1, lines[-1]
    home.holds(after)
    print(f"\nkilled at {lines[-1]}, then {again['seconds']:.1f} s; {load.told()}")
    assert load.failures == [] and load.versions <= {before, after}


def test_two_deployers_at_once(home: Home) -> None:
    endpoint(home.deploy(home.requests["1"]))
    found: dict[str, Outcome] = {}

    def one(version: str) -> None:
        found[version] = home.deploy(home.requests[version])

    with home.load() as load:
        threads = [threading.Thread(target=one, args=(version,)) for version in ("2", "6")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(900)
    assert {endpoint(outcome)["version"] for outcome in found.values()} == {"2", "6"}
    last = home.record.serving()
    assert last is not None and load.failures == [] and load.versions <= {"1", "2", "6"}
    home.holds(last.version)
    assert [row["outcome"] for row in home.record.read()["history"][-2:]] == ["in service"] * 2
    print(f"\ntwo at once: version {last.version} last; {load.told()}")
