"""Where on a cluster a pipeline's model is served, as plain values that travel in a request; and what serves there now.

    target = ClusterTarget(place=ClusterPlace(...), replicas=2)
    in_service(target, "digits")            # "3.1a2b3c4d", or "" if nothing answers or the API server is away

Not covered: putting a version into service (tasks.rolling_update), the objects themselves (serving_manifests.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from deployments.cluster_place import ClusterPlace
from deployments.errors import StepError
from deployments.serving_manifests import INFERENCE, LABEL_ANNOTATION, serving_name
from deployments.workload import Resources

if TYPE_CHECKING:
    from deployments.kube_api import KubeApi

LOOK_SECONDS = 2.0  # a plan does not wait longer for an API server


@dataclass(frozen=True, kw_only=True)
class ClusterTarget:
    """One cluster, and what a served model gets there. Seconds; JSON by `dataclasses.asdict` and back."""

    place: ClusterPlace
    kubeconfig: str = ""  # a path; empty: $KUBECONFIG or ~/.kube/config, in a pod its own account. A step Job needs ""
    context: str = ""  # of the kubeconfig; empty: its current one
    replicas: int = 2  # at first; an autoscaler's number is left alone
    resources: Resources = field(default_factory=lambda: Resources(cpus=1.0, memory="2Gi"))  # of each pod
    start_seconds: float = 300.0  # for one new pod: node, image, archive, loading, golden requests
    patience_seconds: float = 60.0  # with what somebody has to put right: an image, a claim, a quota
    ready_seconds: float = 5.0  # that a new pod has to stay ready before an old one goes
    drain_seconds: float = 10.0  # until every proxy has forgotten a pod that leaves

    def url(self, pipeline: str) -> str:
        """The Service, as pods of the cluster reach it."""
        return f"http://{serving_name(pipeline)}.{self.place.namespace}:{INFERENCE}"

    def without_access(self) -> ClusterTarget:
        """The same without how this machine reaches the API: what a record may keep."""
        return replace(self, kubeconfig="", context="")


def connect_to(target: ClusterTarget, *, patience: float | None = None) -> KubeApi:
    """Its API server. Raises ConfigError if there is no usable configuration."""
    from deployments.kube_api import PATIENCE
    from deployments.kube_connect import connect

    seconds = PATIENCE if patience is None else patience
    return connect(kubeconfig=target.kubeconfig, context=target.context, patience=seconds)


def in_service(target: ClusterTarget, pipeline: str) -> str:
    """The label of the only version that a pipeline's pods have, one of them ready at least; "" for anything else.

    For a plan: one request, no errors. Also "" while a rollout is under way: then there is something to do.
    """
    path = f"/apis/apps/v1/namespaces/{target.place.namespace}/deployments/{serving_name(pipeline)}"
    try:
        api = connect_to(target, patience=LOOK_SECONDS)
        try:
            item = api.find(path)
        finally:
            api.close()
    except StepError:
        return ""
    except Exception as error:
        from deployments.kube_api import ApiStatus

        if isinstance(error, ApiStatus):
            return ""
        raise
    if item is None:
        return ""
    status, pods = item.get("status") or {}, int((item.get("status") or {}).get("replicas", 0))
    seen = int(status.get("observedGeneration", 0)) >= int(item["metadata"].get("generation", 0))
    alone = seen and int(status.get("updatedReplicas", 0)) == pods and int(status.get("availableReplicas", 0)) > 0
    annotations = item["spec"]["template"]["metadata"].get("annotations") or {}
    return str(annotations.get(LABEL_ANNOTATION, "")) if alone else ""
