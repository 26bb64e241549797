"""A pod's programs end at once when they are told to, also while they still import: as the first process of a process
namespace too, where a signal without a handler is thrown away."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SLOW = "from pathlib import Path; import time; Path({there!r}).touch(); time.sleep(60)"
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
# program -> what it imports, which is made slow here
PROGRAMS = {
    "tasks.step": "json",
    "training.launch": "json",
    "training.evaluate": "torch",
    "training.verify_resume": "json",
    "deployments.serving_pod": "json",
    "deployments.run_metrics": "json",
    "flows": "cyclopts",
    "flows.cluster_zombies": "json",
}


def namespaces() -> bool:
    """Whether a process namespace can be made here: that takes root."""
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def start(program: str, folder: Path, around: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
    """The program, in the middle of its imports."""
    there = folder / "imports"
    (folder / f"{PROGRAMS[program]}.py").write_text(SLOW.format(there=str(there)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(ROOT)))}
    process = subprocess.Popen([*around, sys.executable, "-m", program], env=env, cwd=folder)
    until = time.monotonic() + 20
    while not there.exists():
        if time.monotonic() > until or process.poll() is not None:
            process.kill()
            pytest.fail(f"{program} did not import {PROGRAMS[program]}: {process.wait()}")
        time.sleep(0.01)
    return process


@pytest.mark.parametrize("program", PROGRAMS)
def test_told_to_end_while_it_imports(program: str, tmp_path: Path) -> None:
    process = start(program, tmp_path)
    try:
        process.terminate()
        assert process.wait(5) == 143  # by its own handler: the default would be minus the signal's number
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(not namespaces(), reason="needs a process namespace of its own (root, and unshare of util-linux)")
@pytest.mark.parametrize("program", PROGRAMS)
def test_also_as_the_first_process(program: str, tmp_path: Path) -> None:
    outside = start(program, tmp_path, NAMESPACE)
    try:
        (first,) = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        assert Path(f"/proc/{first}/status").read_text().split("NSpid:")[1].split("\n")[0].split()[-1] == "1"
        os.kill(int(first), signal.SIGTERM)
        assert outside.wait(5) == 143
    finally:
        outside.kill()
        outside.wait()


def test_every_program_that_a_manifest_names_is_here() -> None:
    manifests = "".join(path.read_text() for path in (ROOT / "deployments" / "k8s").rglob("*.yaml"))
    named = set(re.findall(r"\[python, -m, ([\w.]+)", manifests))
    assert "flows" in named and named <= set(PROGRAMS)
