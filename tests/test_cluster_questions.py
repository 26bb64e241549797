"""plan, trace, who-uses and audit of a cluster: `KUBECONFIG=... pytest -m cluster tests/test_cluster_questions.py`.

From a pipeline that was never run, through a run, to what people and faults do to an endpoint; each as it is typed, and
its exit code. Tests build on each other. Set up as test_cluster_chain.py, whose words on remotes and the rig count here
too. Not covered: what an answer says in detail (tests/tasks, tests/flows/test_ask_flow.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from deployments.errors import Unreachable
from flows import ask as ask_module
from flows.ask import ask
from flows.plan import STEPS
from flows.prefect_api import Prefect
from flows.questions import UsesQuestion
from flows.start import Order
from tasks.endpoint import EndpointRecord
from tests.cluster_chain_kit import AUTH, ROOT, RUNS, SERVICES, Chain, key_of, kubectl
from tests.cluster_kit import until
from tests.test_cluster_chain import chain, services

__all__ = ["chain", "services"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def asked(chain: Chain, *words: str) -> tuple[int, Any, str]:
    """(exit code, answer, standard error) of a command with --json."""
    began = time.monotonic()
    process = chain.start(*words[1:], "--json", command=words[0])
    out, err = process.communicate(timeout=400)
    print(f"{' '.join(words)}: {time.monotonic() - began:.1f} s, exit code {process.returncode} {err.strip()}")
    assert "Traceback" not in err
    return process.returncode, json.loads(out) if out else None, err


def answered(chain: Chain, *words: str) -> Any:
    code, answer, err = asked(chain, *words)
    assert code == 0, err
    return answer


def flow_runs(chain: Chain) -> list[dict[str, Any]]:
    """Of questions, newest first."""
    body = {"flows": {"name": {"any_": ["ask"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 200}
    found: list[dict[str, Any]] = prefect(chain).call("POST", "/flow_runs/filter", body)
    return found


def prefect(chain: Chain) -> Prefect:
    return Prefect(url=chain.prefect)


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", AUTH)


@contextmanager
def without(deployment: str) -> Iterator[None]:
    """While none of its pods is there."""
    kubectl("-n", SERVICES, "scale", f"deployment/{deployment}", "--replicas=0")
    labels = f"app.kubernetes.io/name={deployment}"
    kubectl("-n", SERVICES, "wait", "--for=delete", "pod", "-l", labels, "--timeout=120s")
    try:
        yield
    finally:
        kubectl("-n", SERVICES, "scale", f"deployment/{deployment}", "--replicas=1")
        kubectl("-n", SERVICES, "rollout", "status", f"deployment/{deployment}", "--timeout=400s")


def on_laptop(chain: Chain) -> Any:
    """The plan of the same commit, made on this machine."""
    command = [sys.executable, "-m", "flows", "plan", "--json"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, cwd=chain.project, env=env, capture_output=True, check=True).stdout)


def test_a_pipeline_that_was_never_run(chain: Chain) -> None:
    plan = answered(chain, "plan")
    assert [(s["name"], s["reused"], s["reason"]) for s in plan["steps"]] == [(n, False, "first time") for n in STEPS]
    here = on_laptop(chain)
    assert [s["key"] for s in plan["steps"]] == [s["key"] for s in here["steps"]], "a key does not depend on the place"
    assert {k: v for k, v in plan.items() if k != "steps"} == {k: v for k, v in here.items() if k != "steps"}
    code, answer, err = asked(chain, "trace")
    assert (code, answer) == (1, None) and "MLflow at http://mlflow.reprise-services:5000 answered" in err
    assert answered(chain, "who-uses", plan["data_digest"]) == []
    found = answered(chain, "audit")
    assert (found["clean"], found["version"], found["findings"]) == (True, "", [])


def test_after_a_run_every_answer_leads_to_the_others(chain: Chain) -> None:
    document = chain.run()
    plan = answered(chain, "plan")
    assert plan["unchanged"] and all(s["reused"] for s in plan["steps"])
    assert [s["key"] for s in plan["steps"]] == [s["key"] for s in document["steps"]]
    changed = answered(chain, "plan", "--set", "gate.minimum=0.5")
    assert [s["reused"] for s in changed["steps"]] == [True, True, False, False, False, False]
    for what in ([], ["1"], ["champion"]):
        trace = answered(chain, "trace", *what)
        assert (trace["model"], trace["version"], trace["in_service"], trace["gaps"]) == ("digits", "1", True, [])
        assert (trace["run"], trace["git_sha"], trace["data_digest"]) == (
            document["run"], document["git_sha"], document["data_digest"],
        )  # fmt: skip
    assert [a["cause"] for a in trace["attempts"]] == ["complete"]
    assert trace["keys"]["train_model"] == key_of(document, "train_model")
    (use,) = answered(chain, "who-uses", document["data_digest"][:8])
    assert (use["version"], use["aliases"], use["run"]) == ("1", ["candidate", "champion"], document["run"])
    found = answered(chain, "audit")
    assert (found["clean"], found["version"], found["findings"]) == (True, "1", [])
    shown = chain.reprise("trace")
    assert shown.startswith("digits version 1, in service\n") and "show digits-1 --place cluster" in shown
    code, answer, err = asked(chain, "trace", "9")
    assert (code, answer) == (1, None) and "404" in err


def take_alias_away(chain: Chain) -> None:
    """By hand."""
    url = f"{chain.mlflow}/api/2.0/mlflow/registered-models/alias"
    body = json.dumps({"name": "digits", "alias": "champion"}).encode()
    headers = {"Host": "localhost:5000", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(url, body, headers, method="DELETE")).close()


def test_an_audit_finds_what_was_changed_by_hand_and_mends_it(chain: Chain) -> None:
    kubectl("-n", RUNS, "delete", "deployment/serve-digits", "--wait=true")
    code, found, err = asked(chain, "audit")
    assert code == 1 and "`reprise audit --repair --place cluster` makes them" in err
    assert [f["what"] for f in found["findings"]] == ["Deployment serve-digits"]
    mended = answered(chain, "audit", "--repair")
    assert mended["repaired"] and mended["clean"] and mended["findings"] == found["findings"]
    assert {a["model_version"] for a in chain.predictions(chain.run())} == {"1"}
    take_alias_away(chain)
    code, found, _ = asked(chain, "audit")
    assert code == 1 and [f["what"] for f in found["findings"]] == ["alias champion"]
    assert answered(chain, "audit", "--repair")["clean"]
    kubectl("-n", RUNS, "patch", "deployment/serve-digits", "-p", '{"spec": {"minReadySeconds": 1}}')
    code, found, _ = asked(chain, "audit")
    assert code == 1 and [f["what"] for f in found["findings"]] == ["Deployment serve-digits differs in"]
    assert found["findings"][0]["found"] == "spec.minReadySeconds"
    assert answered(chain, "audit", "--repair")["clean"]
    assert answered(chain, "audit")["findings"] == []


def test_an_archive_that_was_changed_is_told_and_not_served_again(chain: Chain) -> None:
    (mar,) = (chain.state / "store" / "models").glob("*.mar")
    kept = mar.read_bytes()
    try:
        mar.write_bytes(kept[:-1] + b"x")
        code, found, _ = asked(chain, "audit")
        assert code == 1 and f"sha256 of {mar.name}" in [f["what"] for f in found["findings"]]
        code, answer, err = asked(chain, "audit", "--repair")
        assert (code, answer) == (1, None) and "packaged was" in err
    finally:
        mar.write_bytes(kept)
    assert answered(chain, "audit")["clean"]


def test_mlflow_away(chain: Chain) -> None:
    with without("mlflow"):
        for words in (["trace"], ["who-uses", "dddddd"], ["audit"]):
            code, answer, err = asked(chain, *words)
            assert (code, answer) == (1, None) and "mlflow.reprise-services:5000" in err
        assert answered(chain, "plan")["unchanged"], "it needs no MLflow"
    assert answered(chain, "audit")["clean"]


def test_a_commit_that_is_not_pushed_has_no_plan_there(chain: Chain) -> None:
    before = len(flow_runs(chain))
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
    subprocess.run(["git", *identity, "commit", "-q", "--allow-empty", "-m", "x"], cwd=chain.project, check=True)
    try:
        code, answer, err = asked(chain, "plan")
        assert (code, answer) == (3, None) and "git push" in err and len(flow_runs(chain)) == before
    finally:
        subprocess.run(["git", "reset", "-q", "--soft", "HEAD~1"], cwd=chain.project, check=True)


def audits(chain: Chain) -> list[str]:
    """Jobs of audits that have not ended."""
    jobs = chain.jobs(step="audit_endpoint")
    return [str(j["metadata"]["name"]) for j in jobs if (j.get("status") or {}).get("active")]


def endpoint_lock(chain: Chain) -> AbstractContextManager[None]:
    """As a rollout holds it; its file is made by a pod, whose user is another one than ours."""
    assert answered(chain, "audit")["clean"]
    return EndpointRecord(folder=str(chain.state / "store" / "endpoints"), pipeline="digits").lock(10)


def waiting_audit(chain: Chain) -> subprocess.Popen[str]:
    """One whose step is under way: whoever calls this holds the endpoint's lock."""
    process = chain.start("--repair", "--json", command="audit")

    def step() -> str:
        assert process.poll() is None, process.communicate()
        return "".join(audits(chain))

    until(step, "the audit's step is under way", 200)
    return process


def test_a_question_whose_pod_goes_is_answered_by_the_next(chain: Chain) -> None:
    known = {j["metadata"]["uid"] for j in chain.jobs(step="audit_endpoint")}
    with endpoint_lock(chain):
        process = waiting_audit(chain)
        pod = chain.flow_pod()
        chain.api.delete(f"/api/v1/namespaces/{RUNS}/pods/{pod}", grace=0)
        until(lambda: chain.flow_pod().replace(pod, ""), "another pod of the flow", 120)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out)["clean"]
    assert len([j for j in chain.jobs(step="audit_endpoint") if j["metadata"]["uid"] not in known]) == 1, "adopted"


def test_ctrl_c_takes_the_question_back_with_its_step(chain: Chain) -> None:
    with endpoint_lock(chain):
        process = waiting_audit(chain)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=200)
        print(f"cancelled after {time.monotonic() - began:.1f} s")
        assert process.returncode == 130, out + err
        assert "cancelled; `reprise audit --place cluster` asks again" in err
        assert flow_runs(chain)[0]["state"]["type"] == "CANCELLED"
        until(lambda: "" if audits(chain) else "gone", "the step ends too", 60)
        print(f"its step ended after {time.monotonic() - began:.1f} s")
    assert answered(chain, "audit")["clean"]


def test_without_a_worker_it_is_given_up_and_never_begins(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain.project)
    monkeypatch.setattr(ask_module, "STARTING_SECONDS", 5.0)
    with without("prefect-worker"):
        with pytest.raises(Unreachable, match="did not begin within 5 s"):
            ask(Order(place="cluster"), UsesQuestion(digest="dddddd"), quiet=True)
        given_up = flow_runs(chain)[0]
        assert given_up["state"]["type"] == "CANCELLED"
    assert answered(chain, "who-uses", "dddddd") == []
    assert (prefect(chain).run(given_up["id"]) or {})["state"]["type"] == "CANCELLED"


def test_questions_at_once(chain: Chain) -> None:
    """None waits for another."""
    processes = [chain.start("--json", command=command) for command in ("plan", "trace", "audit")]
    for process in processes:
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, out + err
