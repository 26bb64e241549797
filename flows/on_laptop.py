"""The place "laptop" as the flow sees it: services on loopback, steps as processes, a spot market that is played.

Not covered: the interface (flows.place), starting the services (flows.services).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.cluster_target import ClusterTarget
from deployments.workload import Resources, Runner
from flows.fetch import fetch_revision
from flows.place_settings import PlaceSettings, ResourceSettings, SpotSettings
from flows.project import Project
from flows.services import ensure_services, in_service, prefect_environment, restore_endpoints, service_urls
from tasks.records import Store


@dataclass(frozen=True, kw_only=True)
class OnLaptop:
    """This machine; implements `Place`."""

    settings: PlaceSettings
    outlives_flow: bool = False  # told to leave, the machine goes

    @property
    def kind(self) -> str:
        """As `Place`."""
        return self.settings.kind

    @property
    def state(self) -> Path:
        """As `Place`."""
        return self.settings.state

    @property
    def store(self) -> Store:
        """As `Place`."""
        return Store(root=str(self.state / "store"))

    @property
    def urls(self) -> dict[str, str]:
        """As `Place`."""
        return service_urls(self.settings)

    @property
    def pages(self) -> dict[str, str]:
        """As `Place`."""
        return self.urls

    @property
    def spot(self) -> SpotSettings:
        """As `Place`."""
        return self.settings.spot

    @property
    def resources(self) -> ResourceSettings:
        """As `Place`."""
        return self.settings.resources

    @property
    def target(self) -> ClusterTarget | None:
        """As `Place`."""
        return None

    def wanted(self, step: str) -> Resources:
        """As `Place`: steps share the machine."""
        return Resources()

    def runner(self, interruptions: Sequence[str] = ()) -> Runner:
        """As `Place`."""
        from deployments.laptop import Laptop
        from deployments.spot_market import SpotMarket

        wanted = tuple(interruptions) or tuple(str(i) for i in self.spot.interruptions)
        market = SpotMarket(interruptions=list(wanted), grace_seconds=self.spot.grace) if wanted else None
        return Laptop(self.state / "jobs", market=market)

    def leave(self, runner: Runner) -> None:
        """As `Place`: here they do not."""

    def ensure(self, *, quiet: bool = False) -> None:
        """As `Place`: starts what does not run."""
        ensure_services(self.settings, quiet=quiet)

    def restore(self) -> None:
        """As `Place`: TorchServe forgets."""
        restore_endpoints(self.settings, self.store)

    def in_service(self, pipeline: str) -> str:
        """As `Place`."""
        return in_service(self.urls["management"], pipeline)

    def prepare_client(self) -> None:
        """As `Place`."""
        prefect_environment(self.settings)

    def bring(self, pipeline: str, rev: str) -> tuple[Path, str]:
        """As `Place`: the project is here; "origin/main" is fetched."""
        file = Path(pipeline)
        fetch_revision(Project(file.parent), rev)
        return file, rev
