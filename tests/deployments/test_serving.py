"""TorchServe's API as the rollout uses it, against a stub; the real server is in tests/tasks/test_deploy_model.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.errors import GiveUp, TryAgain
from deployments.serving import Answer, TorchServe, call, message, served
from tests.tasks.serving_kit import make_toy, package
from tests.tasks.torchserve_stub import Stub, torchserve_stub


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Stub]:
    toy = make_toy(tmp_path / "toy")
    for version in (1, 2):
        package(toy, tmp_path / "models", version, key=f"{version:08}")
    with torchserve_stub(tmp_path / "models") as running:
        running.answers = lambda label, body: {"label": 0}
        yield running


def test_a_life_of_two_versions(stub: Stub) -> None:
    server = stub.client
    assert server.versions("toy") == [] and server.models() == []
    for version in (1, 2):
        server.register("toy", f"toy-{version}.{version:08}.mar", workers=1)
    first, second = server.versions("toy")
    assert (first.label, first.default, second.default, first.ready) == ("1.00000001", True, False, 1)
    assert server.models() == ["toy"]
    with pytest.raises(GiveUp, match=r"did not remove toy 1\.00000001 .403.: Cannot remove default"):
        server.unregister("toy", first.label)
    server.set_default("toy", second.label)
    server.unregister("toy", first.label)
    server.unregister("toy", first.label)  # gone already: fine
    assert [found.label for found in server.versions("toy")] == [second.label]
    answer = server.predict("toy", b"x")
    assert answer.status == 200 and answer.document()["model_version"] == "2" and answer.seconds > 0
    assert answer.headers["x-model-label"] == second.label
    assert server.predict("toy", b"x", label=first.label).status == 404


def test_registering_never_waits(stub: Stub) -> None:
    """Its default is to wait, which stalls traffic for as long as a model loads."""
    stub.client.register("toy", "toy-1.00000001.mar", workers=1)
    assert stub.calls == ["POST /models"]


def test_what_is_refused(stub: Stub) -> None:
    with pytest.raises(GiveUp, match=r"refused missing\.mar .400.: cannot load"):
        stub.client.register("toy", "missing.mar", workers=1)
    stub.client.register("toy", "toy-1.00000001.mar", workers=1)
    with pytest.raises(GiveUp, match=r"409.*already registered"):
        stub.client.register("toy", "toy-1.00000001.mar", workers=1)
    with pytest.raises(GiveUp, match=r"did not make toy 9 the default .404."):
        stub.client.set_default("toy", "9")


def test_a_server_that_is_away() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        server = TorchServe(url, url)
        for ask in (
            lambda: server.versions("toy"),
            lambda: server.predict("toy", b""),
            lambda: server.wait_until_up(0.2),
        ):
            with pytest.raises(TryAgain, match="refused"):
                ask()


def test_a_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TryAgain, match=r"no answer within 0\.2 s"):
        call("GET", f"http://127.0.0.1:{silent.getsockname()[1]}/", None, timeout=0.2)


def test_a_proxy_of_the_environment_is_not_asked(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert stub.client.models() == []


def test_a_description_with_nothing_in_it() -> None:
    found = served({"modelVersion": "1"}, default=False)
    assert (found.workers, found.ready, found.pids, found.pending, found.response_timeout) == (0, 0, (), 0, 120)


@pytest.mark.parametrize(
    ("body", "text"),
    [(b'{"message": "so\\nit is"}', "so it is"), (b"plain", "plain"), (b"[1]", "[1]"), (b"\xff", "\ufffd")],
)
def test_the_reason_in_an_error(body: bytes, text: str) -> None:
    assert message(Answer(status=500, body=body, headers={}, seconds=0.0)) == text
