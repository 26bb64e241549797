"""The rollout's decisions and its recovery, against a stub of TorchServe: every refusal, every kill."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import GiveUp, StepError, TryAgain
from tasks.deploy_model import DeployRequest, RollbackRequest, deploy_model, roll_back, run
from tasks.endpoint import EndpointRecord
from tasks.golden import read_golden
from tests.tasks.killed_deployment_kit import at_once, killed_after
from tests.tasks.serving_kit import Registry, deploy_request, registry, three_versions
from tests.tasks.torchserve_stub import Stub, torchserve_stub


@dataclass
class Bench:
    """A stub of each server and the requests of three versions."""

    stub: Stub
    aliases: Registry
    requests: dict[str, DeployRequest]
    record: EndpointRecord

    def truth(self) -> tuple[str | None, str | None, list[str]]:
        """(MLflow version of the record, alias, labels on the server); the default must be the record's."""
        serving = self.record.serving()
        labels = [found.label for found in self.stub.client.versions("toy")]
        defaults = [found.label for found in self.stub.client.versions("toy") if found.default]
        assert defaults == ([serving.label] if serving else [])
        return serving.version if serving else None, self.aliases.aliases.get(("toy", "champion")), labels

    def rollback_request(self, to: str = "") -> RollbackRequest:
        some = self.requests["1"]
        return RollbackRequest(
            pipeline="toy",
            to=to,
            management_url=some.management_url,
            inference_url=some.inference_url,
            tracking_uri=some.tracking_uri,
            record=some.record,
            soak_seconds=0.0,
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three packaged versions; the third answers as its torch model does, and that one is bad."""
    folder = tmp_path_factory.mktemp("made")
    return folder / "models", three_versions(folder, bad=3)


@pytest.fixture
def bench(tmp_path: Path, made: tuple[Path, dict[str, Any]]) -> Iterator[Bench]:
    store, parts = made
    with torchserve_stub(store) as stub, registry() as aliases:
        requests, answers = {}, {}
        for version, (asked, packaged, heldout) in parts.items():
            record = tmp_path / "store" / "endpoints"
            requests[version] = deploy_request(
                asked, packaged, heldout, stub.client, aliases.uri, record, soak_seconds=0.0, golden_count=5
            )
            answers[packaged.label] = {sample.body: sample.answer for sample in read_golden(heldout)}
        stub.answers = lambda label, body: answers[label][body]
        yield Bench(
            stub, aliases, requests, EndpointRecord(folder=str(tmp_path / "store" / "endpoints"), pipeline="toy")
        )


def label(bench: Bench, version: str) -> str:
    return bench.requests[version].label


def test_the_order_of_a_rollout(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    bench.stub.calls.clear()
    phases: list[str] = []
    run(bench.requests["2"], phases.append)
    assert phases == [
        "begun", "registering", "registered", "proving", "switching", "soaking", "aliasing", "aliased", "committed",
        "reconciled", "drained",
    ]  # fmt: skip
    changes = [call for call in bench.stub.calls if not call.startswith("GET")]
    new, old = label(bench, "2"), label(bench, "1")
    assert changes == ["POST /models", f"PUT /models/toy/{new}/set-default", f"DELETE /models/toy/{old}"]
    assert bench.truth() == ("2", "2", [new])


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("never ready", "0 of 1 workers READY after 0.3 s"),
        ("crash loop", "its worker died 4 times while loading"),
        ("raises", "5 of 5 golden requests answered wrongly; first sample-000: status 503"),
        ("slow", r"1 golden requests took 0\.2\d+ s and more; p95 of 5 may be 0\.15 s"),
        ("wrong version", "model_version '999', expected '2'"),
    ],
)
def test_a_bad_version_is_removed_and_the_old_one_serves_on(bench: Bench, fault: str, why: str) -> None:
    deploy_model(bench.requests["1"])
    bench.stub.faults[label(bench, "2")] = fault
    with pytest.raises(GiveUp, match=why):
        deploy_model(
            replace(bench.requests["2"], start_seconds=0.3 if fault == "never ready" else 5, max_p95_seconds=0.15)
        )
    assert bench.truth() == ("1", "1", [label(bench, "1")])
    assert label(bench, "2") not in bench.stub.served
    assert bench.record.read()["history"][-1]["outcome"] == "rolled back"


def test_a_first_version_that_fails_leaves_nothing(bench: Bench) -> None:
    bench.stub.faults[label(bench, "1")] = "raises"
    with pytest.raises(GiveUp, match="status 503"):
        deploy_model(bench.requests["1"])
    assert bench.truth() == (None, None, [])


def test_the_canary_judges_labelled_accuracy_not_agreement_alone(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    with pytest.raises(GiveUp, match=r"right on 0\.\d+ of 40 labelled samples, the one in service on 1\.000"):
        deploy_model(replace(bench.requests["3"], canary_samples=40))
    assert bench.truth() == ("1", "1", [label(bench, "1")])
    assert deploy_model(bench.requests["3"]).version == "3"  # without a canary nothing speaks against it


def test_two_deployments_at_once_wait_for_each_other_and_the_second_says_who_holds_the_lock(bench: Bench) -> None:
    with bench.record.lock(0.0), pytest.raises(TryAgain, match=f"held by process {os.getpid()}"):
        deploy_model(replace(bench.requests["1"], lock_wait_seconds=0.1))
    assert bench.truth() == (None, None, [])


def test_rollback_goes_to_the_one_before_or_to_a_named_one(bench: Bench) -> None:
    with pytest.raises(GiveUp, match="nothing to go back to"):
        roll_back(bench.rollback_request())
    for version in ("1", "2", "3"):
        deploy_model(bench.requests[version])
    assert roll_back(bench.rollback_request()).version == "2"
    assert roll_back(bench.rollback_request()).version == "3"  # forth again: the one before is now the third
    assert roll_back(bench.rollback_request("1")).version == "1"
    assert bench.truth() == ("1", "1", [label(bench, "1")])
    with pytest.raises(GiveUp, match="version '9' was never in service; known: "):
        roll_back(bench.rollback_request("9"))


def test_a_rollback_works_after_the_training_is_cleaned_away(bench: Bench, tmp_path: Path) -> None:
    for version in ("1", "2"):
        copy = tmp_path / f"heldout{version}.jsonl"
        copy.write_bytes(Path(bench.requests[version].golden).read_bytes())
        deploy_model(replace(bench.requests[version], golden=str(copy)))
        copy.unlink()
    assert roll_back(bench.rollback_request()).version == "1"


def test_a_failed_first_deployment_takes_back_an_alias_that_a_kill_left(bench: Bench) -> None:
    """Killed after the alias moved, then refused: the alias is as it was before the first try."""
    bench.aliases.aliases["toy", "champion"] = "7"
    assert killed_after(bench.requests["1"], 8) != 0
    assert bench.aliases.aliases["toy", "champion"] == "1"
    bench.stub.faults[label(bench, "1")] = "raises"
    with pytest.raises(GiveUp, match="status 503"):
        deploy_model(bench.requests["1"])
    assert bench.truth() == (None, "7", [])


def test_a_failed_registry_is_undone_and_the_next_try_succeeds(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    bench.aliases.fail = 1
    with pytest.raises(TryAgain, match="asked to fail"):
        deploy_model(bench.requests["2"])
    assert bench.truth() == ("1", "1", [label(bench, "1")])
    assert deploy_model(bench.requests["2"]).previous == "1"


def test_an_alias_moved_by_hand_is_put_right_by_the_next_deployment(bench: Bench) -> None:
    deploy_model(bench.requests["1"])
    bench.aliases.aliases["toy", "champion"] = "7"
    assert deploy_model(bench.requests["1"]).changed
    assert bench.truth() == ("1", "1", [label(bench, "1")])


def test_kill_at_every_transition_then_any_deployment_ends_right(bench: Bench) -> None:
    """Then: the same deployment again, the old version again, or another one, in turn."""
    killed = 0
    for transition in range(1, 12):
        then = "213"[transition % 3]
        deploy_model(bench.requests["1"])
        killed += killed_after(bench.requests["2"], transition) != 0
        deploy_model(bench.requests[then])
        assert bench.truth() == (then, then, [label(bench, then)]), transition
        assert bench.record.read()["transaction"] is None
    assert killed == 11


def test_a_cancelled_rollout_is_undone_at_once(bench: Bench) -> None:
    """SIGTERM, twice, as an impatient person sends it, while the new version has the traffic already."""
    deploy_model(bench.requests["1"])
    before = signal.getsignal(signal.SIGTERM)

    def cancel(phase: str) -> None:
        if phase in ("soaking", "undoing"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        run(bench.requests["2"], cancel)
    assert bench.truth() == ("1", "1", [label(bench, "1")]) and bench.record.read()["transaction"] is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_processes_at_once_end_in_one_winner(bench: Bench) -> None:
    """Two deploy the same version, two others; whoever came last has won, and everything agrees."""
    at_once([bench.requests[v] for v in "1233"])
    version, alias, labels = bench.truth()
    assert version in {"1", "2", "3"} and alias == version and labels == [label(bench, version or "")]
    history = bench.record.read()["history"]
    assert [row["outcome"] for row in history] == ["in service"] * len(history) and 3 <= len(history) <= 4


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 25))])
def test_seeded_kills_of_good_and_bad_rollouts(bench: Bench, seed: int) -> None:
    """Kill after kill without a clean-up in between, among faults and an empty server; then one that runs through."""
    dice = random.Random(seed)
    deploy_model(bench.requests["1"])
    for _ in range(8):
        version = dice.choice("123")
        bench.stub.faults = {label(bench, v): "raises" for v in "23" if dice.random() < 0.3}
        if dice.random() < 0.2:
            bench.stub.models.clear()
            bench.stub.defaults.clear()
        killed_after(replace(bench.requests[version], golden_count=2), dice.randint(1, 12))
    bench.stub.faults = {}
    final = dice.choice("123")
    deploy_model(bench.requests[final])
    assert bench.truth() == (final, final, [label(bench, final)])


def test_a_server_that_dies_during_the_rollout_is_told_as_try_again(bench: Bench) -> None:
    deploy_model(bench.requests["1"])

    def die(phase: str) -> None:
        if phase == "switching":
            bench.stub.models.clear()
            bench.stub.defaults.clear()

    with pytest.raises(StepError):
        run(bench.requests["2"], die)
    deploy_model(bench.requests["2"])
    assert bench.truth() == ("2", "2", [label(bench, "2")])
