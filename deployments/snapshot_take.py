"""A live cluster is asked what it looks like: some twenty requests, all at once, with the rights one has.

    snapshot = take(connect(), place)

Definitions are found by API discovery, which every account may read, instead of the CRD objects. A `Taker` asks for
single parts. Not covered: how rights are asked for (snapshot_rights.py), what is kept of an object (snapshot_trim.py),
the document (snapshot.py).
"""

from __future__ import annotations

import contextlib
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from deployments.cluster_place import ClusterPlace
from deployments.errors import ConfigError, PreflightError, StepError, Unreachable
from deployments.kube_api import ApiStatus
from deployments.preflight_services import Address
from deployments.snapshot import Snapshot
from deployments.snapshot_rights import ask_rights
from deployments.snapshot_trim import TRIMS

Json = dict[str, Any]
PATIENCE = 5.0  # seconds; a preflight does not wait for a server that is away
PAGE = "500"
API_GROUPS = ("kubeflow.org", "trainer.kubeflow.org", "karpenter.sh", "kueue.x-k8s.io")


class Reader(Protocol):
    """What `take` needs of an API server; deployments.kube_api.KubeApi is one."""

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        patience: float | None = None,
    ) -> Json:
        """One JSON request. Raises ApiStatus or PreflightError for what the server refuses."""


def take(api: Reader, place: ClusterPlace, *, probes: Mapping[str, Json] | None = None) -> Snapshot:
    """Look at a live cluster with the rights one has. Raises Unreachable if its API does not answer.

    `probes`: what deployments.probes and the DVC settings say, see preflight_services.
    """
    taker = Taker(api, place)
    taker.ask(
        taker.version_of_server,
        taker.definitions,
        taker.rights,
        taker.nodes,
        taker.pools,
        taker.autoscaler,
        taker.operators,
        taker.services,
        *taker.bounds(),
    )
    return taker.snapshot(clock_offset=_clock_offset(api), probes=probes)


def server_version(api: Reader, patience: float = PATIENCE) -> str:
    """The version that it tells everybody. Raises ConfigError for a server that is no Kubernetes API."""
    try:
        return str(api.request("GET", "/version", patience=patience).get("gitVersion", ""))
    except ApiStatus as status:
        host = getattr(api, "host", "the server of the kubeconfig")
        raise ConfigError(f"{host}: GET /version: {status}; expected a Kubernetes API, mostly https://") from None


class Taker:
    """Asks for one part after the other, or many at once: each writes keys of its own."""

    def __init__(self, api: Reader, place: ClusterPlace, *, patience: float = PATIENCE) -> None:
        """`patience`: seconds that the API server may be away."""
        self.api, self.place, self.patience = api, place, patience
        self.version = ""
        self.apis: dict[str, Sequence[str]] = {}
        self.access: list[Json] = []
        self.objects: dict[str, Sequence[Json]] = {}
        self.unreadable: dict[str, str] = {}
        self.services_of: list[str] = []
        self._here = f"/namespaces/{place.namespace}"

    def ask(self, *parts: Callable[[], object]) -> None:
        """All these parts at once. Raises Unreachable."""
        pool = ThreadPoolExecutor(max_workers=8, thread_name_prefix="snapshot")
        try:
            for future in [pool.submit(part) for part in parts]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def snapshot(self, *, clock_offset: float | None = None, probes: Mapping[str, Json] | None = None) -> Snapshot:
        """What has been asked for so far."""
        return Snapshot(
            namespace=self.place.namespace,
            taken=time.time(),
            version=self.version,
            clock_offset=clock_offset,
            apis=self.apis,
            access=sorted(self.access, key=lambda a: (a["group"], a["resource"], a["verb"])),
            objects=self.objects,
            unreadable=self.unreadable,
            services_of=self.services_of,
            probes=dict(probes or {}),
        )

    def nodes(self) -> None:
        """The nodes, as they are."""
        self._list("nodes", "/api/v1/nodes")

    def pools(self) -> None:
        """Karpenter's NodePools, which make nodes."""
        try:
            versions = [v["version"] for v in self._ask("/apis/karpenter.sh").get("versions") or ()]
        except ApiStatus:
            self.objects["nodepools"] = []  # it is not installed
        except PreflightError as error:
            self.unreadable["nodepools"] = str(error)
        else:
            if "v1" in versions:
                self._list("nodepools", "/apis/karpenter.sh/v1/nodepools")
            else:
                self.unreadable["nodepools"] = f"karpenter.sh is there in {', '.join(versions)}, expected v1"

    def autoscaler(self) -> None:
        """The mark that a cluster autoscaler leaves."""
        self._one("autoscalers", "/api/v1/namespaces/kube-system/configmaps/cluster-autoscaler-status")

    def bounds(self) -> Iterable[Callable[[], object]]:
        """What else decides whether a pod is admitted and placed: a part each."""
        here, running = self._here, {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
        yield lambda: self._list("pods", "/api/v1/pods", running)
        yield lambda: self._one("namespaces", f"/api/v1{here}")
        yield lambda: self._list("resourcequotas", f"/api/v1{here}/resourcequotas")
        yield lambda: self._list("limitranges", f"/api/v1{here}/limitranges")
        yield self._claims
        yield lambda: self._list("storageclasses", "/apis/storage.k8s.io/v1/storageclasses")
        yield lambda: self._list("serviceaccounts", f"/api/v1{here}/serviceaccounts")
        if self.place.priority_class:
            name = self.place.priority_class
            yield lambda: self._one("priorityclasses", f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}")
        if self.place.env_secrets or self.place.image_pull_secrets:
            yield self._secrets

    def services(self) -> None:
        """What pods talk to: in the namespace, and where MLflow is."""
        tracking = Address.of(self.place.env.get("MLFLOW_TRACKING_URI", ""), self.place.namespace)
        for name in dict.fromkeys([self.place.namespace, tracking.namespace]):
            self._list("services", f"/api/v1/namespaces/{name}/services")
            self._list("deployments", f"/apis/apps/v1/namespaces/{name}/deployments")
            self.services_of.append(name)

    def operators(self) -> None:
        """Who acts on PyTorchJobs."""
        selector = {"labelSelector": "control-plane=kubeflow-training-operator"}
        self._list("operators", "/apis/apps/v1/deployments", selector)

    def _ask(self, path: str, query: Mapping[str, str] | None = None) -> Json:
        return self.api.request("GET", path, query=query, patience=self.patience)

    def version_of_server(self) -> None:
        """Its version."""
        # Also where a cluster that does not answer ends the whole look.
        self.version = server_version(self.api, self.patience)

    def definitions(self) -> None:
        """Which kinds are defined, of those that matter; and Kueue's queues."""
        for group in self._ask("/apis").get("groups") or ():
            if group["name"] not in API_GROUPS:
                continue
            for version in (v["groupVersion"] for v in group["versions"]):
                with contextlib.suppress(ApiStatus):
                    found = self._ask(f"/apis/{version}").get("resources") or ()
                    self.apis[version] = sorted(r["name"] for r in found if "/" not in r["name"])
        for version in ("kueue.x-k8s.io/v1beta2", "kueue.x-k8s.io/v1beta1"):
            if "localqueues" in self.apis.get(version, ()) and "localqueues" not in self.objects:
                self._list("localqueues", f"/apis/{version}{self._here}/localqueues")

    def rights(self) -> None:
        """What one may do here, of what Reprise does."""
        found, why_not = ask_rights(self.api, self.place.namespace, patience=self.patience)
        self.access += found
        if why_not:
            self.unreadable["access"] = why_not

    def _list(self, plural: str, path: str, query: Mapping[str, str] | None = None) -> None:
        items: list[Json] = []
        more = ""
        try:
            while True:
                page = self._ask(path, {**(query or {}), "limit": PAGE, **({"continue": more} if more else {})})
                items += [TRIMS[plural](item) for item in page.get("items") or ()]
                more = (page.get("metadata") or {}).get("continue", "")
                if not more:
                    break
        except Unreachable:
            raise
        except (StepError, ApiStatus) as error:
            self.unreadable[plural] = str(error)
            return
        self.objects[plural] = [*self.objects.get(plural, ()), *items]

    def _one(self, plural: str, path: str) -> bool:
        try:
            item = self._ask(path)
        except Unreachable:
            raise
        except (StepError, ApiStatus) as error:
            if getattr(error, "code", 0) == 404:
                self.objects.setdefault(plural, [])
                return True
            self.unreadable[plural] = str(error)
            return False
        self.objects[plural] = [*self.objects.get(plural, ()), TRIMS[plural](item)]
        return True

    def _claims(self) -> None:
        """The claims, and the volumes behind them: a volume may be bound to a zone."""
        claims = "persistentvolumeclaims"
        self._list(claims, f"/api/v1/namespaces/{self.place.namespace}/{claims}")
        claim = next((c for c in self.objects.get(claims, ()) if c["metadata"]["name"] == self.place.state_claim), None)
        if claim is not None and (volume := (claim.get("spec") or {}).get("volumeName")):
            self._one("persistentvolumes", f"/api/v1/persistentvolumes/{urllib.parse.quote(volume)}")

    def _secrets(self) -> None:
        """Names and types of the Secrets that the place names; what they hold is dropped at once."""
        for name in dict.fromkeys([*self.place.env_secrets, *self.place.image_pull_secrets]):
            path = f"/api/v1/namespaces/{self.place.namespace}/secrets/{urllib.parse.quote(name)}"
            if not self._one("secrets", path):
                return


def _clock_offset(api: Any) -> float | None:
    """Seconds that the server's clock is ahead of ours, by the Date of an answer; None where headers are not seen."""
    from email.utils import parsedate_to_datetime

    manager = getattr(getattr(getattr(api, "client", None), "rest_client", None), "pool_manager", None)
    if manager is None:
        return None
    before = time.time()
    try:
        date = manager.request("GET", f"{api.host}/version", timeout=PATIENCE, retries=False).headers.get("Date")
        # A Date is a whole second that has begun: on average half of it is over.
        return round(parsedate_to_datetime(date).timestamp() + 0.5 - (before + time.time()) / 2, 2) if date else None
    except Exception:  # whatever stands between: the clock is one row of many, and it says "not known"
        return None
