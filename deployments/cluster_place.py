"""What a cluster is like, as plain values: images, namespace, accounts, node selectors, times. From cluster.toml.

Not covered: reading that file (flows.cluster_settings), what is made of the values (pod_template, manifests,
serving_manifests).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.errors import ConfigError

FORBIDDEN_TOLERATION = "karpenter.sh/disrupted"  # pods that tolerate it are not evicted: they get no notice


@dataclass(frozen=True, kw_only=True)
class ClusterPlace:
    """One cluster. Raises ConfigError for a toleration that does harm."""

    images: Mapping[str, str]  # flow, step, train, serve -> reference, best with a digest
    namespace: str = "reprise"
    state_claim: str = "reprise"  # ReadWriteMany
    state_mount: str = "/reprise"  # in every pod
    service_account: str = "reprise-step"  # of steps and trainings; its token is not mounted
    serving_account: str = "reprise-serve"  # of served models; no token either
    deploy_account: str = "reprise-deploy"  # of workloads that change what is served; its token is mounted
    env: Mapping[str, str] = field(default_factory=dict)
    env_secrets: tuple[str, ...] = ()  # names of Secrets that become environment, by reference only
    image_pull_secrets: tuple[str, ...] = ()
    image_pull_policy: str = "IfNotPresent"
    spot_selector: Mapping[str, str] = field(default_factory=lambda: {"karpenter.sh/capacity-type": "spot"})
    on_demand_selector: Mapping[str, str] = field(default_factory=lambda: {"karpenter.sh/capacity-type": "on-demand"})
    gpu_selector: Mapping[str, str] = field(default_factory=dict)  # e.g. {"accelerator": "nvidia-a100"}
    gpu_taint: str = "nvidia.com/gpu"
    autoscaler: str = "look"  # yes: something adds nodes; no: nothing does; look: as far as Reprise sees
    tolerations: tuple[Mapping[str, str], ...] = ()  # of training pods, beside the GPU taint's
    priority_class: str = ""
    queue: str = ""  # Kueue's LocalQueue; a queued job is Suspended, which is waiting
    nccl_interface: str = ""
    user: int = 10001
    ttl_seconds: int = 86400  # finished objects are kept that long
    node_loss_seconds: int = 60  # a node that does not answer is given up after that

    def __post_init__(self) -> None:
        for toleration in self.tolerations:
            key = toleration.get("key", "")
            if not key or key == FORBIDDEN_TOLERATION:
                raise ConfigError(
                    f"tolerations: {json.dumps(dict(toleration))} tolerates {key or 'every taint'}; expected single "
                    f"taints other than {FORBIDDEN_TOLERATION}: pods that tolerate it are killed without a notice"
                )

    def image(self, kind: str) -> str:
        """The reference of an image. Raises ConfigError if the place names none."""
        if not self.images.get(kind):
            raise ConfigError(f"[images] {kind}: no image given; expected a reference such as registry/reprise-{kind}")
        return self.images[kind]
