"""The rolling update's decisions and its recovery, against a played cluster: every refusal, every kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster_target import ClusterTarget, in_service
from deployments.errors import GiveUp, StepError, TryAgain
from deployments.manifests import ClusterPlace
from tasks.archive import content_digest
from tasks.audit_endpoint import Audit, AuditRequest, audit_endpoint
from tasks.deploy_model import DeployRequest, Endpoint, RollbackRequest, deploy_model, roll_back, run
from tasks.endpoint import ROLLING_PHASES, EndpointRecord
from tasks.golden import read_golden
from tests.tasks.rolling_kit import BUDGETS, DEPLOYMENTS, NAME, SERVICES, PodCluster, pod_cluster
from tests.tasks.serving_kit import Registry, make_toy, package, registry

TRANSITIONS = [
    "begun", "applying", "applied", "rolling", "proving", "soaking", "aliasing", "aliased", "committed", "reconciled",
    "drained",
]  # fmt: skip


@dataclass
class Bench:
    """A played cluster, a stub of the registry, and the requests of three versions."""

    pods: PodCluster
    aliases: Registry
    requests: dict[str, DeployRequest]
    record: EndpointRecord

    def truth(self) -> tuple[str | None, str | None, list[str]]:
        """(MLflow version of the record, alias, labels that answer); the Deployment's must be the record's."""
        serving, kube = self.record.serving(), self.pods.kube
        there = kube.has(DEPLOYMENTS, NAME)
        assert there == kube.has(SERVICES, NAME) == kube.has(BUDGETS, NAME) == (serving is not None)
        if there:
            applied = kube.get(DEPLOYMENTS, NAME)["spec"]["template"]["metadata"]["annotations"]["reprise.dev/label"]
            assert serving is not None and applied == serving.label
        else:
            self.pods.kube.wait(lambda: not self.pods.ready)
        alias = self.aliases.aliases.get(("toy", "champion"))
        return serving.version if serving else None, alias, self.pods.labels()

    def label(self, version: str) -> str:
        return self.requests[version].label

    def rollback(self, to: str = "") -> Endpoint:
        some = self.requests["1"]
        return roll_back(
            RollbackRequest(
                pipeline="toy",
                to=to,
                inference_url=some.inference_url,
                tracking_uri=some.tracking_uri,
                record=some.record,
                soak_seconds=0.0,
                cluster=some.cluster,
            )
        )

    def audit(self, **more: Any) -> Audit:
        some = self.requests["1"]
        request = AuditRequest(
            pipeline="toy",
            inference_url=some.inference_url,
            tracking_uri=some.tracking_uri,
            record=some.record,
            cluster=some.cluster,
        )
        return audit_endpoint(replace(request, **more))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three packaged versions."""
    folder = tmp_path_factory.mktemp("made")
    parts: dict[str, Any] = {}
    for version in (1, 2, 3):
        toy = make_toy(folder / f"toy{version}", seed=version)
        parts[str(version)] = (*package(toy, folder / "models", version), toy.heldout)
    return folder, parts


@pytest.fixture
def bench(made: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr("deployments.cluster_serving.POLL_SECONDS", 0.02)
    monkeypatch.setattr("tasks.rolling_update.POLL", 0.02)
    with pod_cluster() as pods, registry() as aliases:
        cluster = ClusterTarget(
            place=ClusterPlace(images={"serve": "serve:1"}, namespace="ns"),
            kubeconfig=pods.kube.kubeconfig(tmp_path),
            start_seconds=3.0,
            ready_seconds=0.0,
            patience_seconds=0.2,
            drain_seconds=0.5,
        )
        requests, answers = {}, {}
        for version, (asked, packaged, heldout) in made[1].items():
            requests[version] = DeployRequest(
                key=asked.key,
                pipeline="toy",
                version=version,
                label=packaged.label,
                mar=packaged.mar,
                sha256=packaged.sha256,
                inference_url=pods.url,
                serve=asked.serve | {"response_timeout_seconds": 2},
                golden=str(heldout),
                golden_count=5,
                soak_seconds=0.0,
                tracking_uri=aliases.uri,
                record=str(tmp_path / "store" / "endpoints"),
                cluster=cluster,
            )
            answers[packaged.label] = {sample.body: sample.answer for sample in read_golden(heldout)}
            pods.digests[packaged.label] = content_digest(Path(packaged.mar))
        pods.answers = lambda label, body: answers[label][body]
        record = EndpointRecord(folder=str(tmp_path / "store" / "endpoints"), pipeline="toy")
        yield Bench(pods, aliases, requests, record)


def test_the_order_of_a_rolling_update(bench: Bench) -> None:
    first = deploy_model(bench.requests["1"])
    assert (first.version, first.previous, first.changed) == ("1", None, True)
    phases: list[str] = []
    second = run(bench.requests["2"], phases.append)
    assert phases == TRANSITIONS
    assert (second.version, second.previous, second.golden_passed) == ("2", "1", 10)
    assert second.url == f"{bench.pods.url}/predictions/toy"
    assert bench.truth() == ("2", "2", [bench.label("2")])
    assert bench.pods.templates == [bench.label("1"), bench.label("2")]
    cluster = bench.requests["2"].cluster
    assert cluster is not None and in_service(cluster, "toy") == bench.label("2")

    patches = bench.pods.kube.count("PATCH", "^(?!.*dryRun)")
    again = deploy_model(bench.requests["2"])  # nothing is done twice
    assert not again.changed and again.golden_passed == 5
    assert bench.pods.kube.count("PATCH", "^(?!.*dryRun)") == patches and bench.aliases.moves == ["1", "2"]


def test_the_address_is_the_services_name_unless_one_is_given(bench: Bench) -> None:
    from tasks.endpoint_change import inference_url

    assert inference_url(replace(bench.requests["1"], inference_url="")) == "http://serve-toy.ns:8080"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("crash loop", r"container torchserve ends at each start \(exit 1\): boom"),
        ("wrong", r"container torchserve ends at each start \(exit 4\): the model answers wrongly: s1"),
        ("wrong numbers", "5 of 5 golden requests answered wrongly; first sample-000: numbers differ"),
        ("image", "image serve:1 cannot be pulled"),
        ("no node", "no node fits: 0/3 nodes are available: 3 Insufficient memory; no node has enough memory free"),
        ("never ready", "not complete after 1 s: 1 of 2 pods are new, 2 available"),
        ("slow", r"1 golden requests took 0\.2\d+ s and more; p95 of 5 may be 0\.15 s"),
    ],
)
def test_a_bad_version_is_taken_back_and_the_old_one_serves_on(
    bench: Bench, fault: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy_model(bench.requests["1"])
    bench.pods.faults[bench.label("2")] = fault
    if fault == "never ready":
        monkeypatch.setattr("tasks.rolling_update.RollingUpdate.seconds", lambda *_: 1.0)
    with pytest.raises(GiveUp, match=why):
        deploy_model(replace(bench.requests["2"], max_p95_seconds=0.15))
    assert bench.truth() == ("1", "1", [bench.label("1")])
    row = bench.record.read()["history"][-1]
    assert row["outcome"] == "rolled back" and row["label"] == bench.label("2")
    if fault not in ("wrong numbers", "slow"):
        assert set(bench.pods.answered) == {bench.label("1")}  # the bad one never got a request
    bench.pods.faults.clear()
    assert deploy_model(bench.requests["2"]).previous == "1"


def test_a_first_version_that_fails_leaves_nothing(bench: Bench) -> None:
    bench.aliases.aliases["toy", "champion"] = "7"
    bench.pods.faults[bench.label("1")] = "wrong"
    with pytest.raises(GiveUp, match="answers wrongly"):
        deploy_model(bench.requests["1"])
    assert bench.truth() == (None, "7", [])
    bench.pods.faults[bench.label("1")] = "wrong numbers"  # refused with all traffic on it already
    with pytest.raises(GiveUp, match="numbers differ"):
        deploy_model(bench.requests["1"])
    assert bench.truth() == (None, "7", [])


def test_an_image_that_is_missing_is_undone_to_the_image_that_was_proved(bench: Bench) -> None:
    """With the same version and label, or with another."""
    deploy_model(bench.requests["1"])
    good = bench.requests["1"].cluster
    assert good is not None
    broken = replace(good, place=replace(good.place, images={"serve": "serve:none"}))
    bench.pods.faults["serve:none"] = "image"
    for version in "12":
        with pytest.raises(GiveUp, match="image serve:none cannot be pulled"):
            deploy_model(replace(bench.requests[version], cluster=broken))
    live = bench.pods.kube.get(DEPLOYMENTS, NAME)
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "serve:1"
    assert bench.truth() == ("1", "1", [bench.label("1")])


def test_another_image_is_a_change_and_a_rollback_takes_the_old_one_with_it(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    old = bench.requests["2"].cluster
    assert old is not None
    newer = replace(old, place=replace(old.place, images={"serve": "serve:2"}), replicas=3)
    deploy_model(replace(bench.requests["2"], cluster=newer))
    live = bench.pods.kube.get(DEPLOYMENTS, NAME)
    assert live["spec"]["replicas"] == 3
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "serve:2"
    assert not deploy_model(replace(bench.requests["2"], cluster=newer)).changed
    assert deploy_model(bench.requests["2"]).changed  # the same label on the old image again
    deploy_model(replace(bench.requests["2"], cluster=newer))
    assert bench.rollback().version == "1"
    live = bench.pods.kube.get(DEPLOYMENTS, NAME)
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "serve:1" and live["spec"]["replicas"] == 2


def test_rollback_goes_to_the_one_before_or_to_a_named_one(bench: Bench) -> None:
    with pytest.raises(GiveUp, match="nothing to go back to"):
        bench.rollback()
    for version in ("1", "2", "3"):
        deploy_model(bench.requests[version])
    assert bench.rollback().version == "2"
    assert bench.rollback("1").version == "1"
    assert bench.truth() == ("1", "1", [bench.label("1")])
    assert [row["kind"] for row in bench.record.read()["history"]] == ["deploy"] * 3 + ["rollback"] * 2


def test_the_canary_asks_the_version_in_service_before_anything_is_applied(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    worse = read_golden(bench.requests["2"].golden)
    rows = [
        json.dumps({"name": s.name, "body_b64": line["body_b64"], "label": other, "answer": s.answer})
        for s, line, other in zip(
            worse,
            map(json.loads, Path(bench.requests["2"].golden).read_text().splitlines()),
            [s.answer["label"] for s in read_golden(bench.requests["1"].golden)],
            strict=True,
        )
    ]
    path = Path(bench.record.folder).parent / "labelled.jsonl"
    path.write_text("\n".join(rows) + "\n")
    bench.pods.kube.requests.clear()
    with pytest.raises(GiveUp, match=r"right on 0\.\d+ of 40 labelled samples, the one in service on 1\.000"):
        deploy_model(replace(bench.requests["2"], golden=str(path), canary_samples=40))
    assert bench.pods.templates == [bench.label("1")]
    assert bench.truth() == ("1", "1", [bench.label("1")])


def test_a_failed_registry_is_undone_and_the_next_try_succeeds(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    bench.aliases.fail = 1
    with pytest.raises(TryAgain, match="asked to fail"):
        deploy_model(bench.requests["2"])
    assert bench.truth() == ("1", "1", [bench.label("1")])
    assert deploy_model(bench.requests["2"]).previous == "1"


def test_a_deployment_that_was_deleted_or_changed_by_hand_is_put_right(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    bench.pods.kube.remove(DEPLOYMENTS, NAME)
    assert deploy_model(bench.requests["1"]).changed
    bench.pods.kube.remove(SERVICES, NAME)
    assert deploy_model(bench.requests["1"]).changed
    live = bench.pods.kube.get(DEPLOYMENTS, NAME)
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "by-hand:1"
    live["metadata"]["generation"] += 1
    bench.pods.kube.put(DEPLOYMENTS, live)
    assert deploy_model(bench.requests["1"]).changed
    assert bench.truth() == ("1", "1", [bench.label("1")]) and bench.audit().clean


def test_a_service_that_does_not_forget_the_old_pods_is_not_believed(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    old = list(bench.pods.ready)

    def stale(phase: str) -> None:
        if phase == "proving":
            bench.pods.ready = [*old, *bench.pods.ready]

    with pytest.raises(TryAgain, match=rf"every pod is new, and the Service still answers: {bench.label('1')}"):
        run(replace(bench.requests["2"], serve={"response_timeout_seconds": 0.1}), stale)
    assert bench.record.serving() is not None and bench.truth()[:2] == ("1", "1")


KILLED = """
import json, os, signal, sys
import deployments.cluster_serving, tasks.rolling_update
from tasks.deploy_model import deploy_model, run
from tasks.step import read_request
deployments.cluster_serving.POLL_SECONDS = tasks.rolling_update.POLL = 0.02
request, after = read_request(deploy_model, json.loads(sys.argv[1])), int(sys.argv[2])
count = 0
def on_phase(phase):
    global count
    count += 1
    if count == after:
        os.kill(os.getpid(), signal.SIGKILL)
try:
    run(request, on_phase)
except Exception as error:
    print(type(error).__name__, error)
"""


def killed_after(request: DeployRequest, transitions: int) -> int:
    """Deploy in a process that kills itself at its Nth transition; returns the exit code."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(asdict(request)), str(transitions)], capture_output=True, timeout=60
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr.decode()
    return done.returncode


def some(*fast: int) -> list[Any]:
    """All transitions; those that are not named only in the long run."""
    numbers = range(1, len(TRANSITIONS) + 1)
    return [number if number in fast else pytest.param(number, marks=pytest.mark.long) for number in numbers]


@pytest.mark.parametrize("transition", some(1, 4, 8, 9))
def test_killed_at_a_transition_the_same_deployment_again_is_one_rollout(bench: Bench, transition: int) -> None:
    deploy_model(bench.requests["1"])
    bench.pods.templates.clear()
    assert killed_after(bench.requests["2"], transition) == -signal.SIGKILL
    deploy_model(bench.requests["2"])
    assert bench.truth() == ("2", "2", [bench.label("2")])
    assert bench.pods.templates == [bench.label("2")]
    assert bench.record.read()["transaction"] is None
    assert {"begun", "applying", "rolling", "proving", "soaking", "aliasing", "committed"} <= set(ROLLING_PHASES)


@pytest.mark.parametrize("then", ["1", "3"])
@pytest.mark.parametrize("transition", some(5))
def test_killed_at_a_transition_another_deployment_ends_right(bench: Bench, transition: int, then: str) -> None:
    deploy_model(bench.requests["1"])
    killed_after(bench.requests["2"], transition)
    deploy_model(bench.requests[then])
    assert bench.truth() == (then, then, [bench.label(then)])
    assert bench.record.read()["transaction"] is None


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 25))])
def test_seeded_kills_of_good_and_bad_updates(bench: Bench, seed: int) -> None:
    """Kill after kill without a clean-up in between, among faults and deletions by hand; then one that runs through."""
    dice = random.Random(seed)
    deploy_model(bench.requests["1"])
    for _ in range(6 if seed else 2):
        version = dice.choice("123")
        bench.pods.faults = {bench.label(v): "wrong" for v in "23" if dice.random() < 0.3}
        if dice.random() < 0.2 and bench.pods.kube.has(DEPLOYMENTS, NAME):
            bench.pods.kube.remove(DEPLOYMENTS, NAME)
        killed_after(replace(bench.requests[version], golden_count=2), dice.randint(1, 12))
    bench.pods.faults = {}
    final = dice.choice("123")
    deploy_model(bench.requests[final])
    assert bench.truth() == (final, final, [bench.label(final)])


def test_a_cancelled_update_is_undone_at_once(bench: Bench) -> None:
    deploy_model(bench.requests["1"])

    def cancel(phase: str) -> None:
        if phase in ("soaking", "undoing"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        run(bench.requests["2"], cancel)
    assert bench.truth() == ("1", "1", [bench.label("1")]) and bench.record.read()["transaction"] is None


def test_processes_at_once_end_in_one_winner(bench: Bench) -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, json.dumps(asdict(bench.requests[v])), "99"], stdout=subprocess.PIPE
        )
        for v in "1233"
    ]
    outputs = [run.communicate(timeout=60)[0] for run in runs]
    assert outputs == [b""] * 4 and [run.returncode for run in runs] == [0] * 4
    version, alias, labels = bench.truth()
    assert version in {"1", "2", "3"} and alias == version and labels == [bench.label(version or "")]


def test_an_api_that_is_away_is_try_again_and_nothing_is_lost(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy_model(bench.requests["1"])
    monkeypatch.setattr("deployments.kube_api.PATIENCE", 0.3)

    def away(phase: str) -> None:
        if phase == "applying":
            bench.pods.kube.fail("PATCH", "deployments", 503, times=10_000)

    with pytest.raises(StepError, match="does not answer"):
        run(bench.requests["2"], away)
    bench.pods.kube.faults.clear()
    deploy_model(bench.requests["2"])
    assert bench.truth() == ("2", "2", [bench.label("2")])


def test_the_audit_finds_what_is_not_as_the_record_says_and_repairs_it(bench: Bench) -> None:
    assert bench.audit().clean
    deploy_model(bench.requests["1"])
    deploy_model(bench.requests["2"])
    found = bench.audit()
    assert found.clean and (found.version, found.label) == ("2", bench.label("2"))

    def what() -> list[str]:
        return [finding.what for finding in bench.audit().findings]

    bench.aliases.aliases["toy", "champion"] = "1"
    assert what() == ["alias champion"]
    live = bench.pods.kube.get(DEPLOYMENTS, NAME)
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "by-hand:1"
    live["metadata"]["generation"] += 1
    bench.pods.kube.put(DEPLOYMENTS, live)
    assert what() == ["alias champion", "Deployment serve-toy differs in"]
    found = bench.audit(repair=True)
    assert found.repaired and found.clean and bench.truth() == ("2", "2", [bench.label("2")])
    bench.pods.kube.remove(DEPLOYMENTS, NAME)
    bench.pods.kube.wait(lambda: not bench.pods.ready)
    assert what() == ["Deployment serve-toy"]
    assert bench.audit(repair=True).clean and bench.truth() == ("2", "2", [bench.label("2")])
    killed_after(bench.requests["1"], 6)
    assert "unfinished transaction" in what()
    assert bench.audit(repair=True).clean and bench.truth() == ("2", "2", [bench.label("2")])
    bench.pods.digests[bench.label("2")] = "f" * 64
    with pytest.raises(GiveUp, match="loaded other files"):
        bench.audit(repair=True)


def test_what_serves_without_a_record_is_left_over(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    (Path(bench.record.folder) / "toy.json").unlink()
    assert [f.what for f in bench.audit().findings] == ["alias champion", "Deployment serve-toy"]
