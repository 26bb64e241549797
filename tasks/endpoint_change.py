"""Which machinery serves an endpoint, from a request: one TorchServe, or the pods of a cluster.

Both are imported only where they are meant. Not covered: what they do (tasks.rollout, tasks.rolling_update).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from deployments.cluster_target import ClusterTarget
from deployments.serving import TorchServe
from tasks.champion import Champion
from tasks.endpoint import EndpointRecord
from tasks.proof import Limits

if TYPE_CHECKING:
    from tasks.rolling_update import RollingUpdate
    from tasks.rollout import Rollout


class EndpointRequest(Protocol):
    """What every request about an endpoint says."""

    @property
    def pipeline(self) -> str: ...
    @property
    def management_url(self) -> str: ...
    @property
    def inference_url(self) -> str: ...
    @property
    def tracking_uri(self) -> str: ...
    @property
    def record(self) -> str: ...
    @property
    def cluster(self) -> ClusterTarget | None: ...


def change_of(
    request: EndpointRequest, limits: Limits, on_phase: Callable[[str], None] = lambda phase: None
) -> Rollout | RollingUpdate:
    """The machinery for one endpoint. Raises ConfigError if there is no way to the cluster's API."""
    champion = Champion(tracking_uri=request.tracking_uri, model=request.pipeline)
    record = EndpointRecord(folder=request.record, pipeline=request.pipeline)
    server = TorchServe(request.management_url, inference_url(request))
    if request.cluster is None:
        from tasks.rollout import Rollout

        return Rollout(server, champion, record, limits, on_phase=on_phase)
    from deployments.cluster_serving import Rollouts
    from deployments.cluster_target import connect_to
    from tasks.rolling_update import RollingUpdate

    rollouts = Rollouts(connect_to(request.cluster), request.cluster.place.namespace)
    return RollingUpdate(rollouts, request.cluster, server, champion, record, limits, on_phase=on_phase)


def inference_url(request: EndpointRequest) -> str:
    """Where the model answers: the URL given, or on a cluster the pipeline's Service."""
    given = request.inference_url.rstrip("/")
    return given or (request.cluster.url(request.pipeline) if request.cluster else "")
