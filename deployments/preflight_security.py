"""Pod Security: would the namespace's level admit these pods, and those parts that the operator adds. Pure.

The rules of `baseline` and `restricted` (v1.30) for the fields that manifests here may carry. Not covered: other
admission controllers (OPA, Kyverno), exemptions, Windows.
"""

from __future__ import annotations

from collections.abc import Iterator

from deployments.preflight_findings import Case, Finding, Json

LABEL = "pod-security.kubernetes.io/enforce"
TEMPLATE_OPTION = "--pytorch-init-container-template-file"
TEMPLATE_FOLDER = "/etc/config"  # where the operator looks by itself
SAFE_VOLUMES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}


def look_at_security(case: Case) -> Iterator[Finding]:
    """The namespace exists, and its level admits the pods."""
    if not case.snapshot.known("namespaces"):
        return
    name = case.wanted.namespace
    namespace = case.snapshot.find("namespaces", name)
    if namespace is None:
        yield Finding(
            what="namespace",
            verdict="FAIL",
            found=f"namespace {name} does not exist",
            fix="kubectl apply -k of your overlay (deployments/k8s/README.md) makes it with all that belongs to it, or "
            "correct namespace in cluster.toml",
        )
        return
    if (namespace.get("status") or {}).get("phase") == "Terminating":
        yield Finding(
            what="namespace",
            verdict="FAIL",
            found=f"namespace {name} is being deleted: nothing can be created in it",
            fix="wait until it is gone and create it anew, or use another in cluster.toml",
        )
        return
    level = (namespace["metadata"].get("labels") or {}).get(LABEL, "privileged")
    broken = [(p, rule) for p in case.wanted.sets for rule in violations(p.spec, level)]
    for pods, rule in broken:
        yield Finding(
            what="pod security",
            verdict="FAIL",
            found=f"{case.wanted.label}: namespace {name} enforces {level!r}, which the {pods.role.lower()} pods "
            f"break: {rule}",
            fix="configure what adds it, or lower the level: "
            f"kubectl label namespace {name} {LABEL}={'baseline' if level == 'restricted' else 'privileged'} "
            "--overwrite",
        )
    yield from () if broken else _operator_part(case, name, level)
    if not broken:
        yield Finding(what="pod security", verdict="OK", found=f"{case.wanted.label}: namespace enforces {level}")


def violations(spec: Json, level: str) -> list[str]:
    """Which rules of a level a pod spec breaks, each as one phrase."""
    if level not in ("baseline", "restricted"):
        return []
    found = [*_baseline(spec)]
    if level == "restricted":
        found += _restricted(spec)
    return found


def _containers(spec: Json) -> list[Json]:
    return [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]


def _baseline(spec: Json) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is set"
    for volume in spec.get("volumes") or ():
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
    for container in _containers(spec):
        security = container.get("securityContext") or {}
        if security.get("privileged"):
            yield f"container {container['name']} is privileged"
        if extra := set((security.get("capabilities") or {}).get("add") or ()) - BASELINE_CAPABILITIES:
            yield f"container {container['name']} adds capabilities {', '.join(sorted(extra))}"
        if any(port.get("hostPort") for port in container.get("ports") or ()):
            yield f"container {container['name']} has a hostPort"


def _restricted(spec: Json) -> Iterator[str]:
    pod = spec.get("securityContext") or {}
    for volume in spec.get("volumes") or ():
        kinds = set(volume) - {"name"}
        if not kinds & set(SAFE_VOLUMES) and "hostPath" not in kinds:
            yield f"volume {volume['name']} is a {', '.join(sorted(kinds)) or 'unknown kind'}"
    for container in _containers(spec):
        name, own = container["name"], container.get("securityContext") or {}
        if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
            yield f"container {name} lacks runAsNonRoot: true"
        if own.get("runAsUser", pod.get("runAsUser")) == 0:
            yield f"container {name} has runAsUser: 0"
        if ((own.get("seccompProfile") or pod.get("seccompProfile")) or {}).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            yield f"container {name} lacks seccompProfile: RuntimeDefault"
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"container {name} lacks allowPrivilegeEscalation: false"
        capabilities = own.get("capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or ()):
            yield f"container {name} does not drop ALL capabilities"
        if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
            yield f"container {name} adds capabilities other than NET_BIND_SERVICE"


def _operator_part(case: Case, namespace: str, level: str) -> Iterator[Finding]:
    """The operator adds an init container to workers; its built-in one does not keep to `restricted`."""
    roles = {p.role for p in case.wanted.sets}
    if level != "restricted" or not case.wanted.is_training or not {"Master", "Worker"} <= roles:
        return
    operators = case.snapshot.get("operators")
    if any(_has_template(o) for o in operators):
        return
    where = (
        f"deployment {operators[0]['metadata'].get('namespace')}/{operators[0]['metadata']['name']}"
        if operators
        else ""
    )
    yield Finding(
        what="pod security",
        verdict="FAIL" if operators else "WARN",
        found=f"{case.wanted.label}: the operator{f' ({where})' if where else ''} adds an init container to workers "
        "that lacks "
        f"allowPrivilegeEscalation: false and dropped capabilities, and namespace {namespace} enforces 'restricted'"
        + ("" if operators else "; whether its template is changed cannot be seen"),
        fix=f"give the operator a template that keeps to it: mount a ConfigMap with initContainer.yaml at "
        f"{TEMPLATE_FOLDER}",
    )


def _has_template(operator: Json) -> bool:
    for container in operator["spec"]["template"]["spec"]["containers"]:
        if any(str(word).startswith(TEMPLATE_OPTION) for word in container.get("args") or ()):
            return True
        if any(
            mount["mountPath"].rstrip("/").startswith(TEMPLATE_FOLDER) for mount in container.get("volumeMounts") or ()
        ):
            return True
    return False
