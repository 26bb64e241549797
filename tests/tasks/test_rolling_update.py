"""The rolling update's decisions, against a played cluster: the order of its phases, and every refusal.

Not covered: its kills (test_rolling_update_kills.py), what the audit says of it (test_rolling_update_audit.py).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.cluster_target import in_service
from deployments.errors import GiveUp, TryAgain
from tasks.deploy_model import deploy_model, run
from tasks.golden import read_golden
from tests.tasks.rolling_bench_kit import Bench
from tests.tasks.rolling_kit import DEPLOYMENTS, NAME, SERVICES

TRANSITIONS = [
    "begun", "applying", "applied", "rolling", "proving", "soaking", "aliasing", "aliased", "committed", "reconciled",
    "drained",
]  # fmt: skip


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
    bench.change_image("by-hand:1")
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
