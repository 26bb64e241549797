"""A person between the trained model and its rollout, through Prefect's own API."""

from __future__ import annotations

import pytest

from tests.flows.triggers.laptop_kit import Project, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_person_approves_or_refuses(project: Project) -> None:
    project.change('rev = "origin/main"', 'rev = "origin/main"\n\n[deploy]\napproval = true')
    flow_run = project.start(rev="origin/main", train={"seed": 90})
    project.wait(flow_run, "Suspended")
    until(lambda: project.processes(flow_run) == [], 30, "its process ends: nothing is held while a person thinks")
    assert project.document(flow_run)["status"] == "waiting"
    other = project.start(rev="origin/main", train={"seed": 91})
    project.wait(other, "Suspended")
    answer = {"run_input": {"decision": "refuse", "comment": "not on a Friday"}}
    project.prefect.call("POST", f"/flow_runs/{other}/resume", answer)
    project.wait(other, "Failed")
    refused = project.document(other)
    assert refused["status"] == "refused" and "not on a Friday" in refused["message"]
    project.prefect.call("POST", f"/flow_runs/{flow_run}/resume", {"run_input": {"decision": "deploy", "comment": ""}})
    project.wait(flow_run, "Completed")
    document = project.document(flow_run)
    assert document["status"] == "succeeded"
    assert document["approval"]["decision"] == "deploy"
    assert all(s["reused"] for s in document["steps"] if s["name"] in ("train_model", "register_model"))
    project.change('rev = "origin/main"\n\n[deploy]\napproval = true', 'rev = "origin/main"')  # not for who comes after


def test_a_run_that_is_cancelled_while_it_waits_asks_again_when_it_is_retried(project: Project) -> None:
    """Prefect would take the pause for answered: a model that nobody approved would go into service."""
    project.change('rev = "origin/main"', 'rev = "origin/main"\n\n[deploy]\napproval = true')
    flow_run = project.start(rev="origin/main", train={"seed": 92})
    project.wait(flow_run, "Suspended")
    body = {"run_input": {}}
    project.prefect.call("POST", f"/flow_runs/{flow_run}/resume", body)
    assert project.state(flow_run) == "Suspended", "a resume without a decision is none"
    project.prefect.set_state(flow_run, "CANCELLING", "Cancelling", "")
    assert project.state(flow_run) == "Cancelled", "at once: no process has to be told"
    until(lambda: project.document(flow_run)["status"] == "cancelled", 30, "the document says so")
    assert "asks again" in project.document(flow_run)["message"]
    assert project.prefect.set_state(flow_run, "SCHEDULED", "AwaitingRetry", "", force=True)
    project.wait(flow_run, "Suspended")
    assert project.document(flow_run)["status"] == "waiting"
    project.prefect.call("POST", f"/flow_runs/{flow_run}/resume", {"run_input": {"decision": "deploy"}})
    project.wait(flow_run, "Completed")
    document = project.document(flow_run)
    assert (document["status"], document["approval"]["decision"]) == ("succeeded", "deploy")
    shown = {"artifacts": {"flow_run_id": {"any_": [flow_run]}}}
    keys = [a["key"] for a in project.prefect.call("POST", "/artifacts/filter", shown)]
    assert len(keys) == len(set(keys)), f"each thing once: {keys}"
    project.change('rev = "origin/main"\n\n[deploy]\napproval = true', 'rev = "origin/main"')
