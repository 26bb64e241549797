"""100 seeded kills of the deploying process against a real TorchServe: one version in service each time, all agreeing.

    .venv/bin/python -m pytest -m long tests/tasks/test_deploy_model_kills.py

Half of the kills are at a transition, half at a random moment. Then the same deployment runs again.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from tasks.audit_endpoint import AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, deploy_model
from tests.tasks.serving_kit import Registry, Serving, deploy_request, make_toy, package, registry, torchserve

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
PORT = 18120
KILLED = """
import json, os, signal, sys
from tasks.deploy_model import DeployRequest, run
request, after, count = DeployRequest(**json.loads(sys.argv[1])), int(sys.argv[2]), 0
def on_phase(phase):
    global count
    count += 1
    print(phase, flush=True)
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
run(request, on_phase)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Serving, Registry, dict[str, DeployRequest]]]:
    folder = tmp_path_factory.mktemp("kills")
    with torchserve(folder, PORT) as serving, registry() as aliases:
        requests = {}
        for version in (1, 2):
            toy = make_toy(folder / f"toy{version}", seed=version)
            asked, packaged = package(toy, serving.store, version)
            requests[str(version)] = deploy_request(
                asked,
                packaged,
                toy.heldout,
                serving.server,
                aliases.uri,
                folder / "store" / "endpoints",
                golden_count=5,
            )
        deploy_model(requests["1"])
        yield serving, aliases, requests


@pytest.mark.parametrize("seed", range(100))
def test_killed_and_run_again(place: tuple[Serving, Registry, dict[str, DeployRequest]], seed: int) -> None:
    serving, aliases, requests = place
    dice = random.Random(seed)
    version = "12"[seed % 2]
    request = requests["21"[seed % 2]]  # always away from what the last seed left
    at = dice.randint(1, 11) if dice.random() < 0.5 else 99
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(asdict(request)), str(at)], stdout=subprocess.PIPE
    )
    if at == 99:
        time.sleep(dice.uniform(0.1, 6.0))
        process.send_signal(signal.SIGKILL)
    told = process.communicate(timeout=120)[0].decode().split()
    assert process.returncode in (0, -signal.SIGKILL), told

    again = deploy_model(request)
    assert again.version == request.version != version or not again.changed
    held = serving.server.versions("toy")
    assert [(found.label, found.default) for found in held] == [(request.label, True)], told
    assert aliases.aliases == {("toy", "champion"): request.version}
    audit = audit_endpoint(
        AuditRequest(
            pipeline="toy",
            management_url=request.management_url,
            inference_url=request.inference_url,
            tracking_uri=request.tracking_uri,
            record=request.record,
        )
    )
    assert audit.clean and (audit.version, audit.sha256) == (request.version, request.sha256)
    assert Path(request.mar).is_file()
