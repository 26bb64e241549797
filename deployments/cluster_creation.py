"""One workload's object is made, or the one that is there is adopted: never two of them, never somebody else's.

The name is the identity, the API server's refusal of a second one (409) is the lock. What is being deleted is waited
for, with its pods; a step that has failed is deleted and made anew; an attempt of a training that has ended is adopted
as it is, because attempts are counted. Not covered: what comes after (cluster_run.py).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deployments.errors import GiveUp, PreflightError
from deployments.job_status import end_of
from deployments.kube_api import ApiStatus
from deployments.kube_watch import Following, is_gone, uid_of
from deployments.labels import KEY_LABEL
from deployments.pod_diagnosis import one_line
from deployments.pod_template import Manifest, request_is_inside
from deployments.workload import Workload

if TYPE_CHECKING:
    from deployments.cluster import Cluster

Json = dict[str, Any]
POLL_SECONDS = 0.5


class Creation:
    """Makes or adopts the object of one workload."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        wanted: Manifest,
        objects: Following,
        event: threading.Event,
        say: Callable[[str], None],
    ) -> None:
        """`objects`: what the watch sees of it. `say`: hears why it waits."""
        self.cluster, self.workload, self.wanted = cluster, workload, wanted
        self.objects, self.event, self.say = objects, event, say
        self.api, self.path = cluster.api, cluster.object_path(workload.image, workload.name)

    def create_or_adopt(self, left_over: Callable[[], bool]) -> tuple[Json, bool]:
        """The object, and whether it was there already. `left_over`: pods of an earlier life still run.

        Raises GiveUp if the name belongs to something else or the manifest is refused, PreflightError for what the
        cluster lacks.
        """
        while True:
            self._wait_while(left_over)
            self._prepare_folder()
            try:
                collection = self.cluster.object_path(self.workload.image, "")
                return self.api.request("POST", collection, body=self.wanted, on_wait=self.say), False
            except ApiStatus as status:
                if status.code in (400, 422):
                    raise GiveUp(f"the Kubernetes API refused {self.workload.name}: {status.message}") from status
                if status.code == 404:
                    raise PreflightError(f"{one_line(status.message)}; create the namespace first") from status
                if status.code != 409:
                    raise
                resent = status.resent  # then it may be our own, whose answer was lost
            there = self.api.find(self.path)
            if there is None:
                time.sleep(0.2)  # gone again, or a conflict of the quota's own bookkeeping
                continue
            self._check_identity(there)
            end = end_of(there)
            failed_step = end is not None and not end.succeeded and self.workload.image != "train"
            if not there["metadata"].get("deletionTimestamp") and not failed_step:
                return there, not resent
            if failed_step:
                self.api.delete(self.path, uid=uid_of(there))
            uid = uid_of(there)
            self._wait_while(lambda uid=uid: self._is_there(uid))  # type: ignore[misc]

    def _is_there(self, uid: str) -> bool:
        there = self.api.find(self.path)
        return there is not None and uid_of(there) == uid

    def _wait_while(self, holds: Callable[[], bool]) -> None:
        told = False
        while holds():
            if not told:
                self.say(f"waiting: an earlier {self.workload.name} is still ending")
            told = True
            self.event.wait(POLL_SECONDS)
            self.event.clear()

    def _check_identity(self, there: Json) -> None:
        ours = self.wanted["metadata"]["labels"].get(KEY_LABEL)
        labels = there["metadata"].get("labels") or {}
        theirs = labels.get(KEY_LABEL)
        if ours != theirs or labels.get("app.kubernetes.io/managed-by") != "reprise":
            raise GiveUp(
                f"{self.path}: there is an object of that name with {KEY_LABEL}={theirs}, expected {ours}; "
                "delete it if nobody needs it"
            )

    def _prepare_folder(self) -> None:
        """An earlier try's result must not be taken for this one's; a request that is too long goes to the volume."""
        folder = self.cluster.local_folder(self.workload.name)
        inside = request_is_inside(self.workload)
        if folder is None:
            if not inside:
                raise GiveUp(
                    f"{self.workload.name}: its request is too long for an object, and the state volume is not mounted "
                    f"at {self.cluster.settings.state_mount} here; run the flow where it is"
                )
            return
        if any(not is_gone(item) for item in self.objects.objects()):
            return
        (folder / "result.json").unlink(missing_ok=True)
        if not inside:
            (folder / "request.json").write_text(json.dumps(dict(self.workload.request), sort_keys=True))
