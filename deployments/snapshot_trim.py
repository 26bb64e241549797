"""Pure: an object of the API -> what a snapshot keeps of it, by plural.

Environment, commands, annotations and secrets' contents stay behind: a snapshot is shown to others. Not covered: what
is read (snapshot_take.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Json = dict[str, Any]


def _pick(source: Mapping[str, Any] | None, names: Iterable[str]) -> Json:
    return {name: source[name] for name in names if source and source.get(name) not in (None, {}, [], "")}


def _metadata(item: Mapping[str, Any], *more: str) -> Json:
    return _pick(item["metadata"], ("name", "namespace", "labels", "deletionTimestamp", *more))


def _parts(*names: str) -> Callable[[Mapping[str, Any]], Json]:
    return lambda item: {"metadata": _metadata(item), **_pick(item, names)}


def _node(item: Mapping[str, Any]) -> Json:
    ready = [c for c in (item.get("status") or {}).get("conditions") or () if c.get("type") == "Ready"]
    return {
        "metadata": _metadata(item),
        "spec": _pick(item.get("spec"), ("taints", "unschedulable")),
        "status": {
            "allocatable": (item.get("status") or {}).get("allocatable") or {},
            "conditions": [_pick(c, ("type", "status", "reason", "message")) for c in ready],
        },
    }


def _pod(item: Mapping[str, Any]) -> Json:
    spec, metadata = item.get("spec") or {}, item["metadata"]
    labels = metadata.get("labels") or {}
    kept: Json = {**_pick(metadata, ("name", "namespace", "deletionTimestamp"))}
    if ours := {k: v for k, v in labels.items() if k.startswith("reprise.dev/")}:
        kept["labels"] = ours
    if owners := [{"kind": o.get("kind")} for o in metadata.get("ownerReferences") or ()]:
        kept["ownerReferences"] = owners
    trimmed = _pick(spec, ("nodeName", "priority", "overhead"))
    for group in ("containers", "initContainers"):
        if spec.get(group):
            trimmed[group] = [_pick(c, ("name", "resources", "restartPolicy")) for c in spec[group]]
    return {"metadata": kept, "spec": trimmed, "status": _pick(item.get("status"), ("phase",))}


def _namespace(item: Mapping[str, Any]) -> Json:
    return {"metadata": _metadata(item), "status": _pick(item.get("status"), ("phase",))}


def _service(item: Mapping[str, Any]) -> Json:
    return {"metadata": _metadata(item), "spec": _pick(item.get("spec"), ("type", "selector", "ports", "clusterIP"))}


def _deployment(item: Mapping[str, Any]) -> Json:
    """Arguments that are judged (MLflow's allowed hosts, the operator's template); no other environment."""
    spec = item.get("spec") or {}
    template = spec.get("template") or {}
    pod = template.get("spec") or {}
    containers = []
    for container in pod.get("containers") or ():
        kept = _pick(container, ("name", "image", "volumeMounts"))
        words = [str(w) for w in [*(container.get("command") or ()), *(container.get("args") or ())]]
        kept["args"] = _safe_words(words)
        kept["env"] = [e for e in container.get("env") or () if e.get("name") == "MLFLOW_SERVER_ALLOWED_HOSTS"]
        containers.append(kept)
    return {
        "metadata": _metadata(item),
        "spec": {
            **_pick(spec, ("replicas",)),
            "template": {
                "metadata": _pick(template.get("metadata"), ("labels",)),
                "spec": {"containers": containers, **_pick(pod, ("volumes",))},
            },
        },
        "status": _pick(item.get("status"), ("availableReplicas", "readyReplicas")),
    }


def _safe_words(words: list[str]) -> list[str]:
    """Only options that are judged; a database URL with its password is none of them."""
    kept, take_next = [], False
    for word in words:
        if take_next or word.startswith(("--allowed-hosts", "--pytorch-init-container")):
            kept.append(word)
            take_next = not take_next and "=" not in word
        elif word in ("mlflow", "server"):
            kept.append(word)
    if any("--allowed-hosts" in w for w in words) and not any("--allowed-hosts" in w for w in kept):
        kept += [w[w.index("--allowed-hosts") :].split(" --")[0] for w in words if "--allowed-hosts" in w][:1]
    return kept


def _secret(item: Mapping[str, Any]) -> Json:
    return {"metadata": _pick(item["metadata"], ("name", "namespace")), "type": item.get("type", "Opaque")}


def _node_pool(item: Mapping[str, Any]) -> Json:
    spec = item.get("spec") or {}
    conditions = [c for c in (item.get("status") or {}).get("conditions") or () if c.get("type") == "Ready"]
    return {
        "metadata": _metadata(item),
        "spec": _pick(spec, ("template", "limits", "weight", "disruption")),
        "status": {
            **_pick(item.get("status"), ("resources",)),
            "conditions": [_pick(c, ("type", "status", "reason", "message")) for c in conditions],
        },
    }


TRIMS: Mapping[str, Callable[[Mapping[str, Any]], Json]] = {
    "nodes": _node,
    "pods": _pod,
    "namespaces": _namespace,
    "resourcequotas": _parts("spec", "status"),
    "limitranges": _parts("spec"),
    "persistentvolumeclaims": lambda item: {
        "metadata": _metadata(item),
        "spec": _pick(item.get("spec"), ("accessModes", "storageClassName", "volumeName")),
        "status": _pick(item.get("status"), ("phase", "accessModes", "capacity")),
    },
    "persistentvolumes": lambda item: {
        "metadata": _metadata(item),
        "spec": _pick(item.get("spec"), ("nodeAffinity", "accessModes")),
    },
    "storageclasses": lambda item: {
        "metadata": _metadata(item, "annotations"),
        **_pick(item, ("provisioner", "volumeBindingMode")),
    },
    "services": _service,
    "deployments": _deployment,
    "operators": _deployment,
    "serviceaccounts": _namespace,
    "priorityclasses": _namespace,
    "secrets": _secret,
    "nodepools": _node_pool,
    "localqueues": _namespace,
    "autoscalers": _namespace,
}
