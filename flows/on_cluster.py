"""The place "cluster" as a flow sees it from inside its pod: the state volume, Services by name, steps as Jobs.

Whoever starts a run from outside sees it through Prefect (flows.submit). Not covered: the interface (flows.place), the
checkout on the volume (flows.checkout), what the pod is started with (flows.cluster_deployment).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.cluster_target import ClusterTarget, in_service
from deployments.errors import ConfigError, PreflightError
from deployments.workload import Resources, Runner
from flows.cluster_settings import ClusterResourceSettings, ClusterSettings, ClusterSpot
from tasks.records import Store

GIT_VARIABLE = "REPRISE_GIT"  # in a flow's pod: the URL that the project is cloned from


@dataclass(frozen=True, kw_only=True)
class OnCluster:
    """A pod of the cluster; implements `Place`."""

    settings: ClusterSettings
    outlives_flow: bool = True  # steps have pods of their own, and a flow that is moved adopts them

    @property
    def kind(self) -> str:
        """As `Place`."""
        return self.settings.kind

    @property
    def state(self) -> Path:
        """As `Place`: the volume, mounted alike in every pod."""
        return Path(self.settings.state.mount)

    @property
    def store(self) -> Store:
        """As `Place`."""
        return Store(root=str(self.state / "store"))

    @property
    def urls(self) -> dict[str, str]:
        """As `Place`. A served model has a Service of its own, whose address its rollout tells."""
        services = self.settings.services
        return {"prefect": services.prefect, "mlflow": services.mlflow, "inference": "", "management": ""}

    @property
    def pages(self) -> dict[str, str]:
        """As `Place`."""
        services = self.settings.services
        return {
            "prefect": services.prefect_outside or services.prefect,
            "mlflow": services.mlflow_outside or services.mlflow,
        }

    @property
    def spot(self) -> ClusterSpot:
        """As `Place`."""
        return self.settings.spot

    @property
    def resources(self) -> ClusterResourceSettings:
        """As `Place`."""
        return self.settings.resources

    @property
    def target(self) -> ClusterTarget | None:
        """As `Place`; asked with the pod's own account."""
        return ClusterTarget(
            place=self.settings.cluster_place(),
            replicas=self.settings.serving.replicas,
            resources=self.wanted("serve"),
        )

    def wanted(self, step: str) -> Resources:
        """As `Place`."""
        return self.settings.resources.by_step()[step]

    def runner(self, interruptions: Sequence[str] = ()) -> Runner:
        """As `Place`. Raises ConfigError for interruptions: a cluster has a spot market of its own."""
        from deployments.cluster import Cluster

        if interruptions:
            raise ConfigError(f"--interrupt {interruptions[0]}: only a laptop plays the spot market; leave it out")
        return Cluster(self.settings.cluster_place(), lost_node_seconds=self.settings.nodes.lost_after * 5)

    def leave(self, runner: Runner) -> None:
        """As `Place`: the thread that waits for a step ends, or the pod would use up its grace."""
        from deployments.cluster import Cluster

        if isinstance(runner, Cluster):
            runner.close()

    def ensure(self, *, quiet: bool = False) -> None:
        """As `Place`: others start them; what must be here is the volume, and writable."""
        if not (self.state.is_dir() and os.access(self.state, os.W_OK | os.X_OK)):
            raise PreflightError(
                f"{self.state}: no folder that this process may write to; expected the state volume, claim "
                f"{self.settings.state.claim} of [state]: mount it there in the work pool's job template"
            )

    def restore(self) -> None:
        """As `Place`: Kubernetes keeps the Deployments."""

    def in_service(self, pipeline: str) -> str:
        """As `Place`."""
        target = self.target
        return in_service(target, pipeline) if target is not None else ""

    def prepare_client(self) -> None:
        """As `Place`: Prefect's worker has told it."""

    def bring(self, pipeline: str, rev: str) -> tuple[Path, str]:
        """As `Place`: the project's clone on the volume, made if it is not there."""
        from prefect import runtime

        from flows.checkout import checkout

        url = os.environ.get(GIT_VARIABLE) or self.settings.project.git
        if not url:
            raise ConfigError(
                f"no git URL of the project; expected [project] git in cluster.toml or {GIT_VARIABLE} in the flow's pod"
            )
        self.ensure()
        name = str(runtime.deployment.name or "project")
        return checkout(url, self.state / "projects" / name, Path(pipeline), rev)
