"""One workload on Kubernetes from its creation to its outcome. The objects' status is the truth, logs are decoration.

Created, or adopted when it is there already. Then every change of the object or one of its pods is looked at, until the
object has ended and nothing of it runs any more: a training that failed because one pod was taken still has pods, which
are told to leave (with their grace, so that they save) and waited for. What is deleted by somebody else's hand is made
again, once. Whatever is raised while waiting leaves the workload running: stop it, or ask for it again.
Not covered: what keeps it from starting (cluster_start.py), what an end is called (cluster_outcome.py), manifests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deployments.cluster_creation import Creation
from deployments.cluster_outcome import Ending, judge
from deployments.cluster_result import result_of
from deployments.cluster_start import Start
from deployments.job_status import end_of, is_suspended
from deployments.kube_watch import Following, is_gone, uid_of
from deployments.labels import ENDING_ANNOTATION, KEY_LABEL, WORKLOAD_LABEL, labels_of
from deployments.node_memory import NodeMemory
from deployments.pod_causes import condition, exit_of, is_scheduled, is_terminal, is_unreachable, stamp
from deployments.pod_log import LogFeed
from deployments.pod_template import CONTAINERS, Manifest
from deployments.preflight import otherwise
from deployments.workload import Outcome, Workload

if TYPE_CHECKING:
    from deployments.cluster import Cluster

Json = dict[str, Any]
LOOK_SECONDS = 5.0  # at least that often, for what no event tells: deadlines
SETTLE_SECONDS = 2.0  # how far the watch of pods may lag behind that of their owners; a pod tells its exit code last


class ClusterRun:
    """Waits for one workload. Not for several threads."""

    def __init__(
        self,
        cluster: Cluster,
        workload: Workload,
        wanted: Manifest,
        objects: Following,
        pods: Following,
        event: threading.Event,
        on_line: Callable[[str], None] | None,
    ) -> None:
        """`objects`, `pods`: what the shared watches see of this workload; both set `event`."""
        self.cluster, self.workload, self.wanted = cluster, workload, wanted
        self.objects, self.pods, self.event = objects, pods, event
        self.api, self.container = cluster.api, CONTAINERS.get(workload.image, workload.image)
        self.training = workload.image == "train"
        self.path = cluster.object_path(workload.image, workload.name)
        self.uid, self.adopted, self.recreated = "", False, 0
        self.created = 0.0  # unix seconds, by this machine's clock where we made it
        self.ending: Ending | None = None
        self.checked, self.resting = False, False  # asked for the pods after the end; told the others to leave
        self.nodes = NodeMemory(cluster.node)
        folder = cluster.make_folder(workload.name)
        self.feed = LogFeed(cluster.api, cluster.pod_path(""), self.container, event, on_line, folder)
        self.start = Start(cluster, workload, self.feed.say)
        self._rest_at = 0.0
        self._settling_since = 0.0  # when the object was found deleted, though no pod of it has been seen

    def outcome(self) -> Outcome:
        """Create or adopt, wait, judge."""
        try:
            self._create_or_adopt()
            while True:
                self.event.clear()
                found = self._look()
                self.feed.deliver()
                if found is not None:
                    return found
                self.event.wait(self._next_look())
        finally:
            self.feed.close()

    def _next_look(self) -> float:
        """Seconds until something may be due that no event tells."""
        age = time.time() - self.created
        limits = (self.workload.deadline_seconds, self.workload.start_seconds)
        due = [limit - age + 0.05 for limit in limits if limit is not None and limit > age]
        watched = self.ending or self._rest_at or self.start.waits or self.checked
        return max(0.05, min([LOOK_SECONDS, *due, 0.5 if watched else LOOK_SECONDS]))

    def _create_or_adopt(self) -> None:
        self._look_before()
        creation = Creation(self.cluster, self.workload, self.wanted, self.objects, self.event, self.feed.say)
        item, self.adopted = creation.create_or_adopt(self._left_over)
        self.uid = uid_of(item)
        self.checked = self.resting = False
        self._rest_at = self._settling_since = 0.0
        asked = stamp(item["metadata"].get("creationTimestamp")) or time.time()
        self.created = asked if self.adopted else time.time()
        self.objects.put(item)

    def _look_before(self) -> None:
        """Refuse what could never be placed before it is made. Raises PreflightError.

        What is there already is past that. So is what has had a place before, as an earlier attempt or in another life:
        a node that was taken comes back, and until then there may be none. Who waits for so long only has another kind
        of capacity in mind for the next attempt.
        """
        guard, mine = self.cluster.guard, labels_of(self.workload)
        if guard is None or self.uid:
            return
        identity = KEY_LABEL if mine.get(KEY_LABEL) else WORKLOAD_LABEL
        if mine[identity] in self.objects.values_of(identity):
            return
        for finding in guard.check(self.wanted, otherwise=otherwise(self.workload, self.cluster.settings)):
            self.feed.say(f"preflight: {finding.what}: {finding.found}; {finding.fix}")

    def _left_over(self) -> bool:
        """Whether pods run whose object is gone: the garbage collector is about to end them."""
        owners = {uid_of(item) for item in self.objects.objects() if not is_gone(item)}
        orphans = [p for p in self.pods.objects() if _owner(p) and _owner(p) not in owners]
        return not owners and not self._all_over(orphans)

    # --- waiting

    def _look(self) -> Outcome | None:
        """What the last states say: an outcome, or None to wait on. Raises the error of an ending that is one."""
        item, gone = self._object()
        pods = self._own_pods()
        for pod in pods:
            self.nodes.of(pod)
        self.feed.follow([p for p in pods if not is_gone(p)])
        end = end_of(item)
        deleted = gone or bool(item["metadata"].get("deletionTimestamp"))
        if deleted and self.ending is None:
            self.ending = _told_to_end(item)
        if (end is not None or deleted) and not self.checked:
            self.checked = True
            self._ask_for_pods()
            pods = self._own_pods()
        if end is not None and self.training and not deleted:
            self._end_rest(pods, at_once=not end.succeeded)
        if not deleted and end is None:
            self._limits(item, pods)
            return None
        if not self._all_over(pods) or (deleted and not pods and self._settling()):
            return None
        if end is not None or self.ending is not None:
            return self._finish(item, pods, self.ending)
        return self._again(pods) if gone else None

    def _settling(self) -> bool:
        """Whether a pod that came and went may still be told of: it is in no list any more, only in the watch."""
        self._settling_since = self._settling_since or time.monotonic()
        return time.monotonic() < self._settling_since + SETTLE_SECONDS

    def _object(self) -> tuple[Json, bool]:
        found = next(i for i in self.objects.objects() if uid_of(i) == self.uid)
        return found, is_gone(found)

    def _own_pods(self) -> list[Json]:
        return [pod for pod in self.pods.objects() if _owner(pod) == self.uid]

    def _ask_for_pods(self) -> None:
        """The two watches are not in step: when the object has ended, ask for the pods as they are."""
        for pod in self.cluster.pods_of(self.workload.name):
            self.pods.put(pod)

    def _limits(self, item: Json, pods: list[Json]) -> None:
        """What the place does to a workload that goes on: its deadline, a lost pod, a start that cannot be."""
        limit = self.workload.deadline_seconds
        if limit is not None and time.time() - self.created > limit:
            return self._end(Ending(cause="deadline", reason=f"longer than its {limit:g} s"))
        pods = self.start.current(item, pods)
        if self.training and not is_suspended(item) and self._lost_one(pods):
            return self._end(Ending(cause="node_lost", reason=""))  # its pods tell why
        if (ending := self.start.look(item, pods, self.created)) is not None:
            self._end(ending)
        return None

    def _lost_one(self, pods: list[Json]) -> bool:
        """Whether a pod vanished without the operator having seen it fail: it would start it again in this attempt."""
        lost = [p for p in pods if is_gone(p) and exit_of(p, self.container).get("exitCode") != 0]
        if not lost:
            return False
        fresh = self.api.find(self.path)
        if fresh is None or uid_of(fresh) != self.uid or is_suspended(fresh) or end_of(fresh):
            if fresh is not None:
                self.objects.put(fresh)
            return False
        return True

    def _end(self, ending: Ending) -> None:
        """Delete the object, its pods with their grace."""
        self.ending = ending
        self.api.delete(self.path, uid=self.uid)

    def _end_rest(self, pods: list[Json], *, at_once: bool) -> None:
        """The training has ended, and these are left: a peer of theirs is gone. SIGTERM, so that they save.

        After success they leave by themselves and are given their grace for it.
        """
        self._rest_at = self._rest_at or time.monotonic() + (0.0 if at_once else self.workload.grace_seconds)
        if self.resting or time.monotonic() < self._rest_at:
            return
        self.resting = True
        for pod in pods:
            if not (is_terminal(pod) or is_gone(pod) or pod["metadata"].get("deletionTimestamp")):
                path = self.cluster.pod_path(pod["metadata"]["name"])
                self.api.delete(path, propagation="Background", uid=uid_of(pod))

    def _all_over(self, pods: list[Json]) -> bool:
        """Whether nothing runs any more. A pod on a node that does not answer is given up after a while."""
        now = time.time()
        for pod in pods:
            if is_terminal(pod) or is_gone(pod):
                continue
            deleting = stamp(pod["metadata"].get("deletionTimestamp"))
            if deleting is None or now < deleting + self.cluster.lost_node_seconds:
                return False
            if not is_unreachable(self.nodes.of(pod, again=True)):
                return False
        return True

    def _again(self, pods: list[Json]) -> Outcome | None:
        """Deleted by somebody's hand: made again once, the second time it is taken for a wish."""
        if self.recreated:
            why = "it was deleted twice by somebody's hand"
            return self._finish(self._object()[0], pods, Ending(cause="cancelled", reason=why))
        self.recreated += 1
        self.feed.finish(2.0)  # before another pod has the name
        self.feed.say(f"{self.workload.name} was deleted by somebody's hand; making it again")
        self._create_or_adopt()
        self.event.set()
        return None

    def _finish(self, item: Json, pods: list[Json], ending: Ending | None) -> Outcome:
        """The outcome of a workload of which nothing runs any more. Raises the error of an ending that is one."""
        if ending is not None and ending.error is not None:
            raise ending.error
        for pod in pods:
            self.nodes.of(pod, again=True)
        verdict = judge(
            self.workload,
            item,
            [(p, is_gone(p)) for p in pods],
            container=self.container,
            nodes=self.nodes.known,
            events=self._events_about_evicted(pods),
            ending=(ending.cause, ending.reason) if ending is not None and ending.reason else None,
        )
        self.feed.finish(5.0)
        if verdict.cause == "user_error":
            self.feed.add_tail(next(p for p in pods if p["metadata"]["name"] == verdict.pod))
        self.feed.deliver()
        folder = self.cluster.local_folder(self.workload.name)
        writes = any("{result}" in part for part in self.workload.command)
        command = f"kubectl logs -n {self.cluster.settings.namespace} -l {WORKLOAD_LABEL}={self.workload.name}"
        return Outcome(
            name=self.workload.name,
            exit_code=verdict.exit_code,
            cause=verdict.cause,
            reason=verdict.reason,
            started=verdict.started,
            ended=verdict.ended,
            result=result_of(
                pods, container=self.container, folder=folder, expected=writes and verdict.cause == "complete"
            ),
            adopted=self.adopted,
            notice=verdict.notice,
            node=verdict.node,
            capacity=verdict.capacity,
            log=str(self.feed.file) if self.feed.file is not None else command,
        )

    def _events_about_evicted(self, pods: list[Json]) -> list[Json]:
        """They tell who evicted: a spot interruption, or a consolidation."""
        found: list[Json] = []
        for pod in pods:
            if condition(pod.get("status") or {}, "DisruptionTarget").get("reason") == "EvictionByEvictionAPI":
                found += self.cluster.events_about("Pod", pod["metadata"]["name"])
                if is_scheduled(pod):
                    found += self.cluster.events_about("Node", pod["spec"]["nodeName"])
        return found


def _told_to_end(item: Json) -> Ending | None:
    """What `stop` wrote into the object before it deleted it."""
    why = (item["metadata"].get("annotations") or {}).get(ENDING_ANNOTATION)
    return Ending(cause="cancelled", reason=why) if why else None


def _owner(pod: Json) -> str:
    return next((str(o["uid"]) for o in pod["metadata"].get("ownerReferences") or () if o.get("controller")), "")
