"""One version after another in service on a cluster: a rolling update whose pods prove themselves, as a transaction.

The order: canary against the version in service, apply Service, budget and Deployment, wait until every pod is a new
one (a pod gets traffic only when it has answered its golden requests, and no ready pod leaves before that), golden
requests through the Service, soak, alias, commit. Going back is applying the recorded version again, with the image and
resources it was proved with; where nothing served before, the objects are deleted.
Not covered: record, commit and undoing (tasks.transaction), what is inside the pods (deployments.serving_pod), several
versions at once: the canary's share of real traffic is 0 before the update, and grows pod by pod during it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from deployments.cluster_place import ClusterPlace
from deployments.cluster_serving import Rollouts
from deployments.cluster_target import ClusterTarget
from deployments.errors import GiveUp, TryAgain
from deployments.pod_template import Manifest
from deployments.serving import ModelServer
from deployments.serving_manifests import Serving, serving_name, serving_objects
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord, Version
from tasks.proof import Limits, Proof
from tasks.step import from_json
from tasks.transaction import commit, note, proof_of

SETTLED = 8  # answers of the new version in a row: every proxy on the way has forgotten the old pods
POLL = 0.1  # seconds


class RollingUpdate:
    """A `Change` (tasks.transaction) of the pods of one pipeline. `on_phase` hears of every transition."""

    def __init__(
        self,
        rollouts: Rollouts,
        cluster: ClusterTarget,
        server: ModelServer,
        champion: Champion,
        record: EndpointRecord,
        limits: Limits,
        *,
        on_phase: Callable[[str], None] = lambda phase: None,
    ):
        """`server`: the pipeline's Service, asked without a label; it has one version in each pod."""
        self.rollouts, self.cluster, self.server = rollouts, cluster, server
        self.champion, self.record, self.limits = champion, record, limits
        self.model, self.name = record.pipeline, serving_name(record.pipeline)
        self.on_phase = on_phase

    def proof(self, target: Version, samples: int) -> Proof:
        """What the target has to answer. Raises GiveUp if its archive or its golden answers are damaged."""
        return proof_of(self, self.server, target, samples)

    def prove_and_switch(self, target: Version, proof: Proof) -> int:
        """From the canary to the commit."""
        if self.available():
            proof.canary(self.record.serving())
        note(self, "applying")
        self.apply(target)
        self.on_phase("applied")
        note(self, "rolling")
        self.roll(target)
        note(self, "proving")
        self.settle(target, proof)
        passed = proof.prove(pinned=False)
        note(self, "soaking")
        passed += self.soak(target, proof)
        commit(self, target)
        return passed

    def apply(self, version: Version) -> None:
        """Service, budget and Deployment as this version wants them; no effect if they are so."""
        for item in self.objects(version):
            self.rollouts.apply(item)

    def objects(self, version: Version) -> list[Manifest]:
        """What this version wants to be there, in the order in which it is applied."""
        return serving_objects(*self.serving(version))

    def roll(self, target: Version) -> None:
        """Wait until every pod is of this version and ready. Raises GiveUp with what holds them."""
        state = self.rollouts.wait(
            self.name, seconds=self.seconds(target), patience=self.target(target).patience_seconds
        )
        if not state.complete:
            raise GiveUp(f"{self.model} {target.label}: {state.reason}")

    def settle(self, target: Version, proof: Proof) -> None:
        """Wait until the Service answers with this version alone: proxies forget a pod some seconds after it left."""
        asked, row, other = proof.golden[0], 0, ""
        give_up = time.monotonic() + self.target(target).drain_seconds + self.limits.request_seconds
        while row < SETTLED:
            try:
                answer = self.server.predict(self.model, asked.body, timeout=self.limits.request_seconds)
                seen = answer.headers.get("x-model-label", f"status {answer.status}")
            except TryAgain as error:
                seen = str(error)
            row, other = (row + 1, other) if seen == target.label else (0, seen)
            if time.monotonic() > give_up:
                raise TryAgain(f"{self.model} {target.label}: every pod is new, and the Service still answers: {other}")
            if row == 0:
                time.sleep(POLL)

    def soak(self, target: Version, proof: Proof) -> int:
        """With all real traffic on it, the new version keeps answering rightly and its pods run on. Raises GiveUp."""
        end, passed, before = time.monotonic() + self.limits.soak_seconds, 0, self.rollouts.restarts(self.name)
        while True:
            passed += proof.prove(pinned=False, count=target.golden_count)
            if time.monotonic() >= end:
                break
            time.sleep(min(0.2, max(0.0, end - time.monotonic())))
        if self.rollouts.restarts(self.name) > before:
            raise GiveUp(f"{self.model} {target.label}: a pod died within the soak of {self.limits.soak_seconds:g} s")
        return passed

    def restore(self) -> None:
        """Nothing: where the Deployment is gone, the new version's pods are as quick as the old one's."""

    def reconcile(self) -> None:
        """Make Deployment and alias equal the record. Raises TryAgain if the recorded version's pods are not ready."""
        serving = self.record.serving()
        transaction = self.record.read()["transaction"]
        if serving:
            self.apply(serving)
            if self.champion.read() != serving.version:
                self.champion.move(serving.version)
            state = self.rollouts.wait(self.name, seconds=self.seconds(serving), patience=self.seconds(serving))
            if not state.complete:
                raise TryAgain(f"{self.model} {serving.label} is applied again and not ready: {state.reason}")
        else:
            self.rollouts.delete(self.name, seconds=self.cluster.drain_seconds + self.limits.request_seconds + 60)
            if transaction and self.champion.read() != transaction["alias_before"]:
                self.champion.move(transaction["alias_before"])
        self.on_phase("reconciled")

    def holds(self, target: Version) -> bool:
        """Whether the pods are all of this version, available, and the objects as this version wants them."""
        if self.rollouts.find(self.name) is None or not self.rollouts.state(self.name).complete:
            return False
        return not any(self.rollouts.drift(item) for item in self.objects(target))

    def available(self) -> bool:
        """Whether any pod of the pipeline serves now."""
        live = self.rollouts.find(self.name)
        return live is not None and int((live.get("status") or {}).get("availableReplicas", 0)) > 0

    def serving(self, version: Version) -> tuple[Serving, ClusterPlace]:
        """What the manifests are made of: the version, with the image and resources it is recorded with."""
        made = self.target(version)
        serving = Serving(
            pipeline=self.model,
            version=version.version,
            label=version.label,
            mar=version.mar,
            sha256=version.sha256,
            golden=version.golden,
            golden_count=version.golden_count,
            replicas=made.replicas,
            resources=made.resources,
            start_seconds=made.start_seconds,
            response_timeout=float(version.serve.get("response_timeout_seconds", 30)),
            drain_seconds=made.drain_seconds,
            soak_seconds=made.ready_seconds,
        )
        return serving, replace(made.place, namespace=self.cluster.place.namespace)

    def target(self, version: Version) -> ClusterTarget:
        """How this version is put on the cluster."""
        if not version.cluster:
            return self.cluster
        made: ClusterTarget = from_json(ClusterTarget, version.cluster, where=f"{self.model} {version.label}: cluster")
        return made

    def seconds(self, version: Version) -> float:
        """The longest that a rollout of it may take: one pod after the other, each in its time."""
        made, live = self.target(version), self.rollouts.find(self.name)
        pods = max(made.replicas, int(((live or {}).get("spec") or {}).get("replicas", 0)))
        return (made.start_seconds + made.ready_seconds + 30) * max(1, pods)
