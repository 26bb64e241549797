"""Contracts of the whole tree: what imports cost and carry, and that the README tells the truth about the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "tasks", "training", "deployments")
HEAVY = ("torch", "mlflow", "dvc", "prefect", "kubernetes", "numpy", "matplotlib", "pandas")
LIGHT = sorted(
    [f"tasks.{p.stem}" for p in (ROOT / "tasks").glob("*.py") if p.stem != "__init__"]
    + ["training.spec", "training.tracking", "training.launch", "flows.plan", "flows.execute", "flows.__main__"]
    + [f"deployments.{p.stem}" for p in (ROOT / "deployments").glob("*.py") if p.stem != "__init__"]
)


@pytest.mark.parametrize("module", LIGHT)
def test_importing_costs_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([h for h in {HEAVY!r} if h in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_costs_little_more_than_an_interpreter() -> None:
    """CPU time of children, the least of several: a ratio that a busy machine moves little."""
    script = (
        "import resource, subprocess, sys\n"
        "def used():\n"
        "    spent = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    return spent.ru_utime + spent.ru_stime\n"
        "def cpu(argv):\n"
        "    before = used(); subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)\n"
        "    return used() - before\n"
        "bare = min(cpu([sys.executable, '-c', '']) for _ in range(8))\n"
        "ours = min(cpu([sys.executable, '-m', 'flows', '--help']) for _ in range(8))\n"
        "print(ours / bare)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert float(done.stdout) <= 10


def test_every_module_says_why_it_exists() -> None:
    silent = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text()
            if text.strip() and not text.lstrip().startswith(('"""', 'r"""')):
                silent.append(str(path.relative_to(ROOT)))
    assert silent == []


def test_the_readme_tree_is_what_the_files_say_of_themselves() -> None:
    done = subprocess.run([sys.executable, "tests/readme_tree.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "renew it: .venv/bin/python tests/readme_tree.py"


def test_no_file_is_a_place_for_everything() -> None:
    vague = {"utils.py", "common.py", "base.py", "helpers.py", "constants.py", "misc.py"}
    assert [p.name for package in PACKAGES for p in (ROOT / package).rglob("*.py") if p.name in vague] == []


def test_tests_are_named_after_the_modules_they_mirror() -> None:
    strangers = []
    for path in (ROOT / "tests").glob("*/test_*.py"):
        name, package = path.stem.removeprefix("test_"), ROOT / path.parent.name
        known = [p.stem.strip("_") for p in [*package.rglob("[!_]*.py"), *package.iterdir()]]
        known += {"deployments": ["kustomize", "alerts"], "training": ["gpu"]}.get(
            package.name, []
        )  # no module, but a subject
        if not any(name.startswith(module) for module in known):
            strangers.append(str(path.relative_to(ROOT)))
    assert strangers == []
