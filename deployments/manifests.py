"""Pure: a workload and a place -> the Kubernetes objects that run it. No client, no clock, no randomness.

    yaml_of([step_job(workload, place)])            # what `kubectl apply -f -` takes

A step is a batch/v1 Job, one attempt of a training is one kubeflow.org/v1 PyTorchJob. The request travels inside the
object (an annotation that the pod sees as a file), so that creating the object is the only call and the whole of it;
a request that is too long for that is a file on the state volume. State is one ReadWriteMany claim, mounted at the same
path in every pod. Every container keeps to the Pod Security Standard `restricted`.
Not covered: serving (serving_manifests.py), objects that live long (deployments/k8s), sending them (cluster.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import ConfigError, GiveUp
from deployments.workload import Resources, Workload

Manifest = dict[str, Any]
DOMAIN = "reprise.dev"
WORKLOAD_LABEL, KEY_LABEL, ACCOUNT_LABEL = f"{DOMAIN}/workload", f"{DOMAIN}/key", f"{DOMAIN}/account"
REQUEST_ANNOTATION, ENDING_ANNOTATION = f"{DOMAIN}/request", f"{DOMAIN}/ending"
MANAGED = {"app.kubernetes.io/name": "reprise", "app.kubernetes.io/managed-by": "reprise"}
MANAGED_SELECTOR = "app.kubernetes.io/managed-by=reprise"
REQUEST_FOLDER = "/reprise-job"
REQUEST_LIMIT = 200_000  # bytes; all annotations of an object may have 262144
CONTAINERS = {"train": "pytorch", "step": "step"}  # the operator reads exit codes of `pytorch` only
NOTICE_SECONDS = 120  # what a cloud gives; a grace that is longer is cut off, and Karpenter deletes such pods at once
FORBIDDEN_TOLERATION = "karpenter.sh/disrupted"  # pods that tolerate it are not evicted: they get no notice
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_LONGEST_TRAINING = 63 - len("-worker-999")


@dataclass(frozen=True, kw_only=True)
class ClusterPlace:
    """What a cluster is like: plain values, from `cluster.toml`. Raises ConfigError for a toleration that does harm."""

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
        "template": _template(workload, place, _node_choice(workload, place)),
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


def request_is_inside(workload: Workload) -> bool:
    """Whether the request fits into the object itself."""
    return len(_request_text(workload).encode()) <= REQUEST_LIMIT


def job_folder(name: str, place: ClusterPlace) -> str:
    """The workload's folder on the state volume, as pods see it."""
    return f"{place.state_mount}/jobs/{name}"


def labels_of(workload: Workload) -> dict[str, str]:
    """Labels of the object and its pods. Prefect's own flow-run label stays out: its observer would act on it."""
    own = {f"{DOMAIN}/{name}": label_value(value) for name, value in workload.labels.items() if value}
    own |= {ACCOUNT_LABEL: workload.account} if workload.account else {}  # a NetworkPolicy lets these to the API server
    return {**MANAGED, "app.kubernetes.io/component": workload.image, **own, WORKLOAD_LABEL: workload.name}


def label_value(text: str) -> str:
    """The text as a label's value: at most 63 of letters, digits, '-', '_', '.', with a letter or digit at the ends."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", re.sub(r"[^-A-Za-z0-9_.]", "-", text)[:63])


def container_security() -> Manifest:
    """What `restricted` asks of each container."""
    return {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def pod_security(place: ClusterPlace) -> Manifest:
    """What `restricted` asks of a pod, and a group that may write the state volume."""
    return {
        "runAsNonRoot": True,
        "runAsUser": place.user,
        "runAsGroup": place.user,
        "fsGroup": place.user,
        "fsGroupChangePolicy": "OnRootMismatch",  # not the whole volume at every start
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def environment(values: Mapping[str, str]) -> list[Manifest]:
    """Names and values as a container takes them, sorted."""
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


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
    template = _template(workload, place, {"nodeSelector": selector, "tolerations": tolerations})
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


def _template(workload: Workload, place: ClusterPlace, choice: Manifest) -> Manifest:
    inside, deploys = request_is_inside(workload), workload.account == "deploy"
    volumes: list[Manifest] = [
        {"name": "state", "persistentVolumeClaim": {"claimName": place.state_claim}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[Manifest] = [{"name": "state", "mountPath": place.state_mount}, {"name": "tmp", "mountPath": "/tmp"}]
    if inside:
        item = {"path": "request.json", "fieldRef": {"fieldPath": f"metadata.annotations['{REQUEST_ANNOTATION}']"}}
        volumes.append({"name": "request", "downwardAPI": {"items": [item]}})
        mounts.append({"name": "request", "mountPath": REQUEST_FOLDER, "readOnly": True})
    if workload.resources.shm:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": workload.resources.shm}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    container: Manifest = {
        "name": CONTAINERS.get(workload.image, workload.image),
        "image": place.image(workload.image),
        "imagePullPolicy": place.image_pull_policy,
        "command": _argv(workload, place, f"{REQUEST_FOLDER if inside else job_folder(workload.name, place)}"),
        "env": environment(_environment(workload, place)),
        "resources": resources(workload.resources),
        "volumeMounts": mounts,
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    if place.env_secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in place.env_secrets]
    spec: Manifest = {
        **{name: value for name, value in choice.items() if value},
        "serviceAccountName": place.deploy_account if deploys else place.service_account,
        "automountServiceAccountToken": deploys,
        "enableServiceLinks": False,  # a namespace with many services would fill the environment
        "terminationGracePeriodSeconds": max(1, math.ceil(workload.grace_seconds)),
        "securityContext": pod_security(place),
        "containers": [container],
        "volumes": volumes,
    }
    if place.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in place.image_pull_secrets]
    if place.priority_class:
        spec["priorityClassName"] = place.priority_class
    metadata: Manifest = {"labels": labels_of(workload)}
    if inside:
        metadata["annotations"] = {REQUEST_ANNOTATION: _request_text(workload)}
    return {"metadata": metadata, "spec": spec}


def _argv(workload: Workload, place: ClusterPlace, request_folder: str) -> list[str]:
    folder = job_folder(workload.name, place)
    words = {"{request}": f"{request_folder}/request.json", "{result}": f"{folder}/result.json", "{job}": folder}
    argv = list(workload.command)
    for word, path in words.items():
        argv = [part.replace(word, path) for part in argv]
    if "training.launch" in argv and "--grace" not in argv:
        # The wrapper has to be done before the kubelet is.
        argv += ["--grace", f"{max(1.0, workload.grace_seconds - min(5.0, workload.grace_seconds / 4)):g}"]
    return argv


def _environment(workload: Workload, place: ClusterPlace) -> dict[str, str]:
    env = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "REPRISE_JOB": workload.name}
    env["USER"] = "reprise"  # the number has no name in any image, and DVC and torch ask for one
    if workload.image == "step":
        env["REPRISE_TERMINATION_LOG"] = "/dev/termination-log"
    if workload.image == "train" and workload.resources.gpus and workload.replicas * workload.processes > 1:
        env["NCCL_DEBUG"] = "WARN"
        if place.nccl_interface:
            env["NCCL_SOCKET_IFNAME"] = place.nccl_interface
    return env | dict(place.env) | dict(workload.env)


def resources(wanted: Resources) -> Manifest:
    """Requests and limits. No CPU limit: it would throttle a process while the node is idle."""
    limits: Manifest = {"memory": wanted.memory}
    if wanted.gpus:
        limits[wanted.gpu_resource] = str(wanted.gpus)
    return {"requests": {"cpu": f"{wanted.cpus:g}", **limits}, "limits": limits}


def _request_text(workload: Workload) -> str:
    return json.dumps(dict(workload.request), sort_keys=True)
