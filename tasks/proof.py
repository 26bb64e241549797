"""A new version proves itself: golden requests to it, judged on answers, and a canary against the version in service.

Nothing is judged on the HTTP status alone: an answer has to be the torch model's, of the right version, from the files
of the .mar, and in time. Not covered: when it is asked (tasks.rollout), how two answers are compared (tasks.golden).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from deployments.errors import GiveUp
from deployments.serving import ModelServer
from tasks.endpoint import Version
from tasks.golden import Golden, judge


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a new version has to keep to. Seconds."""

    start_seconds: float = 120.0  # until its workers are READY
    soak_seconds: float = 1.0
    canary_samples: int = 0  # held-out samples asked of both versions; 0: the golden ones only
    min_agreement: float = 1.0  # of the new version's answers with its own torch model
    max_accuracy_drop: float = 0.05  # against the version in service, on the same labelled samples
    max_p95_seconds: float = 1.0
    request_seconds: float = 30.0
    server_logs: str = ""  # TorchServe's log folder, if it is on this machine


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What one version of one model has to answer. `content` is the digest over the files of its .mar."""

    server: ModelServer
    model: str
    target: Version
    content: str
    golden: list[Golden]
    limits: Limits

    def prove(self, *, pinned: bool, count: int | None = None) -> int:
        """Ask golden requests (the first `count`) of this version, or of the default one, and judge the answers.

        Returns how many were right. Raises GiveUp with the first wrong one, or if they are too slow.
        """
        golden, target = self.golden[:count], self.target
        slow, wrong = list[float](), list[str]()
        may_be_slow = len(golden) - math.ceil(0.95 * len(golden))  # more than these, and the p95 is over its limit
        label = target.label if pinned else ""
        if pinned:  # the first request pays for what torch sets up lazily, and would be the p95 of twenty
            self.server.predict(self.model, golden[0].body, label=label, timeout=self.limits.request_seconds)
        for sample in golden:
            taken, why = self.ask(sample, label)
            if why:
                wrong.append(f"{sample.name}: {why}")
            if taken > self.limits.max_p95_seconds:
                slow.append(taken)
            if len(slow) > may_be_slow:  # decided: a slow model need not be asked everything
                raise GiveUp(
                    f"{self.model} {target.label}: {len(slow)} golden requests took {min(slow):.3f} s and more; p95 of "
                    f"{len(golden)} may be {self.limits.max_p95_seconds:g} s"
                )
        share = 1 - len(wrong) / len(golden)
        if share < self.limits.min_agreement:
            raise GiveUp(
                f"{self.model} {target.label}: {len(wrong)} of {len(golden)} golden requests answered wrongly; "
                f"first {wrong[0]}"
            )
        return len(golden) - len(wrong)

    def ask(self, sample: Golden, label: str) -> tuple[float, str]:
        """One golden request: seconds, and what is wrong with the answer ("" for nothing)."""
        answer = self.server.predict(self.model, sample.body, label=label, timeout=self.limits.request_seconds)
        document = answer.document()
        if answer.status != 200:
            return answer.seconds, f"status {answer.status}: {answer.body.decode(errors='replace')[:300]}"
        for found, wanted, what in (
            (document.get("model_version"), self.target.version, "model_version"),
            (answer.headers.get("x-model-label"), self.target.label, "label"),
            (answer.headers.get("x-content-digest"), self.content, "digest of the served files"),
        ):
            if found != wanted:
                return answer.seconds, f"{what} {found!r}, expected {wanted!r}"
        return answer.seconds, judge(document, sample.answer, self.target.tolerance).why

    def canary(self, old: Version | None) -> None:
        """The version in service answers the same labelled samples; the new one must not be clearly worse.

        Both are judged on answers. What the new one answers equals its golden answers by now, so only the old one is
        asked. TorchServe cannot split traffic by share: the canary's share of real traffic is 0 here, and all of it
        after the switch. Raises GiveUp.
        """
        labelled = [sample for sample in self.golden if sample.label is not None]
        if old is None or not labelled or self.limits.canary_samples == 0:
            return
        right, asked = 0, 0
        for sample in labelled:
            answer = self.server.predict(self.model, sample.body, label=old.label, timeout=self.limits.request_seconds)
            if answer.status == 200:  # a request that only the new version understands says nothing about the old
                asked += 1
                right += answer.document().get("label") == sample.label
        before = right / asked if asked else 0.0
        after = sum(sample.answer["label"] == sample.label for sample in labelled) / len(labelled)
        if asked >= len(labelled) / 2 and after < before - self.limits.max_accuracy_drop:
            raise GiveUp(
                f"{self.model}: the new version is right on {after:.3f} of {len(labelled)} labelled samples, the one "
                f"in service on {before:.3f}; allowed is {self.limits.max_accuracy_drop:g} less"
            )
