"""One workload on Kubernetes from its creation to its outcome. The objects' status is the truth, logs are decoration.

Created, or adopted when it is there already. Then every change of the object or one of its pods is looked at, until the
object has ended and nothing of it runs any more: a training that failed because one pod was taken still has pods, which
are told to leave (with their grace, so that they save) and waited for. What is deleted by somebody else's hand is made
again, once. Whatever is raised while waiting leaves the workload running: stop it, or ask for it again.
Not covered: how ends are read (pod_causes.py), words for what holds a pod (pod_diagnosis.py), manifests.
"""

from __future__ import annotations

import contextlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from deployments.errors import GiveUp, PreflightError
from deployments.job_status import end_of, is_suspended
from deployments.kube_api import ApiStatus
from deployments.kube_watch import Following, uid_of
from deployments.manifests import CONTAINERS, ENDING_ANNOTATION, KEY_LABEL, Manifest, request_is_inside
from deployments.pod_causes import (
    PodEnd,
    capacity_of,
    exit_of,
    first_cause,
    is_scheduled,
    is_terminal,
    is_unreachable,
    stamp,
)
from deployments.pod_diagnosis import HOPELESS, PULL_REASONS, Waiting, not_created, one_line, waiting
from deployments.pod_log import PodLog, last_lines
from deployments.workload import Cause, Outcome, Workload

if TYPE_CHECKING:
    from deployments.cluster import Cluster

Json = dict[str, Any]
LOOK_SECONDS = 5.0  # at least that often, for what no event tells: deadlines
TELL_SECONDS = 5.0  # a pod that waits for longer is told of
EVENTS_SECONDS = 15.0  # how often events are asked for while it does not start and its status does not tell
NODE_AGAIN_SECONDS = 15.0  # how often a node that may be lost is asked for
RESULT_SECONDS = 5.0  # a file on a network volume may come into sight late


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What we, or somebody by `stop`, are ending the workload for. `error` is raised in place of an outcome."""

    cause: Cause
    reason: str
    error: Exception | None = None


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
        self.objects, self.pods, self.event, self.on_line = objects, pods, event, on_line
        self.api, self.container = cluster.api, CONTAINERS.get(workload.image, workload.image)
        self.training = workload.image == "train"
        self.path = cluster.object_path(workload.image, workload.name)
        self.uid, self.adopted, self.recreated = "", False, 0
        self.created = 0.0  # unix seconds, by this machine's clock where we made it
        self.ending: Ending | None = None
        self.checked, self.resting = False, False  # asked for the pods after the end; told the others to leave
        self.nodes: dict[str, Json] = {}
        self._node_asked: dict[str, float] = {}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._log: PodLog | None = None
        self._logged: set[str] = set()  # uids of pods whose log was or is read
        self._log_file: TextIO | None = None
        self._told, self._waiting_since = "", 0.0
        self._old: set[str] = set()  # uids of pods from before a suspension
        self._events_at = 0.0
        self._held_by_event: Waiting | None = None
        self._rest_at = 0.0

    def outcome(self) -> Outcome:
        """Create or adopt, wait, judge."""
        try:
            self._create_or_adopt()
            self._open_log()
            while True:
                self.event.clear()
                found = self._look()
                self._deliver()
                if found is not None:
                    return found
                self.event.wait(self._next_look())
        finally:
            if self._log is not None:
                self._log.close()
            if self._log_file is not None:
                self._log_file.close()

    def _next_look(self) -> float:
        """Seconds until something may be due that no event tells."""
        age = time.time() - self.created
        limits = (self.workload.deadline_seconds, self.workload.start_seconds)
        due = [limit - age + 0.05 for limit in limits if limit is not None and limit > age]
        watched = self.ending or self._rest_at or self._waiting_since or self.checked
        return max(0.05, min([LOOK_SECONDS, *due, 0.5 if watched else LOOK_SECONDS]))

    # --- creation

    def _create_or_adopt(self) -> None:
        """Raises GiveUp if the name belongs to something else."""
        collection = self.cluster.object_path(self.workload.image, "")
        while True:
            try:
                self._prepare_folder()
                made = self.api.request("POST", collection, body=self.wanted, on_wait=self._say)
                return self._is_ours(made, adopted=False)
            except ApiStatus as status:
                if status.code == 422 or status.code == 400:
                    raise GiveUp(f"the Kubernetes API refused {self.workload.name}: {status.message}") from status
                if status.code == 404:
                    raise PreflightError(f"{one_line(status.message)}; create the namespace first") from status
                if status.code != 409:
                    raise
                resent = status.resent
            there = self.api.find(self.path)
            if there is None:
                time.sleep(0.2)  # gone again, or a conflict of the quota's own bookkeeping
                continue
            self._check_identity(there)
            if there["metadata"].get("deletionTimestamp"):
                self._wait_gone(uid_of(there))
                continue
            end = end_of(there)
            if end is not None and not end.succeeded and not self.training:
                self.api.delete(self.path, uid=uid_of(there))  # a step that failed is started anew
                self._wait_gone(uid_of(there))
                continue
            return self._is_ours(there, adopted=not resent)

    def _is_ours(self, item: Json, *, adopted: bool) -> None:
        self.uid, self.adopted = uid_of(item), adopted
        self.checked = self.resting = False
        self._rest_at = 0.0
        asked = stamp(item["metadata"].get("creationTimestamp")) or time.time()
        self.created = asked if adopted else time.time()
        self.objects.put(item)

    def _check_identity(self, there: Json) -> None:
        ours = self.wanted["metadata"]["labels"].get(KEY_LABEL)
        labels = there["metadata"].get("labels") or {}
        theirs = labels.get(KEY_LABEL)
        if ours != theirs or labels.get("app.kubernetes.io/managed-by") != "reprise":
            raise GiveUp(
                f"{self.path}: there is an object of that name with {KEY_LABEL}={theirs}, expected {ours}; "
                "delete it if nobody needs it"
            )

    def _wait_gone(self, uid: str) -> None:
        """Until the object and its pods are away, so that two never run at once."""
        while True:
            there = self.api.find(self.path)
            if there is None or uid_of(there) != uid:
                return
            self.event.wait(0.5)
            self.event.clear()

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
        if any(not self.objects.is_gone(item) for item in self.objects.objects()):
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").unlink(missing_ok=True)
        if not inside:
            (folder / "request.json").write_text(json.dumps(dict(self.workload.request), sort_keys=True))

    # --- waiting

    def _look(self) -> Outcome | None:
        """What the last states say: an outcome, or None to wait on. Raises the error of an ending that is one."""
        item, gone = self._object()
        pods = self._own_pods()
        self._learn_nodes(pods)
        self._follow_log(pods)
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
        if not self._all_over(pods):
            return None
        if end is not None or self.ending is not None:
            return self._judge(item, pods)
        return self._again(pods) if gone else None

    def _object(self) -> tuple[Json, bool]:
        found = next(i for i in self.objects.objects() if uid_of(i) == self.uid)
        return found, self.objects.is_gone(found)

    def _own_pods(self) -> list[Json]:
        return [
            pod
            for pod in self.pods.objects()
            if any(owner.get("uid") == self.uid for owner in pod["metadata"].get("ownerReferences") or ())
        ]

    def _ask_for_pods(self) -> None:
        """The two watches are not in step: when the object has ended, ask for the pods as they are."""
        for pod in self.cluster.pods_of(self.workload.name):
            self.pods.put(pod)

    def _limits(self, item: Json, pods: list[Json]) -> None:
        """What the place does to a workload that goes on: deadline, no capacity, a start that cannot be, a lost pod."""
        age = time.time() - self.created
        limit, patience = self.workload.deadline_seconds, self.workload.start_seconds
        if limit is not None and age > limit:
            return self._end(Ending(cause="deadline", reason=f"longer than its {limit:g} s"))
        if is_suspended(item):
            self._old |= {uid_of(p) for p in pods}
            held: Waiting | None = Waiting(reason="Suspended", sentence="it is suspended, by its queue or a person")
        else:
            pods = [p for p in pods if uid_of(p) not in self._old]
            if self.training and self._lost_one(pods):
                return self._end(None)
            held = self._held(item, [p for p in pods if not self.pods.is_gone(p)])
        if held is None:
            self._told, self._waiting_since = "", 0.0
        else:
            self._waiting_since = self._waiting_since or time.time()
            since = time.time() - self._waiting_since
            if since > TELL_SECONDS or held.reason in HOPELESS:
                self._tell(held.sentence)
            fatal = held.reason in PULL_REASONS or held.reason == "CreateContainerConfigError"
            if held.reason in HOPELESS or (fatal and since > self.cluster.start_patience):
                error = PreflightError(f"{self.workload.name} cannot start: {held.sentence}")
                return self._end(Ending(cause="user_error", reason=held.sentence, error=error))
        replicas = self.workload.replicas if self.training else 1
        started = len([p for p in pods if is_scheduled(p)]) >= replicas
        if patience is not None and not started and age > patience:
            why = held.sentence if held else "no pod was scheduled"
            self._end(Ending(cause="no_capacity", reason=f"no node within {patience:g} s: {why}"))
        return None

    def _held(self, item: Json, pods: list[Json]) -> Waiting | None:
        """What keeps it from starting; the events are asked for when the pods' status does not tell."""
        found = next((w for p in pods if (w := waiting(p))), None)
        running = pods and all(_phase(p) != "Pending" for p in pods)
        if found is not None or running:
            self._events_at = 0.0
            return found
        now = time.monotonic()
        self._events_at = self._events_at or now + EVENTS_SECONDS
        if now > self._events_at:
            self._events_at, self._held_by_event = now + EVENTS_SECONDS, None
            for about in pods or [item]:
                kind = "Pod" if pods else ("PyTorchJob" if self.training else "Job")
                events = self.cluster.events_about(kind, about["metadata"]["name"])
                self._held_by_event = self._held_by_event or (waiting(about, events) if pods else not_created(events))
        return self._held_by_event

    def _lost_one(self, pods: list[Json]) -> bool:
        """Whether a pod vanished without the operator having seen it fail: it would start it again in this attempt."""
        lost = [p for p in pods if self.pods.is_gone(p) and exit_of(p, self.container).get("exitCode") != 0]
        if not lost:
            return False
        fresh = self.api.find(self.path)
        if fresh is None or uid_of(fresh) != self.uid or is_suspended(fresh) or end_of(fresh):
            if fresh is not None:
                self.objects.put(fresh)
            return False
        return True

    def _end(self, ending: Ending | None) -> None:
        """Delete the object, its pods with their grace. None: the attempt has ended by itself, its pods tell why."""
        self.ending = ending or Ending(cause="node_lost", reason="")
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
            if not (is_terminal(pod) or self.pods.is_gone(pod) or pod["metadata"].get("deletionTimestamp")):
                path = self.cluster.pod_path(pod["metadata"]["name"])
                self.api.delete(path, propagation="Background", uid=uid_of(pod))

    def _all_over(self, pods: list[Json]) -> bool:
        """Whether nothing runs any more. A pod on a node that does not answer is given up after a while."""
        now = time.time()
        for pod in pods:
            if is_terminal(pod) or self.pods.is_gone(pod):
                continue
            deleting = stamp(pod["metadata"].get("deletionTimestamp"))
            if deleting is None or now < deleting + self.cluster.lost_node_seconds:
                return False
            if not is_unreachable(self._node(pod, again=True)):
                return False
        return True

    def _again(self, pods: list[Json]) -> Outcome | None:
        """Deleted by somebody's hand: made again once, the second time it is taken for a wish."""
        if self.recreated:
            why = "it was deleted twice by somebody's hand"
            return self._outcome("cancelled", why, self._first(pods), pods)
        self.recreated += 1
        self._say(f"{self.workload.name} was deleted by somebody's hand; making it again")
        self._create_or_adopt()
        self.event.set()
        return None

    # --- nodes, logs, words

    def _learn_nodes(self, pods: list[Json]) -> None:
        for pod in pods:
            if is_scheduled(pod) and pod["spec"]["nodeName"] not in self.nodes:
                self._node(pod)

    def _node(self, pod: Json, *, again: bool = False) -> Json:
        """The pod's node as last seen; {} if there is none or it may not be read."""
        name = (pod.get("spec") or {}).get("nodeName")
        if not name:
            return {}
        asked = self._node_asked.get(name, 0.0)
        if name not in self.nodes or (again and time.monotonic() - asked > NODE_AGAIN_SECONDS):
            self._node_asked[name] = time.monotonic()
            self.nodes[name] = self.cluster.node(name, before=self.nodes.get(name))
        return self.nodes[name]

    def _follow_log(self, pods: list[Json]) -> None:
        """Read the log of the newest pod that has begun (of a training: of the master's)."""
        if self.training:
            pods = [p for p in pods if p["metadata"]["name"].endswith("-master-0")]
        begun = [p for p in pods if exit_of(p, self.container) or _phase(p) == "Running"]
        begun = [p for p in begun if uid_of(p) not in self._logged and not self.pods.is_gone(p)]
        if not begun:
            return
        newest = max(begun, key=lambda p: str(p["metadata"].get("creationTimestamp")))
        if self._log is not None:
            self._log.finish(2.0)
        self._logged.add(uid_of(newest))
        self._log = PodLog(self.api, self.cluster.pod_path(newest["metadata"]["name"]), self.container)
        self._log.start(self._sink)

    def _sink(self, line: str) -> None:
        if self._log_file is not None:
            self._log_file.write(line + "\n")
        self._lines.put(line)
        self.event.set()

    def _open_log(self) -> None:
        folder = self.cluster.local_folder(self.workload.name)
        if folder is not None:
            with contextlib.suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                self._log_file = (folder / "log.txt").open("w", buffering=1)

    def _deliver(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                line = self._lines.get_nowait()
                if self.on_line:
                    self.on_line(line)

    def _say(self, text: str) -> None:
        if self.on_line:
            self.on_line(f"cluster: {text}")

    def _tell(self, text: str) -> None:
        """Say what it waits for, once, and again when it changes by more than numbers."""
        plain = re.sub(r"\d+", "", text)
        if plain != self._told:
            self._told = plain
            self._say(f"waiting: {text}")

    # --- the end

    def _judge(self, item: Json, pods: list[Json]) -> Outcome:
        """The outcome of a workload of which nothing runs any more."""
        first = self._first(pods)
        if self.ending is not None and self.ending.error is not None:
            raise self.ending.error
        if self.ending is not None and self.ending.reason:
            return self._outcome(self.ending.cause, self.ending.reason, first, pods)
        end = end_of(item)
        if end is not None and end.succeeded:
            return self._outcome("complete", "exit 0", None, pods, code=0)
        if end is not None and end.reason == "DeadlineExceeded":
            limit = self.workload.deadline_seconds
            return self._outcome("deadline", f"longer than its {limit or 0:g} s", first, pods)
        if first is not None:
            return self._outcome(first.cause, first.reason, first, pods)
        # Its pods are gone with what they could have told; a bug would have left a pod that failed.
        capacity = self._capacity(pods, None)
        taken = self.training and capacity == "spot"
        why = end.message if end is not None else "its pods vanished"
        reason = f"its pods are gone while nobody watched: {one_line(why)}"
        return self._outcome("spot" if taken else "node_lost", reason, None, pods)

    def _first(self, pods: list[Json]) -> PodEnd | None:
        for pod in pods:
            self._node(pod, again=True)
        evicted = [p for p in pods if any(c.get("reason") == "EvictionByEvictionAPI" for c in _conditions(p))]
        events: list[Json] = []
        for pod in evicted:
            events += self.cluster.events_about("Pod", pod["metadata"]["name"])
            events += self.cluster.events_about("Node", pod["spec"]["nodeName"])
        pairs = [(p, self.pods.is_gone(p)) for p in pods]
        return first_cause(pairs, container=self.container, nodes=self.nodes, events=events, now=time.time())

    def _outcome(
        self, cause: Cause, reason: str, first: PodEnd | None, pods: list[Json], *, code: int | None = None
    ) -> Outcome:
        if self._log is not None:
            self._log.finish(5.0)
        if first is not None and cause == "user_error":
            self._keep_tail(first, pods)
        self._deliver()
        starts = [t for p in pods if (t := stamp((p.get("status") or {}).get("startTime")))]
        ends = [t for p in pods if (t := stamp(exit_of(p, self.container).get("finishedAt")))]
        item, _ = self._object()
        main = next((p for p in pods if first and p["metadata"]["name"] == first.pod), pods[-1] if pods else None)
        folder = self.cluster.local_folder(self.workload.name)
        command = f"kubectl logs -n {self.cluster.settings.namespace} -l reprise.dev/workload={self.workload.name}"
        return Outcome(
            name=self.workload.name,
            exit_code=first.exit_code if first else code,
            cause=cause,
            reason=reason,
            started=min(starts) if starts else stamp(item["metadata"].get("creationTimestamp")) or time.time(),
            ended=max(ends) if ends else time.time(),
            result=self._result(pods, expected=cause == "complete"),
            adopted=self.adopted,
            notice=first.notice if first else None,
            node=first.node if first else ((main or {}).get("spec") or {}).get("nodeName") or "",
            capacity=self._capacity(pods, main),
            log=str(folder / "log.txt") if folder is not None and self._log_file is not None else command,
        )

    def _capacity(self, pods: list[Json], main: Json | None) -> str:
        """Of the pod that decided; of a training with workers, theirs, since the master is on-demand by design."""
        for pod in [main] if main else [p for p in pods if "-worker-" in p["metadata"]["name"]] or pods:
            if found := capacity_of(pod, self._node(pod)):
                return found
        return "spot" if self.workload.spot else "on-demand"

    def _keep_tail(self, first: PodEnd, pods: list[Json]) -> None:
        """The words of a pod that failed and is not the one whose log was read."""
        pod = next((p for p in pods if p["metadata"]["name"] == first.pod), None)
        if pod is None or uid_of(pod) in self._logged or self.pods.is_gone(pod):
            return
        for line in [f"--- {first.pod}", *last_lines(self.api, self.cluster.pod_path(first.pod), self.container, 50)]:
            self._sink(line)

    def _result(self, pods: list[Json], *, expected: bool) -> Json | None:
        """What the program wrote: the file on the state volume, else the pod's termination message."""
        folder = self.cluster.local_folder(self.workload.name)
        for pod in pods:
            with contextlib.suppress(ValueError):
                message = json.loads(exit_of(pod, self.container).get("message") or "")
                if isinstance(message, dict) and "ok" in message:
                    return message
        until = time.monotonic() + (RESULT_SECONDS if expected and not self.training else 0.0)
        while folder is not None:
            found = _read(folder / "result.json")
            if found is not None or time.monotonic() > until:
                return found
            time.sleep(0.1)
        return None


def _told_to_end(item: Json) -> Ending | None:
    """What `stop` wrote into the object before it deleted it."""
    why = (item["metadata"].get("annotations") or {}).get(ENDING_ANNOTATION)
    return Ending(cause="cancelled", reason=why) if why else None


def _phase(pod: Json) -> str:
    return str((pod.get("status") or {}).get("phase"))


def _conditions(pod: Json) -> list[Json]:
    return (pod.get("status") or {}).get("conditions") or []


def _read(path: Path) -> Json | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
