"""Fixtures of several modules: repositories that push to each other, a Prefect that only remembers (push_kit.py), and
a project that is on its remote (pushed_project_kit.py).

Their imports are inside, because every other test passes here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flows.push_handover import Target
    from tests.flows.push_kit import FakePrefect, Repositories


@pytest.fixture
def prefect() -> Iterator[FakePrefect]:
    from tests.flows.push_kit import FakePrefect

    with FakePrefect() as fake:
        yield fake


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.flows.push_kit import Repositories

    return Repositories.make_template(tmp_path_factory.mktemp("template"))


@pytest.fixture
def repos(tmp_path: Path, prefect: FakePrefect, template: Path) -> Repositories:
    from tests.flows.push_kit import Repositories

    return Repositories(tmp_path, prefect.port, template=template)


@pytest.fixture
def target(repos: Repositories) -> Target:
    from flows.push_handover import open_target

    return open_target(str(repos.checkout / "pipeline.toml"), "laptop")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose commit is on its remote; the working folder. Flows are followed without pauses."""
    from flows import follow
    from tests.flows.pushed_project_kit import make_pushed_project

    folder = make_pushed_project(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.01)
    return folder
