"""Runs that start by themselves, on a cluster: `KUBECONFIG=... pytest -m cluster tests/test_cluster_triggers.py`.

The overlay `kind` with the component `triggers`, as kustomize renders it: the Job that registers the pipeline, the
receiver of pushes, the watch over flows; and what Prefect's page does, through Prefect's API. Tests build on each
other. Set up as test_cluster_chain.py, whose words on remotes and the rig count here too. Not covered: the decision
about a push and every kind of delivery (tests/flows), TLS (an ingress's).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from flows.plan import STEPS
from flows.prefect_api import Prefect
from flows.triggers import AUTOMATION, HEARTBEAT_SECONDS, SILENCE_SECONDS
from flows.zombies import SILENCE
from tests.cluster_chain_kit import AUTH, RUNS, SERVICES, Chain, key_of, kubectl, secret
from tests.cluster_kit import until
from tests.cluster_triggers_kit import PUSH, QUICK, Triggers, overlay_with_triggers
from tests.flows.push_kit import SECRET, payload, signed
from tests.test_cluster_chain import chain, services

__all__ = ["chain", "services"]
LEARNING_RATE = "learning_rate = 0.003"
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def password() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_AUTH_STRING", AUTH)
        yield


@pytest.fixture(scope="module")
def triggers(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> Triggers:
    """A quick pipeline with [push], and the component applied."""
    remote = chain.project.parent / "digits.git"
    built = overlay_with_triggers(tmp_path_factory.mktemp("overlay") / "kind", str(remote))
    (job,) = [o for o in yaml.safe_load_all(built) if o["metadata"]["name"] == "register-pipeline"]
    made = Triggers(chain=chain, prefect=Prefect(url=chain.prefect), job=job)
    made.change(*QUICK, more=PUSH)
    secret(chain.api, SERVICES, "push-receiver", {"secret": SECRET.decode()})
    kubectl("apply", "--server-side", "-f", "-", stdin=built)
    kubectl("-n", SERVICES, "rollout", "status", "deployment/push-receiver", "--timeout=120s")
    kubectl("-n", RUNS, "rollout", "status", "deployment/flow-watch", "--timeout=120s")
    return made


def registered(triggers: Triggers) -> tuple[Any, ...]:
    """Everything of the registration that is not a date."""
    deployment = triggers.deployment()
    automations = triggers.prefect.call("POST", "/automations/filter", {})
    kept = ("id", "name", "parameter_openapi_schema", "parameters", "job_variables", "entrypoint", "tags", "pull_steps")
    schedules = [(s["schedule"], s["active"], s["parameters"]) for s in deployment["schedules"]]
    limit = (deployment["global_concurrency_limit"]["limit"], deployment["concurrency_options"]["collision_strategy"])
    return {k: deployment[k] for k in kept}, schedules, limit, [(a["id"], a["name"], a["enabled"]) for a in automations]


def test_the_job_registers_schedule_form_limit_and_watch(triggers: Triggers) -> None:
    said = triggers.registered()
    assert "retrain/digits is registered: http://prefect.reprise-services:4200/" in said
    triggers.schedule("0 3 * * 1-5")
    deployment, schedules, limit, automations = registered(triggers)
    form = deployment["parameter_openapi_schema"]["properties"]
    assert form["pipeline"]["enum"] == ["pipeline.toml"] and form["place"]["enum"] == ["cluster"]
    assert deployment["parameters"] == {"pipeline": "pipeline.toml", "place": "cluster", "rev": "HEAD"}
    ((cron, active, parameters),) = schedules
    assert (cron["cron"], cron["timezone"], active) == ("0 3 * * 1-5", "UTC", True)
    assert parameters == {"rev": "HEAD", "cause": "schedule"}
    assert limit == (1, "ENQUEUE")
    assert [(name, enabled) for _, name, enabled in automations] == [(AUTOMATION, True)]
    with pytest.raises(Exception, match=r"answered 409|answered 422"):
        triggers.start(train={"epochs": 0})


def test_registered_again_it_is_the_same(triggers: Triggers) -> None:
    before = registered(triggers)
    triggers.register()
    assert registered(triggers) == before


def test_a_signed_push_retrains_once_at_exactly_that_commit(triggers: Triggers) -> None:
    before, after = triggers.change(("width = 16", "width = 8"))
    body = payload(before, after)
    assert triggers.deliver(body) == (202, "accepted")
    assert triggers.deliver(body) == (200, "duplicate")
    forged = {**signed(body), "X-Hub-Signature-256": "sha256=" + "0" * 64}
    assert triggers.deliver(body, forged) == (401, "refused")
    flow_run = until(lambda: "".join(r["id"] for r in triggers.runs(rev=after)), "the push is handed over")
    later, _ = triggers.change(
        ("learning_rate = 0.003", "learning_rate = 0.002")
    )  # the branch goes on; the run does not
    assert later == after
    triggers.reaches(flow_run, "Completed")
    document = triggers.document(flow_run)
    assert (document["git_sha"], document["cause"], document["status"]) == (after, "push", "succeeded")
    assert [s["status"] for s in document["steps"]] == ["done"] * len(STEPS)
    for step in STEPS:
        if step != "train_model":
            (job,) = triggers.chain.jobs(run=document["run"], step=step)
            assert job["status"]["succeeded"] == 1, step
    assert len(triggers.chain.trainings(key_of(document, "train_model"))) == 1
    assert triggers.chain.versions() == ["1"]
    assert triggers.deliver(body) == (200, "duplicate")
    time.sleep(5)
    assert [r["id"] for r in triggers.runs(cause="push")] == [flow_run]


def test_a_receiver_that_dies_between_receipt_and_hand_over_has_it_in_its_queue(triggers: Triggers) -> None:
    label = {"app.kubernetes.io/name": "push-receiver"}
    # Since the last commit that was decided only [serve] differs: nothing is trained.
    before, after = triggers.change(("batch_size = 8", "batch_size = 4"), ("learning_rate = 0.002", LEARNING_RATE))
    (pod,) = triggers.pods(SERVICES, **label)
    assert triggers.deliver(payload(before, after)) == (202, "accepted")
    triggers.chain.api.delete(f"/api/v1/namespaces/{SERVICES}/pods/{pod}", grace=0)
    assert triggers.runs(rev=after) == [], "it was killed before it handed over"
    flow_run = until(lambda: "".join(r["id"] for r in triggers.runs(rev=after)), "its successor hands over", 90)
    (successor,) = triggers.pods(SERVICES, **label)
    assert successor != pod
    assert triggers.deliver(payload(before, after)) == (200, "duplicate")
    triggers.reaches(flow_run, "Completed")
    document = triggers.document(flow_run)
    assert (document["git_sha"], document["status"]) == (after, "succeeded")
    assert triggers.reused(document) == STEPS[:3] and len(triggers.chain.versions()) == 1
    assert [r["id"] for r in triggers.runs(rev=after)] == [flow_run]


def by_the_clock(triggers: Triggers, *states: str) -> list[str]:
    """Flow runs of the schedule in these states."""
    return [r["id"] for r in triggers.runs(cause="schedule") if r["state"]["name"] in states]


def test_the_clock_retrains_and_a_second_run_follows_the_strategy(triggers: Triggers) -> None:
    triggers.change(("seed = 7", "seed = 8"), ("epochs = 2", "epochs = 120"))
    triggers.schedule("* * * * *", overlap="skip")
    first = until(lambda: "".join(by_the_clock(triggers, "Running")), "the schedule fires", 120)
    second = until(lambda: "".join(by_the_clock(triggers, "Cancelled")[:1]), "a minute later it is skipped", 120)
    assert second != first and triggers.state(first)["name"] == "Running" and triggers.jobs_of(second) == []
    triggers.schedule("* * * * *", overlap="wait", paused=True)
    assert [r for r in triggers.runs() if r["state"]["type"] == "SCHEDULED"] == [], "paused: nothing is to come"


def test_cancelled_it_leaves_a_checkpoint_and_retried_it_goes_on_from_it(triggers: Triggers) -> None:
    """The run of the clock; the states that Prefect's page sets for Cancel and Retry."""
    (flow_run,), versions = by_the_clock(triggers, "Running"), len(triggers.chain.versions())
    triggers.trains(flow_run)
    began = time.monotonic()
    assert triggers.prefect.set_state(flow_run, "CANCELLING", "Cancelling", "by test")
    triggers.reaches(flow_run, "Cancelled", seconds=90)
    print(f"cancelled after {time.monotonic() - began:.1f} s")
    document = triggers.document(flow_run)
    triggers.nothing_runs(document)
    (attempt,) = document["attempts"]
    assert (document["status"], attempt["cause"], attempt["steps_lost"]) == ("cancelled", "cancelled", 0)
    assert attempt["to_step"] > 20
    triggers.prefect.set_state(flow_run, "SCHEDULED", "AwaitingRetry", "by test", force=True)
    until(lambda: "yes" if triggers.state(flow_run)["type"] == "RUNNING" else "", "the retry begins", 60)
    triggers.reaches(flow_run, "Completed")
    again = triggers.document(flow_run)
    assert (again["run"], again["status"], again["resumed"]) == (document["run"], "succeeded", 1)
    assert (again["cause"], again["git_sha"]) == ("schedule", document["git_sha"])
    assert [a["cause"] for a in again["attempts"]] == ["cancelled", "complete"]
    assert again["attempts"][1]["from_step"] == attempt["to_step"]
    assert len(triggers.chain.versions()) == versions + 1
    triggers.change(("epochs = 120", "epochs = 2"))


DECISIONS = {"deploy": 101, "refuse": 102}  # and a setting for each, so that each has an archive of its own


@pytest.fixture
def approval(triggers: Triggers) -> Iterator[None]:
    """Asked for while the test lasts."""
    triggers.change(more="\n[deploy]\napproval = true\n")
    yield
    triggers.change(("\n[deploy]\napproval = true\n", ""))


@pytest.mark.usefixtures("approval")
def test_a_person_approves_or_refuses(triggers: Triggers) -> None:
    before = triggers.chain.rollouts()
    asked = {d: triggers.start(train={"seed": 90}, overrides=[f"serve.queue={n}"]) for d, n in DECISIONS.items()}

    def one_waits() -> str:  # [schedule] overlap = "wait"
        names = [triggers.state(flow_run)["name"] for flow_run in asked.values()]
        return "yes" if names.count("AwaitingConcurrencySlot") == 1 else ""

    until(one_waits, "one at a time")
    for flow_run in asked.values():
        triggers.reaches(flow_run, "Suspended")
        document = triggers.document(flow_run)
        assert document["status"] == "waiting" and "waits for approval" in document["message"]
        triggers.nothing_runs(document)
    assert triggers.chain.rollouts() == before
    for decision, end in (("refuse", "Failed"), ("deploy", "Completed")):
        answer = {"run_input": {"decision": decision, "comment": "not on a Friday"}}
        triggers.prefect.call("POST", f"/flow_runs/{asked[decision]}/resume", answer)
        triggers.reaches(asked[decision], end)
    refused, approved = (triggers.document(asked[d]) for d in ("refuse", "deploy"))
    assert refused["status"] == "refused" and "was refused by a person: not on a Friday" in refused["message"]
    assert "not on a Friday" in triggers.state(asked["refuse"])["message"]
    assert approved["status"] == "succeeded" and approved["approval"]["decision"] == "deploy"
    assert triggers.reused(approved) == STEPS[:4]
    assert triggers.chain.rollouts() == before + 1
    for job in triggers.jobs_of(asked["refuse"]):
        assert (job["status"].get("failed", 0), job["status"].get("active", 0)) == (0, 0), (
            "its end is an end for its Job"
        )


def die(triggers: Triggers, flow_run: str) -> float:
    """Its Job is deleted, then its pod without notice: nothing of Kubernetes starts it again; when (monotonic)."""
    (job,) = [j for j in triggers.jobs_of(flow_run) if j["status"].get("active")]
    pod = triggers.chain.flow_pod()
    triggers.chain.api.delete(f"/apis/batch/v1/namespaces/{RUNS}/jobs/{job['metadata']['name']}", propagation="Orphan")
    triggers.chain.api.delete(f"/api/v1/namespaces/{RUNS}/pods/{pod}", grace=0)
    return time.monotonic()


def scale(replicas: int) -> None:
    """The watch over flows, and Prefect's worker, which also tells of Jobs that are gone."""
    for namespace, name in ((RUNS, "flow-watch"), (SERVICES, "prefect-worker")):
        kubectl("-n", namespace, "scale", f"deployment/{name}", f"--replicas={replicas}")
        if not replicas:
            label = f"app.kubernetes.io/name={name}"
            kubectl("-n", namespace, "wait", "--for=delete", "pod", "-l", label, "--timeout=60s")


def test_a_flow_that_died_without_a_word_is_marked_by_its_heartbeats_and_resumed_once(triggers: Triggers) -> None:
    versions = len(triggers.chain.versions())
    flow_run = triggers.start(train={"epochs": 100, "seed": 61})
    triggers.trains(flow_run)
    scale(0)
    try:
        died = die(triggers, flow_run)
        until(lambda: triggers.state(flow_run)["name"].replace("Running", ""), "it is found", SILENCE_SECONDS + 20)
        print(f"marked {time.monotonic() - died:.1f} s after its death, a heartbeat every {HEARTBEAT_SECONDS} s")
        state = triggers.state(flow_run)
        assert (state["name"], state["message"][: len(SILENCE)]) == ("Crashed", SILENCE)
    finally:
        scale(1)
    until(lambda: str(triggers.document(flow_run).get("resumed") or ""), "it goes on", 120)
    died = die(triggers, flow_run)
    until(lambda: triggers.state(flow_run)["name"].replace("Running", ""), "it is found again", 60)
    print(f"with the worker and the watch it was marked {time.monotonic() - died:.1f} s after its death")
    time.sleep(15)
    assert triggers.state(flow_run)["name"] == "Crashed", "once: what killed it may kill it again"
    triggers.prefect.set_state(flow_run, "SCHEDULED", "AwaitingRetry", "by test", force=True)
    until(lambda: triggers.state(flow_run)["name"].replace("Crashed", ""), "a person retries it")
    triggers.reaches(flow_run, "Completed")
    document = triggers.document(flow_run)
    assert (document["status"], document["resumed"]) == ("succeeded", 2)
    assert [a["cause"] for a in document["attempts"]] == ["complete"], "its trainer went on and was adopted"
    assert len(triggers.chain.versions()) == versions + 1
