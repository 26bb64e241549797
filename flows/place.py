"""Where a run happens, as the flow sees it: one interface, with a laptop and a cluster behind it.

    place = open_place(order.place, folder)      # flows.on_laptop or flows.on_cluster

Everything that differs between places is asked here, so that the pipeline, its steps and its records are the same on
both. Not covered: the settings files (flows.place_settings, flows.cluster_settings), running a workload (deployments).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from deployments.cluster_target import ClusterTarget
from deployments.workload import Resources, Runner
from flows.cluster_settings import ClusterResources, ClusterSpot, load_cluster, parse_cluster
from flows.place_settings import SpotSettings, StepResources, kind_of, load_place, read_place
from tasks.records import Store

CLUSTER_VARIABLE = "REPRISE_CLUSTER"  # in a flow's pod: the text of the cluster.toml that its deployment was made with


class TrainingResources(Protocol):
    """[resources] of any place."""

    @property
    def train_model(self) -> StepResources | ClusterResources: ...


class Place(Protocol):
    """One place, opened. Nothing is started by opening it."""

    @property
    def kind(self) -> str:
        """laptop | cluster"""

    @property
    def state(self) -> Path:
        """The folder of jobs, store, cache and data, under the same name for the flow and its steps."""

    @property
    def store(self) -> Store:
        """The records of its runs."""

    @property
    def urls(self) -> dict[str, str]:
        """Of the services, as the flow and its steps reach them: prefect, mlflow, inference, management."""

    @property
    def pages(self) -> dict[str, str]:
        """Of Prefect and MLflow, as a person's browser reaches them."""

    @property
    def spot(self) -> SpotSettings | ClusterSpot:
        """[spot]"""

    @property
    def resources(self) -> TrainingResources:
        """[resources]"""

    @property
    def outlives_flow(self) -> bool:
        """Whether steps go on when the flow's process is told to leave its machine."""

    def wanted(self, step: str) -> Resources:
        """What a step's program asks for."""

    def runner(self, interruptions: Sequence[str] = ()) -> Runner:
        """What runs workloads there. `interruptions`: of a laptop's spot market; none: those of its settings."""

    def leave(self, runner: Runner) -> None:
        """Wait for nothing any more, where steps go on without their flow."""

    def ensure(self, *, quiet: bool = False) -> None:
        """Make sure that the services can be used, or raise PreflightError."""

    def restore(self) -> None:
        """Put back what was in service before the services stopped, where they forget it."""

    def in_service(self, pipeline: str) -> str:
        """The label of the version that is served; "" if none, or if the server is away."""

    @property
    def target(self) -> ClusterTarget | None:
        """Where a step puts a model into service if that is a Deployment; None if it is the TorchServe of `urls`."""

    def prepare_client(self) -> None:
        """Tell Prefect's client, before it is imported, whatever it must know of this place."""

    def bring(self, pipeline: str, rev: str) -> tuple[Path, str]:
        """The pipeline file and the revision to resolve there, whatever has to be fetched for it. Raises TryAgain."""


def open_place(place: str, folder: Path) -> Place:
    """The place of that name, as seen from the project folder. Raises ConfigError with all mistakes of its file."""
    from flows.on_cluster import OnCluster
    from flows.on_laptop import OnLaptop

    if text := os.environ.get(CLUSTER_VARIABLE):
        return OnCluster(settings=parse_cluster(text, CLUSTER_VARIABLE))
    if is_cluster(place, folder):
        return OnCluster(settings=load_cluster(place, folder))
    return OnLaptop(settings=load_place(place, folder))


def is_cluster(place: str, folder: Path) -> bool:
    """Whether a place's file says that it is a cluster. Raises ConfigError for a place that is not known."""
    return kind_of(read_place(place, folder)[1]) == "cluster"
