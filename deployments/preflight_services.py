"""What pods talk to: MLflow under its Service name, the DVC remote. Pure.

MLflow answers 403 to host names that it was not told of, while its /health stays 200: so its allowed hosts are read
from its Deployment, and an API route was asked by whoever took the snapshot from inside (deployments.probes).
Not covered: object stores, Prefect.
"""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from deployments.preflight_findings import Case, Finding, Json, environment_of, request_of

OPTION, VARIABLE = "--allowed-hosts", "MLFLOW_SERVER_ALLOWED_HOSTS"


@dataclass(frozen=True, kw_only=True)
class Address:
    """A URL that pods use."""

    url: str
    host: str
    port: int
    service: str  # "" if it is no Service name
    namespace: str

    @property
    def header(self) -> str:
        """The Host header that a client sends."""
        standard = 443 if self.url.startswith("https:") else 80
        return self.host if self.port == standard else f"{self.host}:{self.port}"

    @classmethod
    def of(cls, url: str, namespace: str) -> Address:
        """Take a URL apart. Names such as mlflow, mlflow.ns, mlflow.ns.svc and the full one are Services."""
        parts = urlsplit(url)
        host, https = parts.hostname or "", parts.scheme == "https"
        labels = host.removesuffix(".").removesuffix(".cluster.local").removesuffix(".svc").split(".")
        inside = host.endswith((".svc", ".svc.cluster.local")) or len(labels) <= 2
        numeric = host.replace(".", "").isdigit() or ":" in host or host == "localhost"
        is_service = inside and not numeric and bool(labels[0])
        return cls(
            url=url,
            host=host,
            port=parts.port or (443 if https else 80),
            service=labels[0] if is_service else "",
            namespace=labels[1] if is_service and len(labels) > 1 else namespace,
        )


def look_at_mlflow(case: Case) -> Iterator[Finding]:
    """MLflow's Service is there, and it answers to the name that pods use."""
    url = tracking_url(case)
    if not url:
        return
    address, probe = Address.of(url, case.wanted.namespace), case.snapshot.probes.get("mlflow")
    found = list(_probed(address, probe)) if probe is not None else list(_read(case, address))
    yield from found
    if not found:
        how = "its Service and allowed hosts suit" if address.service else "not a Service: not looked at from here"
        how = how if probe is None else "answers under this name"
        yield Finding(what="MLflow", verdict="OK", found=f"{url}: {how}")


def tracking_url(case: Case) -> str:
    """The MLflow that the pods are told of; "" if none."""
    for pods in case.wanted.sets:
        found = environment_of(pods).get("MLFLOW_TRACKING_URI") or _in_request(request_of(pods))
        if found.startswith("http"):
            return found
    return ""


def _in_request(request: Json) -> str:
    for key in ("mlflow_uri", "tracking_uri"):
        if isinstance(value := request.get(key), str):
            return value
    spec = request.get("spec")
    return _in_request(spec) if isinstance(spec, dict) else ""


def _hosts_fix(address: Address) -> str:
    names = [address.header]
    if address.service:
        full = f"{address.service}.{address.namespace}.svc.cluster.local:{address.port}"
        names = list(dict.fromkeys([address.header, f"{address.service}:{address.port}", full]))
    return f"start MLflow with --allowed-hosts {shlex.quote(','.join([*names, 'localhost:*']))}"


def _probed(address: Address, probe: Json) -> Iterator[Finding]:
    status, said = probe.get("status"), str(probe.get("error") or probe.get("body") or "")
    if status == 200:
        return
    if status == 403 and "host" in said.lower():
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url} refuses its own Service name ({said[:80]}), though its /health is well",
            fix=_hosts_fix(address),
        )
    elif status in (401, 403):
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url} answers {status}: credentials are missing or wrong",
            fix="put MLFLOW_TRACKING_TOKEN, or user name and password, into a Secret of env_secrets in cluster.toml",
        )
    else:
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url} does not answer an API request: {said[:120] or status}",
            fix=f"kubectl -n {address.namespace} get deployment,service,endpointslices | grep "
            f"{address.service or 'mlflow'}; "
            "a NetworkPolicy may be in the way too",
        )


def _read(case: Case, address: Address) -> Iterator[Finding]:
    """Without a probe: what Service and Deployment say."""
    if not address.service:
        return
    where, snapshot = f"kubectl -n {address.namespace}", case.snapshot
    if address.namespace not in (snapshot.services_of or (snapshot.namespace,)) or not snapshot.known("services"):
        yield Finding(
            what="MLflow",
            verdict="WARN",
            found=f"{address.url}: not looked at: Services in namespace {address.namespace} could not be listed",
            fix=f"{where} get service,deployment, by somebody who may; in a pod of the cluster a preflight asks MLflow",
        )
        return
    service = case.snapshot.find("services", address.service, address.namespace)
    if service is None:
        known = ", ".join(sorted(s["metadata"]["name"] for s in case.snapshot.get("services"))) or "none"
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url}: there is no Service {address.service} in namespace {address.namespace} (there "
            f"are: {known})",
            fix="correct MLFLOW_TRACKING_URI in [env] of cluster.toml, or deploy MLflow",
        )
        return
    ports = [int(p["port"]) for p in (service.get("spec") or {}).get("ports") or ()]
    if address.port not in ports:
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url}: Service {address.service} has port {', '.join(map(str, ports)) or 'none'}",
            fix="correct the port of MLFLOW_TRACKING_URI in [env] of cluster.toml",
        )
        return
    deployment = _behind(case, service)
    if deployment is None:
        return
    name = deployment["metadata"]["name"]
    if not (deployment.get("status") or {}).get("availableReplicas"):
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url}: deployment {name} has no replica available",
            fix=f"{where} describe deployment {name}",
        )
        return
    hosts = allowed_hosts(deployment)
    if hosts is not None and not host_allowed(address.header, hosts):
        said = (
            f"allows {', '.join(hosts)}"
            if hosts
            else "has no --allowed-hosts, and then allows localhost and private addresses"
        )
        yield Finding(
            what="MLflow",
            verdict="FAIL",
            found=f"{address.url}: deployment {name} {said}: requests to {address.header} get 403, though /health "
            "is well",
            fix=_hosts_fix(address),
        )


def _behind(case: Case, service: Json) -> Json | None:
    selector = (service.get("spec") or {}).get("selector") or {}
    for deployment in case.snapshot.get("deployments"):
        labels = (deployment["spec"]["template"].get("metadata") or {}).get("labels") or {}
        if selector and all(labels.get(k) == v for k, v in selector.items()):
            return dict(deployment)
    return None


def allowed_hosts(deployment: Json) -> list[str] | None:
    """What an MLflow server was told to answer to; [] if nothing, None if the containers are no MLflow server."""
    mlflow = False
    for container in deployment["spec"]["template"]["spec"]["containers"]:
        for variable in container.get("env") or ():
            if variable.get("name") == VARIABLE:
                return _split(str(variable.get("value") or ""))
        words = [w for text in container.get("args") or () for w in _words(str(text))]
        mlflow = mlflow or "mlflow" in words or "mlflow" in str(container.get("image") or "")
        for index, word in enumerate(words):
            if word == OPTION and index + 1 < len(words):
                return _split(words[index + 1])
            if word.startswith(OPTION + "="):
                return _split(word.partition("=")[2])
    return [] if mlflow else None


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def host_allowed(header: str, hosts: list[str]) -> bool:
    """MLflow's own rule: a pattern if it has an asterisk, otherwise the whole header, port included."""
    return any(h == "*" or (fnmatch.fnmatch(header, h) if "*" in h else header == h) for h in hosts)


def look_at_dvc(case: Case) -> Iterator[Finding]:
    """The data's remote gives what it promised, and is there."""
    probe = case.snapshot.probes.get("dvc")
    if probe is None:
        return
    name = str(probe.get("remote") or "")
    if error := probe.get("error"):
        yield Finding(
            what="DVC remote", verdict="FAIL", found=f"{name}: {error}", fix="see what it says; dvc doctor shows more"
        )
    elif not probe.get("verify"):
        yield Finding(
            what="DVC remote",
            verdict="FAIL",
            found=f"remote {name} has no verify = true: DVC takes a tampered object without a word",
            fix=f"dvc remote modify {name} verify true && git commit -am 'verify data'",
        )
    else:
        yield Finding(what="DVC remote", verdict="OK", found=f"{name} verifies what it gives")
