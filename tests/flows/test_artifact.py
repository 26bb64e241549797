"""A flow run shows each thing once, however often it comes; a server that is away costs the view and not the run."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.errors import TryAgain
from flows.artifact import show


class Server:
    """The three requests that are made of artifacts."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.away = False

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if self.away:
            raise TryAgain("Prefect does not answer")
        if path == "/artifacts/filter":
            wanted = {name: rule["any_"][0] for name, rule in body["artifacts"].items()}
            return [a for a in self.kept if all(a[name] == value for name, value in wanted.items())][: body["limit"]]
        if method == "PATCH":
            next(a for a in self.kept if path == f"/artifacts/{a['id']}").update(body)
        else:
            self.kept.append({"id": str(len(self.kept)), **body})
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr("flows.prefect_api.Prefect.call", lambda self, *arguments: made.call(*arguments))
    return made


def run_of(flow_run: str, pipeline: str = "digits") -> Any:
    links = {"prefect_flow_run": flow_run} if flow_run else {}
    return SimpleNamespace(
        document={"links": links},
        urls={"prefect": "http://p"},
        plan=SimpleNamespace(pipeline=SimpleNamespace(name=pipeline)),
    )


def showing(flow_run: str, data: str, pipeline: str = "digits") -> None:
    asyncio.run(show(run_of(flow_run, pipeline), "plan", "markdown", data, f"said {data}"))


def test_what_comes_again_is_renewed_in_its_place(server: Server) -> None:
    showing("f1", "first")
    showing("f1", "second")
    (card,) = server.kept
    assert (card["key"], card["data"], card["description"], card["type"]) == (
        "digits-plan", "second", "said second", "markdown",
    )  # fmt: skip


def test_each_flow_run_and_each_pipeline_has_its_own(server: Server) -> None:
    showing("f1", "a")
    showing("f2", "b")
    showing("f1", "c", "flowers")
    assert [(a["flow_run_id"], a["key"], a["data"]) for a in server.kept] == [
        ("f1", "digits-plan", "a"), ("f2", "digits-plan", "b"), ("f1", "flowers-plan", "c"),
    ]  # fmt: skip


def test_a_server_that_is_away_is_told_and_does_not_fail_the_run(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.away = True
    with caplog.at_level(logging.WARNING, logger="flows.artifact"):
        showing("f1", "a")
    assert "digits-plan is not shown: Prefect does not answer" in caplog.text


def test_without_a_flow_run_there_is_no_page(server: Server) -> None:
    showing("", "a")
    assert server.kept == []
