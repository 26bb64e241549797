"""May this model serve? A decision from numbers alone, with a sentence for every rule that was looked at.

Pure: no file, no server, no clock, so the same numbers always give the same decision. The rules, in order: every metric
of the candidate is a finite number; the gate's metric is there; it meets `minimum`; it is not worse than the champion's
(on the same held-out data) by more than `tolerance`; a resume certificate, where one is required, belongs to these
weights. With `higher_is_better = false` the bound is the largest value allowed, and `minimum = None` means no bound.
Not covered: where the numbers come from (tasks.register_model) and what the endpoint answers (tasks.check_endpoint).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import ConfigError, GiveUp

# MLflow stores infinity as the largest double, so that a value read back from it looks finite and is not.
LARGEST = 1.7976931348623157e308


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The rules of `[gate]` in pipeline.toml. `minimum` and `tolerance` are in the metric's own unit."""

    metric: str = "accuracy"
    minimum: float | None = 0.0
    higher_is_better: bool = True
    tolerance: float = 0.0
    require_resume_certificate: bool = False

    def __post_init__(self) -> None:
        if not self.metric or not isinstance(self.metric, str):
            raise ConfigError(f"gate.metric = {self.metric!r}: expected the name of a metric, such as 'accuracy'")
        if self.minimum is not None and not is_finite(self.minimum):
            raise ConfigError(f"gate.minimum = {self.minimum!r}: expected a finite number")
        if not is_finite(self.tolerance) or self.tolerance < 0:
            raise ConfigError(f"gate.tolerance = {self.tolerance!r}: expected a finite number of at least 0")
        for name in ("higher_is_better", "require_resume_certificate"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"gate.{name} = {getattr(self, name)!r}: expected true or false")

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Gate:
        """The rules from a table. Raises ConfigError naming an unknown key or a wrong value."""
        known = (
            "metric",
            "minimum",
            "higher_is_better",
            "tolerance",
            "require_resume_certificate",
        )
        if unknown := sorted(set(raw) - set(known)):
            raise ConfigError(f"gate.{unknown[0]} = {raw[unknown[0]]!r}: unknown key; known: {', '.join(known)}")
        return cls(**raw)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, with the numbers. `refusals` is empty exactly when the model is accepted."""

    accepted: bool
    metric: str
    value: float | None  # the candidate's; None when it is missing or no finite number
    minimum: float | None
    higher_is_better: bool
    tolerance: float
    champion_version: str = ""  # empty: there is no champion
    champion_value: float | None = None
    heldout_digest: str = ""
    sentences: list[str] = field(default_factory=list)  # one per rule that was looked at
    refusals: list[str] = field(default_factory=list)  # those of them that say no


def is_finite(value: Any) -> bool:
    """Whether `value` is a finite number (True and False are not numbers here)."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < LARGEST
    )


def decide(
    *,
    gate: Gate,
    metrics: Mapping[str, Any],
    heldout_digest: str,
    champion: Mapping[str, Any] | None = None,
    certificate: Mapping[str, Any] | None = None,
    training_keys: tuple[str, ...] = (),
    weights_sha256: str = "",
) -> Decision:
    """Accept or refuse a candidate.

    `metrics` are the candidate's on the held-out data of `heldout_digest`; `champion` is {"version", "metrics",
    "heldout_digest"} of the version in service. `certificate` is the resume proof: {"key", "weights_sha256",
    "identical"}; its key must be one of `training_keys`. Raises GiveUp when the champion was measured on other data:
    those two numbers say nothing about each other.
    """
    said: list[str] = []
    no: list[str] = []

    def rule(ok: bool, sentence: str) -> None:
        said.append(sentence)
        if not ok:
            no.append(sentence)

    for name, found in sorted(metrics.items()):
        if not is_finite(found):
            rule(False, f"metric {name!r} is {found!r}, which is no finite number")
    value = _value(metrics, gate.metric)
    if gate.metric not in metrics:
        there = ", ".join(sorted(metrics)) or "none"
        rule(
            False,
            f"metric {gate.metric!r} (gate.metric) was not measured; the metrics there are: {there}",
        )
    if value is not None and gate.minimum is not None:
        ok = value >= gate.minimum if gate.higher_is_better else value <= gate.minimum
        sign = (">=" if ok else "<") if gate.higher_is_better else ("<=" if ok else ">")
        bound = "minimum" if gate.higher_is_better else "largest value allowed"
        rule(
            ok,
            f"{gate.metric} {value:.6g} {sign} {gate.minimum:.6g} (gate.minimum, the {bound})",
        )
    version, theirs = "", None
    if champion:
        version, theirs = (
            str(champion.get("version", "")),
            _value(champion.get("metrics", {}), gate.metric),
        )
        if champion.get("heldout_digest") != heldout_digest:
            raise GiveUp(
                f"champion version {version} was measured on held-out data {champion.get('heldout_digest')!r}, the "
                f"candidate on {heldout_digest!r}: evaluate the champion again on the candidate's held-out data"
            )
        rule(*_against(gate, value, version, champion.get("metrics", {})))
    else:
        said.append("there is no champion to compare with")
    if gate.require_resume_certificate or certificate:
        rule(*_certificate(certificate, training_keys, weights_sha256))
    return Decision(
        accepted=not no,
        metric=gate.metric,
        value=value,
        minimum=gate.minimum,
        higher_is_better=gate.higher_is_better,
        tolerance=gate.tolerance,
        champion_version=version,
        champion_value=theirs,
        heldout_digest=heldout_digest,
        sentences=said,
        refusals=no,
    )


def _value(metrics: Mapping[str, Any], name: str) -> float | None:
    found = metrics.get(name)
    return float(found) if is_finite(found) and found is not None else None


def _against(gate: Gate, value: float | None, version: str, metrics: Mapping[str, Any]) -> tuple[bool, str]:
    """The rule about the champion: (fulfilled, sentence)."""
    if gate.metric not in metrics:
        there = ", ".join(sorted(metrics)) or "none"
        return (
            False,
            f"champion version {version} has no metric {gate.metric!r}; the metrics there are: {there}",
        )
    theirs = _value(metrics, gate.metric)
    if value is None:
        return (
            False,
            f"{gate.metric} cannot be compared with champion version {version}: the candidate has no value",
        )
    if theirs is None:
        return (
            True,
            f"champion version {version} has {gate.metric} {metrics[gate.metric]!r}, which any number beats",
        )
    worse_by = (theirs - value) if gate.higher_is_better else (value - theirs)
    # A tolerance of 0.01 must let 0.97 - 0.96 pass, which in binary is a little more than 0.01.
    ok = worse_by <= gate.tolerance or math.isclose(worse_by, gate.tolerance, rel_tol=1e-9, abs_tol=1e-12)
    if worse_by <= 0:
        how = "is as good" if worse_by == 0 else "is better"
    else:
        how = f"is worse by {worse_by:.6g}, {'within' if ok else 'more than'} the tolerance of {gate.tolerance:.6g}"
    return (
        ok,
        f"{gate.metric} {value:.6g} against {theirs:.6g} of champion version {version}: {how}",
    )


def _certificate(
    certificate: Mapping[str, Any] | None,
    training_keys: tuple[str, ...],
    weights_sha256: str,
) -> tuple[bool, str]:
    """The rule about the proof that resuming changed nothing: (fulfilled, sentence)."""
    if not certificate:
        return (
            False,
            "gate.require_resume_certificate = true and there is no certificate; run `reprise verify-resume`",
        )
    if certificate.get("key") not in training_keys:
        expected = " or ".join(k for k in training_keys if k) or "this training's key"
        return (
            False,
            f"the resume certificate is for training {certificate.get('key')!r}; expected {expected}",
        )
    if certificate.get("weights_sha256") != weights_sha256:
        found = certificate.get("weights_sha256")
        return (
            False,
            f"the resume certificate is for weights {found!r}; expected {weights_sha256}",
        )
    if certificate.get("identical") is not True:
        return (
            False,
            "the resume certificate says that the resumed training was not identical",
        )
    return True, "the resume certificate is for these weights"
