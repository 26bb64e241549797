"""A question inside a cluster's pod: the flow's own function over a volume, a git remote and an MLflow that are here.

Prefect's API and the Runner are fakes; in pods it is tests/test_cluster_questions.py.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GiveUp, PreflightError, TryAgain
from deployments.workload import Outcome, Workload
from flows.ask_flow import ask_on_cluster
from flows.on_cluster import GIT_VARIABLE, OnCluster
from flows.place import CLUSTER_VARIABLE
from flows.plan import STEPS
from flows.prefect_api import Prefect
from flows.questions import AuditQuestion, PlanQuestion, Question, TraceQuestion, UsesQuestion
from tasks.audit_endpoint import Audit
from tests.flows.push_kit import git
from tests.flows.pushed_project_kit import MODULE
from tests.flows.test_cluster_settings import LEAST
from tests.flows.test_plan import Folder
from tests.tasks.test_lineage import TAGS, registry, row, store

__all__ = ["registry", "store"]
QUESTIONS = [
    PlanQuestion(file="pipeline.toml", rev="HEAD", overrides=("train.epochs=3",)),
    TraceQuestion(pipeline="digits", what="3"),
    UsesQuestion(digest="d41d8c"),
    AuditQuestion(pipeline="digits", repair=True),
]


class Pod:
    """The flow's pod: what its environment says, and what it told."""

    def __init__(self, volume: Path, mlflow: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.volume, self.told, self.away = volume, [], False  # type: tuple[Path, list[dict[str, Any]], bool]
        services = f'[services]\nmlflow = "{mlflow}"\nmlflow_outside = "https://mlflow.example"\n'
        monkeypatch.setenv(CLUSTER_VARIABLE, LEAST + f'[state]\nmount = "{volume}"\n' + services)
        monkeypatch.setattr(Prefect, "call", self.call)
        self.workloads: list[Workload] = []
        self.outcome: dict[str, Any] = {}
        monkeypatch.setattr(OnCluster, "runner", lambda place: self)
        monkeypatch.setattr(OnCluster, "in_service", lambda place, pipeline: "")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        if self.away:
            raise TryAgain("Prefect does not answer")
        assert (method, path) == ("POST", "/artifacts/")
        self.told.append(json.loads(body["data"]))

    def run(self, workload: Workload) -> Outcome:
        self.workloads.append(workload)
        code = 0 if self.outcome.get("ok") else 1
        return Outcome(
            name=workload.name,
            exit_code=code,
            cause="complete" if code == 0 else "user_error",
            reason="exit code",
            started=0.0,
            ended=1.0,
            result=self.outcome,
        )

    def ask(self, question: Question) -> dict[str, Any]:
        """As the engine does: from JSON, checked, run."""
        parameters = json.loads(json.dumps({"question": asdict(question)}))
        checked = ask_on_cluster.validate_parameters(parameters)
        answer: dict[str, Any] = asyncio.run(ask_on_cluster.fn(**checked))
        assert self.told[-1] == json.loads(json.dumps(answer))
        return answer


@pytest.fixture
def pod(tmp_path: Path, registry: tuple[str, Any], store: Any, monkeypatch: pytest.MonkeyPatch) -> Pod:
    """Its volume has the store of test_lineage's fixture."""
    return Pod(tmp_path, registry[0], monkeypatch)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.kind)
def test_a_question_comes_through_prefect_as_it_was(question: Question) -> None:
    parameters = json.loads(json.dumps({"question": asdict(question)}))
    assert ask_on_cluster.validate_parameters(parameters)["question"] == question


@pytest.mark.parametrize(
    "given", [{"kind": "weather"}, {"kind": "audit"}, {"kind": "trace", "pipeline": "p", "what": 3}]
)
def test_what_is_no_question_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="question"):
        ask_on_cluster.validate_parameters({"question": given})


def test_a_trace_with_the_ledger_of_the_volume_and_addresses_for_people(pod: Pod) -> None:
    found = pod.ask(TraceQuestion(pipeline="digits", what=""))
    assert (found["version"], found["in_service"], found["gaps"]) == ("3", True, [])
    assert [a["cause"] for a in found["attempts"]] == ["spot", "spot", "complete"]
    assert found["model_url"] == "https://mlflow.example/#/models/digits/versions/3"


def test_every_use_of_some_data(pod: Pod, registry: tuple[str, Any]) -> None:
    registry[1].versions["digits", "4"] = row("digits", 4, TAGS, created=9)
    assert [u["version"] for u in pod.ask(UsesQuestion(digest="d41d8c"))["uses"]] == ["4", "3"]
    registry[1].versions.clear()
    assert pod.ask(UsesQuestion(digest="d41d8c")) == {"uses": []}


def test_what_there_is_not_and_what_is_away(pod: Pod, registry: tuple[str, Any]) -> None:
    with pytest.raises(GiveUp, match=r"model-versions/get with 404"):
        pod.ask(TraceQuestion(pipeline="digits", what="9"))
    with pytest.raises(GiveUp, match=r"registered-models/alias with 404"):
        pod.ask(TraceQuestion(pipeline="never-run", what=""))
    registry[1].failing = 503
    with pytest.raises(TryAgain, match="with 503"):
        pod.ask(TraceQuestion(pipeline="digits", what="3"))
    with pytest.raises(TryAgain, match="with 503"):
        pod.ask(UsesQuestion(digest="d41d8c"))
    assert pod.told == []
    registry[1].failing, pod.away = 0, True
    with pytest.raises(TryAgain, match="Prefect does not answer"):
        pod.ask(UsesQuestion(digest="d41d8c"))


def test_without_the_volume_it_says_so(pod: Pod, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CLUSTER_VARIABLE, LEAST + f'[state]\nmount = "{tmp_path}/none"\n')
    with pytest.raises(PreflightError, match="claim reprise"):
        pod.ask(AuditQuestion(pipeline="digits"))


def test_an_audit_is_a_step_with_the_account_that_may_look_and_mend(pod: Pod) -> None:
    audit = Audit(pipeline="digits", version="3", label="3.a", sha256="e", findings=[], repaired=False, clean=True)
    pod.outcome = {"ok": True, "result": asdict(audit)}
    assert pod.ask(AuditQuestion(pipeline="digits", repair=True)) == asdict(audit)
    (step,) = pod.workloads
    assert step.command == ("python", "-m", "tasks.step", "audit_endpoint", "{request}", "{result}")
    assert (step.image, step.account, step.labels) == (
        "step",
        "deploy",
        {"pipeline": "digits", "step": "audit_endpoint"},
    )
    request = step.request
    assert request is not None and request["repair"] is True and request["management_url"] == ""
    assert request["record"] == str(pod.volume / "store" / "endpoints")
    assert request["cluster"]["place"]["namespace"] == "reprise" and request["cluster"]["kubeconfig"] == ""
    pod.outcome = {"ok": False, "error": {"type": "TryAgain", "message": "a rollout is under way"}}
    with pytest.raises(TryAgain, match="a rollout is under way"):
        pod.ask(AuditQuestion(pipeline="digits"))
    assert len(pod.told) == 1


def test_a_plan_of_the_commit_that_the_pod_clones(pod: Pod, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    folder = Folder(origin)
    folder.write("digits.py", MODULE)
    folder.commit()
    monkeypatch.setenv(GIT_VARIABLE, str(origin))
    sha = git(origin, "rev-parse", "HEAD")
    found = pod.ask(PlanQuestion(file="pipeline.toml", rev=sha))
    assert (found["pipeline"], found["git_sha"], found["data_files"]) == ("digits", sha, 2)
    assert [s["name"] for s in found["steps"]] == list(STEPS) and not found["unchanged"]
    assert {s["reason"] for s in found["steps"]} == {"first time"}, "a pipeline that was never run"
    other = pod.ask(PlanQuestion(file="pipeline.toml", rev=sha, overrides=("train.epochs=9",)))
    keys = [(a["key"], b["key"]) for a, b in zip(found["steps"], other["steps"], strict=True)]
    assert [a == b for a, b in keys] == [True, False, False, False, False, False]
    with pytest.raises(ConfigError, match="nowhere"):
        pod.ask(PlanQuestion(file="pipeline.toml", rev="nowhere"))
    monkeypatch.delenv(GIT_VARIABLE)
    with pytest.raises(ConfigError, match="no git URL of the project"):
        pod.ask(PlanQuestion(file="pipeline.toml", rev=sha))
