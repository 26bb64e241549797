"""Pure: a workload and a place -> the Kubernetes object that runs it. No client, no clock, no randomness.

    yaml_of([step_job(workload, place)])            # what `kubectl apply -f -` takes

A step is a batch/v1 Job, one attempt of a training is one kubeflow.org/v1 PyTorchJob; creating the object is the only
call and the whole of it.
Not covered: the pods in it (pod_template.py), serving (serving_manifests.py), objects that live long (deployments/k8s),
sending them (cluster.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError, GiveUp
from deployments.labels import labels_of
from deployments.pod_template import Manifest, pod_template
from deployments.workload import Workload

NOTICE_SECONDS = 120  # what a cloud gives; a grace that is longer is cut off, and Karpenter deletes such pods at once
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LONGEST_TRAINING = 63 - len("-worker-999")


def manifest(workload: Workload, place: ClusterPlace) -> Manifest:
    """The one object that runs the workload: a PyTorchJob for a training, else a Job."""
    return training_job(workload, place) if workload.image == "train" else step_job(workload, place)


def step_job(workload: Workload, place: ClusterPlace) -> Manifest:
    """A batch/v1 Job of one pod. A disruption starts the pod again, any exit code ends the Job."""
    _check_name(workload, 63)
    spec: Manifest = {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "podReplacementPolicy": "Failed",  # never two at once
        "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
        "ttlSecondsAfterFinished": place.ttl_seconds,
        "template": pod_template(workload, place, _node_choice(workload, place)),
    }
    spec["template"]["spec"]["restartPolicy"] = "Never"
    if workload.deadline_seconds is not None:
        spec["activeDeadlineSeconds"] = max(1, math.ceil(workload.deadline_seconds))
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(workload, place), "spec": spec}


def training_job(workload: Workload, place: ClusterPlace) -> Manifest:
    """A PyTorchJob that is one attempt: nothing in it restarts, so that every interruption is a row of the ledger.

    With several nodes the master holds the rendezvous and stays on on-demand capacity. The operator's `backoffLimit`
    and `activeDeadlineSeconds` are left out: they do not count what one would think, and the flow owns both budgets.
    """
    _check_name(workload, _LONGEST_TRAINING)
    if workload.spot and workload.grace_seconds >= NOTICE_SECONDS:
        raise ConfigError(
            f"[spot] grace = {workload.grace_seconds:g} s: expected less than the {NOTICE_SECONDS} s notice of a "
            "cloud, or the save is cut off"
        )
    alone = workload.replicas == 1
    replicas = {"Master": _replica(workload, place, 1, spot=workload.spot and alone)}
    if not alone:
        replicas["Worker"] = _replica(workload, place, workload.replicas - 1, spot=workload.spot)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(workload, place),
        "spec": {
            "nprocPerNode": str(workload.processes),
            "pytorchReplicaSpecs": replicas,
            "runPolicy": {"cleanPodPolicy": "None", "ttlSecondsAfterFinished": place.ttl_seconds},
        },
    }


def yaml_of(manifests: Sequence[Manifest]) -> str:
    """One YAML stream, sorted, the same for the same objects."""
    import yaml

    return str(yaml.safe_dump_all(manifests, sort_keys=True, width=120, default_flow_style=False))


def _check_name(workload: Workload, longest: int) -> None:
    if not _NAME.fullmatch(workload.name) or len(workload.name) > longest:
        raise GiveUp(
            f"workload name {workload.name!r}: expected a DNS label of at most {longest} characters "
            "(a-z, 0-9 and -, a letter first, no - at the end)"
        )


def _metadata(workload: Workload, place: ClusterPlace) -> Manifest:
    labels = labels_of(workload)
    if place.queue:
        labels["kueue.x-k8s.io/queue-name"] = place.queue
    return {"name": workload.name, "namespace": place.namespace, "labels": labels}


def _replica(workload: Workload, place: ClusterPlace, count: int, *, spot: bool) -> Manifest:
    selector = dict(place.spot_selector if spot else place.on_demand_selector)
    if workload.resources.gpus:
        selector |= place.gpu_selector
    tolerations = [*_gpu_toleration(workload, place), *(dict(t) for t in place.tolerations)]
    for trouble in ("not-ready", "unreachable"):
        tolerations.append(
            {
                "key": f"node.kubernetes.io/{trouble}",
                "operator": "Exists",
                "effect": "NoExecute",
                "tolerationSeconds": place.node_loss_seconds,
            }
        )
    template = pod_template(workload, place, {"nodeSelector": selector, "tolerations": tolerations})
    return {"replicas": count, "restartPolicy": "Never", "template": template}


def _node_choice(workload: Workload, place: ClusterPlace) -> Manifest:
    """A step runs wherever there is room: taken away, it is started again."""
    if not workload.resources.gpus:
        return {}
    return {"nodeSelector": dict(place.gpu_selector), "tolerations": _gpu_toleration(workload, place)}


def _gpu_toleration(workload: Workload, place: ClusterPlace) -> list[Manifest]:
    if not workload.resources.gpus:
        return []
    return [{"key": place.gpu_taint, "operator": "Exists", "effect": "NoSchedule"}]
