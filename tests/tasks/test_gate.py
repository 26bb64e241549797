"""The gate: every rule accepts and refuses where it should, and says so with the numbers."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.errors import ConfigError, GiveUp
from tasks.gate import Decision, Gate, decide

SHA = "ab" * 32


def ask(metrics: dict[str, Any], *, champion: dict[str, Any] | None = None, **rules: Any) -> Decision:
    """A decision on held-out data 'd1'."""
    return decide(gate=Gate.read(rules), metrics=metrics, heldout_digest="d1", champion=champion)


def champion(digest: str = "d1", **metrics: Any) -> dict[str, Any]:
    return {"version": "3", "metrics": metrics, "heldout_digest": digest}


def test_first_model_is_judged_by_the_minimum_alone() -> None:
    good = ask({"accuracy": 0.97, "loss": 0.1}, minimum=0.95)
    assert good.accepted and good.value == 0.97 and good.champion_version == ""
    assert good.sentences == [
        "accuracy 0.97 >= 0.95 (gate.minimum, the minimum)",
        "there is no champion to compare with",
    ]
    assert ask({"accuracy": 0.95}, minimum=0.95).accepted, "the bound itself is good enough"
    bad = ask({"accuracy": 0.94}, minimum=0.95)
    assert not bad.accepted and bad.refusals == ["accuracy 0.94 < 0.95 (gate.minimum, the minimum)"]


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        float("-inf"),
        1.7976931348623157e308,
        None,
        "0.9",
        True,
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "loss"])
def test_any_metric_that_is_no_finite_number_refuses(name: str, value: Any) -> None:
    decision = ask({"accuracy": 0.99, "loss": 0.1} | {name: value}, champion=champion(accuracy=0.5))
    assert not decision.accepted
    assert f"metric {name!r} is {value!r}" in decision.refusals[0]


def test_missing_metric_lists_those_there_are() -> None:
    decision = ask({"loss": 0.1, "f1": 0.9})
    assert decision.refusals == ["metric 'accuracy' (gate.metric) was not measured; the metrics there are: f1, loss"]
    assert "the metrics there are: none" in ask({}).refusals[0]


@pytest.mark.parametrize(
    ("mine", "theirs", "tolerance", "accepted", "words"),
    [
        (0.97, 0.96, 0.0, True, "is better"),
        (0.96, 0.96, 0.0, True, "is as good"),
        (0.95, 0.96, 0.0, False, "is worse by 0.01, more than the tolerance of 0"),
        (0.96, 0.97, 0.01, True, "is worse by 0.01, within the tolerance of 0.01"),
        (0.95, 0.97, 0.01, False, "is worse by 0.02, more than the tolerance of 0.01"),
    ],
)
def test_no_worse_than_the_champion(mine: float, theirs: float, tolerance: float, accepted: bool, words: str) -> None:
    decision = ask({"accuracy": mine}, champion=champion(accuracy=theirs), tolerance=tolerance)
    assert decision.accepted is accepted
    assert f"against {theirs:g} of champion version 3: {words}" in decision.sentences[-1]
    assert (decision.champion_version, decision.champion_value) == ("3", theirs)


def test_lower_is_better_turns_bound_and_champion_round() -> None:
    rules = {"metric": "loss", "higher_is_better": False, "minimum": 0.5}
    assert ask({"loss": 0.4}, champion=champion(loss=0.45), **rules).accepted
    worse = ask({"loss": 0.48}, champion=champion(loss=0.45), **rules)
    assert len(worse.refusals) == 1 and "worse by 0.03" in worse.refusals[0]
    over = ask({"loss": 0.6}, **rules)
    assert over.refusals == ["loss 0.6 > 0.5 (gate.minimum, the largest value allowed)"]
    assert ask({"loss": 9.0}, metric="loss", higher_is_better=False, minimum=None).accepted


def test_champion_of_other_data_cannot_be_compared() -> None:
    with pytest.raises(
        GiveUp,
        match="version 3 was measured on held-out data 'd0', the candidate on 'd1'",
    ):
        ask({"accuracy": 0.9}, champion=champion("d0", accuracy=0.1))


def test_champion_without_the_metric_refuses_and_with_nan_does_not() -> None:
    assert (
        "has no metric 'accuracy'; the metrics there are: loss"
        in ask({"accuracy": 0.9}, champion=champion(loss=1.0)).refusals[0]
    )
    assert ask({"accuracy": 0.9}, champion=champion(accuracy=float("nan"))).accepted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"key": "k9"}, "is for training 'k9'; expected k1"),
        ({"weights_sha256": "ff"}, f"is for weights 'ff'; expected {SHA}"),
        ({"identical": False}, "was not identical"),
        ({"identical": "yes"}, "was not identical"),
    ],
)
def test_resume_certificate(change: dict[str, Any], words: str) -> None:
    proof = {"key": "k1", "weights_sha256": SHA, "identical": True} | change
    for required in (
        True,
        False,
    ):  # a wrong certificate is refused even where none is asked for
        decision = decide(
            gate=Gate(require_resume_certificate=required),
            metrics={"accuracy": 0.9},
            heldout_digest="d1",
            certificate=proof,
            training_keys=("k1",),
            weights_sha256=SHA,
        )
        assert decision.accepted is (not words)
        assert words in "; ".join(decision.refusals)


def test_required_certificate_that_is_missing() -> None:
    assert "there is no certificate" in ask({"accuracy": 0.9}, require_resume_certificate=True).refusals[0]
    assert ask({"accuracy": 0.9}, require_resume_certificate=False).accepted


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"minimun": 0.9}, "gate.minimun = 0.9: unknown key; known: metric, minimum"),
        ({"minimum": float("nan")}, "gate.minimum = nan"),
        ({"tolerance": -0.1}, "gate.tolerance = -0.1"),
        ({"tolerance": float("inf")}, "gate.tolerance = inf"),
        ({"metric": ""}, "gate.metric = ''"),
        ({"higher_is_better": "yes"}, "gate.higher_is_better = 'yes'"),
        ({"require_resume_certificate": 1}, "gate.require_resume_certificate = 1"),
    ],
)
def test_wrong_rules_are_config_errors(rules: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        Gate.read(rules)
