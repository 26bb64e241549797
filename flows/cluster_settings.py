"""What cluster.toml may say, and the `ClusterPlace` that manifests and preflight take from it.

    cluster = load_cluster("cluster", folder)       # deployments/cluster.toml, or folder/cluster.toml
    cluster.cluster_place()                         # deployments.cluster_place.ClusterPlace

Read by every command with `--place cluster` and by the flow's pod; nothing is asked of the cluster here.
Not covered: which file a name means (flows.place_settings), what lives long in the cluster (deployments/k8s).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from deployments.cluster_place import FORBIDDEN_TOLERATION, ClusterPlace
from deployments.manifests import NOTICE_SECONDS
from deployments.workload import Resources
from flows.place_settings import StepResources, kind_of, read_place
from flows.setting_types import Count, CountOrZero, Duration, Section, as_tuple
from flows.settings_errors import SettingsText, check, read_file, read_toml
from tasks.capacity import CapacityPolicy

Text = Annotated[str, Field(min_length=1)]
Names = Annotated[tuple[Text, ...], BeforeValidator(as_tuple)]
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


class ClusterSection(Section):
    """[place] of a cluster."""

    kind: Literal["cluster"]
    namespace: Text = "reprise"
    kubeconfig: str = ""  # empty: $KUBECONFIG, ~/.kube/config, or the pod's own account
    context: str = ""  # empty: the kubeconfig's current one
    work_pool: Text = "reprise"  # Prefect's, of type kubernetes, whose worker starts flows
    service_account: Text = "reprise-step"
    priority_class: str = ""
    queue: str = ""  # Kueue's LocalQueue
    keep_finished: Duration = 86400.0  # seconds until a finished object is removed

    @field_validator("namespace")
    @classmethod
    def _label(cls, value: str) -> str:
        if not _LABEL.fullmatch(value):
            raise ValueError("expected a namespace: at most 63 of a-z, 0-9 and '-', no '-' at the ends")
        return value


class StateSettings(Section):
    """[state]: the ReadWriteMany volume that all pods share."""

    claim: Text = "reprise"
    mount: Text = "/reprise"

    @field_validator("mount")
    @classmethod
    def _absolute(cls, value: str) -> str:
        path = PurePosixPath(value)
        if not path.is_absolute() or str(path) in ("/", "/tmp") or ".." in path.parts:
            raise ValueError('expected an absolute folder of its own in every pod, such as "/reprise"')
        return str(path)


class ImageSettings(Section):
    """[images]: one for each extra of pyproject.toml; best with a digest."""

    flow: str = ""
    step: Text
    train: Text
    serve: str = ""
    pull_secrets: Names = ()
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"


class ServiceSettings(Section):
    """[services]: as pods reach them."""

    prefect: Text = "http://prefect.reprise-services:4200"
    mlflow: Text = "http://mlflow.reprise-services:5000"
    prefect_outside: str = ""  # as the machine of `reprise run` and browsers reach it; empty: as pods do
    mlflow_outside: str = ""

    @field_validator("*")
    @classmethod
    def _url(cls, value: str, info: ValidationInfo) -> str:
        if not value and str(info.field_name).endswith("_outside"):
            return value
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
            raise ValueError("expected a URL that pods reach, such as http://mlflow.reprise-services:5000")
        return value.rstrip("/")


class ProjectSettings(Section):
    """[project]"""

    git: str = ""  # as pods reach it; empty: the remote `origin` of the checkout that a run is started from


class EnvironmentSettings(Section):
    """[environment] of every pod. Secrets by the name of the Secret only."""

    secrets: Names = ()
    values: dict[str, str] = Field(default_factory=dict)


class ClusterSpot(Section):
    """[spot]: the cluster's own spot market."""

    train: bool = True  # trainings go to spot capacity; false: on-demand
    grace: Duration = 90.0  # seconds from SIGTERM to SIGKILL
    fallback: bool = True  # the next attempt asks for on-demand where spot fails the training
    fallback_after: CountOrZero = 3  # interruptions on spot; 0: they alone are never a reason
    wait: Duration = 900.0  # seconds until an attempt without a node is given up; 0: never
    margin: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.5  # time to the deadline / training left

    def policy(self) -> CapacityPolicy:
        """As the loop over attempts takes it."""
        return CapacityPolicy(
            spot=self.train,
            fallback=self.fallback,
            fallback_after=self.fallback_after,
            start_seconds=self.wait or None,
            margin=self.margin,
        )

    @field_validator("grace")
    @classmethod
    def _within_the_notice(cls, value: float) -> float:
        if not 1 <= value < NOTICE_SECONDS:
            raise ValueError(
                f"expected at least 1s and less than {NOTICE_SECONDS}s, the notice of a cloud: a longer save is cut off"
            )
        return value


class Toleration(Section):
    """[[nodes.tolerations]]: one taint that training pods bear."""

    key: Text
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""

    @field_validator("key")
    @classmethod
    def _harmless(cls, value: str) -> str:
        if value == FORBIDDEN_TOLERATION:
            raise ValueError("expected another taint: pods that tolerate this one are killed without a notice")
        return value


class NodeSettings(Section):
    """[nodes]: where pods go. Selectors are labels of nodes."""

    spot: dict[str, str] = Field(default_factory=lambda: {"karpenter.sh/capacity-type": "spot"})
    on_demand: dict[str, str] = Field(default_factory=lambda: {"karpenter.sh/capacity-type": "on-demand"})
    gpu: dict[str, str] = Field(default_factory=dict)
    gpu_taint: Text = "nvidia.com/gpu"
    autoscaler: Literal["look", "yes", "no"] = "look"  # what adds nodes beside Karpenter
    tolerations: Annotated[tuple[Toleration, ...], BeforeValidator(as_tuple)] = ()
    nccl_interface: str = ""
    lost_after: Duration = 60.0  # seconds; a node that does not answer is given up after that


class ClusterResources(StepResources):
    """[resources.STEP] of a cluster."""

    gpu_resource: Text = "nvidia.com/gpu"  # or a MIG slice: nvidia.com/mig-1g.10gb

    def wanted(self) -> Resources:
        """As manifests take them."""
        return Resources(**self.model_dump(include=set(ClusterResources.model_fields)))


class TrainResources(ClusterResources):
    """[resources.train_model]: of each node's pod, and how many of those."""

    nodes: Count = 1  # share [train] workers evenly; with several, the first holds the rendezvous on on-demand capacity


class ClusterResourceSettings(Section):
    """[resources]: by step; `serve` is each pod of the served model."""

    pull_data: ClusterResources = ClusterResources()
    train_model: TrainResources = TrainResources()
    register_model: ClusterResources = ClusterResources()
    package_model: ClusterResources = ClusterResources()
    deploy_model: ClusterResources = ClusterResources()
    check_endpoint: ClusterResources = ClusterResources()
    write_report: ClusterResources = ClusterResources()
    serve: ClusterResources = ClusterResources(memory="2Gi")

    def by_step(self) -> dict[str, Resources]:
        """Step -> what it asks for."""
        return {name: getattr(self, name).wanted() for name in type(self).model_fields}


class ServingSettings(Section):
    """[serving]: the served model's Deployment."""

    replicas: Count = 2


class _ClusterFile(Section):
    place: ClusterSection
    images: ImageSettings
    state: StateSettings = StateSettings()
    project: ProjectSettings = ProjectSettings()
    services: ServiceSettings = ServiceSettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    spot: ClusterSpot = ClusterSpot()
    nodes: NodeSettings = NodeSettings()
    resources: ClusterResourceSettings = ClusterResourceSettings()
    serving: ServingSettings = ServingSettings()


class ClusterSettings(_ClusterFile):
    """One cluster.toml, checked."""

    file: Path
    text: str  # of the file, for whoever reads it again elsewhere

    @property
    def kind(self) -> Literal["cluster"]:
        """As `PlaceSettings.kind`."""
        return self.place.kind

    def cluster_place(self) -> ClusterPlace:
        """What manifests and preflight need. MLflow's address is part of every pod's environment."""
        env = {"MLFLOW_TRACKING_URI": self.services.mlflow, **self.environment.values}
        return ClusterPlace(
            images={kind: getattr(self.images, kind) for kind in ("flow", "step", "train", "serve")},
            namespace=self.place.namespace,
            state_claim=self.state.claim,
            state_mount=self.state.mount,
            service_account=self.place.service_account,
            env=env,
            env_secrets=self.environment.secrets,
            image_pull_secrets=self.images.pull_secrets,
            image_pull_policy=self.images.pull_policy,
            spot_selector=self.nodes.spot,
            on_demand_selector=self.nodes.on_demand,
            gpu_selector=self.nodes.gpu,
            gpu_taint=self.nodes.gpu_taint,
            autoscaler=self.nodes.autoscaler,
            tolerations=tuple({k: v for k, v in t.model_dump().items() if v} for t in self.nodes.tolerations),
            priority_class=self.place.priority_class,
            queue=self.place.queue,
            nccl_interface=self.nodes.nccl_interface,
            ttl_seconds=int(self.place.keep_finished),
            node_loss_seconds=int(self.nodes.lost_after),
        )


def load_cluster(place: Path | str, folder: Path) -> ClusterSettings:
    """Check the settings of a cluster: its name ("cluster": `folder`/cluster.toml, else the shipped one) or a file.

    Raises ConfigError with all mistakes, a line each, or if the file is of another kind of place.
    """
    path, read = read_place(place, folder)
    return _checked(path, read, read_file(path, str(path), what="a place file"))


def parse_cluster(text: str, name: str) -> ClusterSettings:
    """The settings from the text of a cluster.toml that is called `name` in messages. Raises as `load_cluster`."""
    return _checked(Path(name), read_toml(text, name, (), example='[place]\nkind = "cluster"'), text)


def _checked(path: Path, read: SettingsText, text: str) -> ClusterSettings:
    if kind_of(read) == "laptop":
        raise read.refusal(
            ("place", "kind"), 'expected "cluster": this command looks at a cluster; give --place cluster'
        )
    checked = check(_ClusterFile, read)
    sections = {name: getattr(checked, name) for name in _ClusterFile.model_fields}
    return ClusterSettings(file=path.absolute(), text=text, **sections)
