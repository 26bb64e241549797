"""One project with triggers for all tests of this folder: its servers start once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.flows.triggers.laptop_kit import NAMES, PORT, Project, Receiver
from tests.laptop_leftovers import processes_of, taken


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = Project(tmp_path_factory.mktemp("triggers"))
    made.command("up")
    made.command("deploy")
    yield made
    made.command("down")
    left = [n for n in range(len(NAMES)) if taken(PORT + n)]
    assert left == []
    assert processes_of(made.root) == []


@pytest.fixture(scope="session")
def receiver(project: Project) -> Iterator[Receiver]:
    made = Receiver(project)
    try:
        made.start()
        yield made
    finally:
        made.kill(signal.SIGTERM)
