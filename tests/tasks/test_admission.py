"""The admission test against real scratch servers: what passes, and each way not to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.errors import GiveUp
from tasks.admission import AdmissionRequest, admit
from tasks.deploy_model import deploy_model
from tests.tasks.serving_kit import MODULE, deploy_request, make_toy, package, registry
from tests.tasks.torchserve_stub import torchserve_stub

pytestmark = pytest.mark.timeout(300)
E2E, LONG = pytest.mark.e2e, pytest.mark.long  # a server each: the default run has one of each kind


def request_for(tmp_path: Path, module: str = MODULE, flipped: bool = False) -> AdmissionRequest:
    toy = make_toy(tmp_path / "toy", module=module, flipped=flipped)
    asked, packaged = package(toy, tmp_path / "models")
    return AdmissionRequest(
        pipeline="toy",
        version=asked.version,
        label=packaged.label,
        mar=packaged.mar,
        sha256=packaged.sha256,
        golden=str(toy.heldout),
        store=str(tmp_path / "store"),
    )


@E2E
def test_a_good_archive_is_admitted_once(tmp_path: Path) -> None:
    request = request_for(tmp_path)
    result = admit(request)
    assert result.golden == 20 and result.max_difference < 1e-5
    assert result.batches[0] == 1 and result.batches[-1] == 32 and len(result.batches) > 16
    assert result.bad_requests["empty"] == 400 and set(result.bad_requests.values()) == {400}
    assert result.server.startswith("torchserve 0.12.0, torch 2.13.0")
    began = time.monotonic()
    assert admit(request) == result and time.monotonic() - began < 0.5


ROW_MIXING = (
    MODULE.replace(
        "return torch.nn.Linear(4, 3)",
        "return Mixing(4, 3)",
    )
    + '''
class Mixing(torch.nn.Linear):
    """Answers depend on the neighbours in the batch."""
    def forward(self, x):
        return super().forward(x - x.mean(0) * (len(x) > 1))
'''
)


DIES = (
    MODULE.replace('json.loads(body)["values"]', "parse(body)")
    + """
def parse(body):
    if not body: import os; os._exit(1)
    return json.loads(body)["values"]
"""
)
RAISES_AT_START = MODULE + "\ndef build_model(params):\n    raise OSError('no disk')\n"
RAISES = MODULE.replace("shares = ", "raise KeyError('x')\n    shares = ")
MISSING = "its worker does not start: ModuleNotFoundError: No module named 'no_such"


@pytest.mark.parametrize(
    ("module", "flipped", "why"),
    [
        pytest.param("import no_such_package\n", False, MISSING, id="missing import", marks=E2E),
        pytest.param(ROW_MIXING, False, "in a batch of 2 is answered wrongly", id="rows mixed", marks=E2E),
        pytest.param(MODULE, True, r"sample-\d+ is answered wrongly: label", id="flipped", marks=LONG),
        pytest.param(RAISES_AT_START, False, "OSError: no disk", id="raises at start", marks=LONG),
        pytest.param(MODULE.replace("nn.Linear", "nn.Bilinear"), False, "not start", id="wrong shape", marks=LONG),
        pytest.param(RAISES, False, r"status 500: .*KeyError", id="raises", marks=LONG),
        pytest.param(DIES, False, r"is answered with 50|ended its worker", id="dies at bad requests", marks=LONG),
    ],
)
def test_what_is_not_admitted(tmp_path: Path, module: str, flipped: bool, why: str) -> None:
    request = request_for(tmp_path, module, flipped)
    with pytest.raises(GiveUp, match=why):
        admit(request)
    assert not (tmp_path / "store" / "admissions").exists()


@LONG
def test_a_deployment_that_is_not_admitted_never_reaches_the_server(tmp_path: Path) -> None:
    toy = make_toy(tmp_path / "toy", flipped=True)
    asked, packaged = package(toy, tmp_path / "models")
    with torchserve_stub(tmp_path / "models") as stub, registry() as aliases:
        record = tmp_path / "store" / "endpoints"
        request = deploy_request(asked, packaged, toy.heldout, stub.client, aliases.uri, record, admission=True)
        with pytest.raises(GiveUp, match=r"admission of toy 1.* is answered wrongly: label"):
            deploy_model(request)
        assert [call for call in stub.calls if not call.startswith("GET")] == [] and aliases.moves == []


@E2E
def test_a_killed_admission_leaves_no_server(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from deployments.scratch_torchserve import scratch_torchserve\n"
        "with scratch_torchserve(Path(sys.argv[1]), Path(sys.argv[2])): print('up', flush=True); sys.stdin.read()"
    )
    (tmp_path / "models").mkdir()
    argv = [sys.executable, "-c", script, str(tmp_path / "state"), str(tmp_path / "models")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as asked:
        assert asked.stdout and asked.stdout.readline() == b"up\n"
        assert mentioning(str(tmp_path))
        os.kill(asked.pid, signal.SIGKILL)
    give_up = time.monotonic() + 20
    while left := mentioning(str(tmp_path)):
        assert time.monotonic() < give_up, left
        time.sleep(0.1)


def mentioning(text: str) -> list[str]:
    """Command lines of living processes, but not this one, that mention a text."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return found
