"""From waiting pushes to runs in Prefect: fetch, compare, decide, hand over exactly once.

Of several pushes to a branch the newest counts; it is compared with the last commit that was decided, so nothing that
came between is forgotten. The run is asked for under an idempotency key of repository, commit and pipeline: a crash
between Prefect's answer and our record repeats the question and gets the same run. Prefect or the remote away, or a
checkout that git cannot read: tried again, however long it takes; only a commit that the remote does not have for a day
is given up. Not covered: receiving (flows.push_receiver, `reprise hook push`), running (flows.serve).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.errors import ConfigError, StepError, TryAgain
from flows.cluster_settings import ClusterSettings
from flows.fetch import SHA, NotThere, fetch_commit, has_commit, is_ancestor
from flows.prefect_api import Prefect
from flows.project import Project, Unsound
from flows.push_plan import Decision, decide, keys_at
from flows.push_queue import ZERO, Entry, Push, PushQueue, Unusable
from flows.settings import PipelineSettings, PlaceSettings, load_pipeline
from flows.start import Order, pipeline_file
from flows.triggers import any_place, prefect_of

LONGEST_SETTLE = 60.0  # seconds: however fast they come, a burst is decided after this
REMOTE_PATIENCE = 86_400.0  # seconds that a remote may be without the commit before the push is refused
LEAST_TRIES = 20  # before that: a clock that was put forward must not refuse a push
LONGEST_PAUSE = 60.0  # seconds between tries for a commit that is not there; a quarter of it for a server that is away
POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Target:
    """One pipeline that pushes can start, as its checkout on this machine describes it."""

    settings: PipelineSettings
    place: PlaceSettings | ClusterSettings
    project: Project
    queue: PushQueue
    prefect: Prefect

    @property
    def name(self) -> str:
        """The pipeline's."""
        return self.settings.name


def open_target(pipeline: str, place: str) -> Target:
    """Read the pipeline file on disk: what may start runs is decided here, not by a push. Raises ConfigError.

    The queue is on a disk of this machine also where runs are a cluster's: SQLite wants no network volume.
    """
    file = pipeline_file(Order(pipeline=pipeline))
    settings = any_place(place, file.parent)
    state = file.parent / ".reprise" if isinstance(settings, ClusterSettings) else settings.state
    described = load_pipeline(file)
    return Target(
        settings=described,
        place=settings,
        project=Project(file.parent),
        queue=PushQueue(state / "push" / f"{described.name}.db"),
        prefect=prefect_of(settings),
    )


def drain(target: Target) -> list[Entry]:
    """Decide what is due; returns the entries that are decided now. Nothing when another process is at it."""
    with target.queue.turn() as ours:
        waiting = target.queue.waiting() if ours else []
        branches = itertools.groupby(sorted(waiting, key=lambda e: (e.push.branch, e.number)), lambda e: e.push.branch)
        touched = [e for _, group in branches for e in _branch(target, list(group))]
    found = [target.queue.find(e.id) for e in touched]
    return [e for e in found if e and e.state != "waiting"]


def drain_forever(target: Target, stopped: Callable[[float], bool], tell: Callable[[str], None]) -> None:
    """Drain until `stopped(seconds)`, which also is the wait between looks, says so. Survives whatever goes wrong."""
    told = ""
    while not stopped(POLL_SECONDS):
        try:
            for entry in drain(target):
                tell(f"{target.name}: {sentence(entry)}")
            told = ""
        except Exception as error:  # one bad look must not end the receiver
            if str(error) != told:
                told = str(error)
                tell(f"{target.name}: {one_line(told)}")


def sentence(entry: Entry) -> str:
    """What became of a push, for a person: one line that no push can make look like another."""
    what = f"{entry.push.branch} {entry.push.after[:7]}"
    if entry.state == "waiting":
        return one_line(f"{what}: waiting" + (f" ({entry.reason})" if entry.reason else ""))
    verb = entry.action if entry.state == "started" else entry.state
    run = f"; flow run {entry.flow_run}" if entry.flow_run else ""
    return one_line(f"{what}: {verb}, because {entry.reason}{run}")


def one_line(text: str) -> str:
    """The same with control characters written out: reasons quote what was pushed, and go to terminals and logs."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _branch(target: Target, entries: list[Entry]) -> list[Entry]:
    """One branch's waiting pushes, oldest first; returns those that were looked at.

    Nothing that is wrong with one branch, or with one commit, keeps the others waiting.
    """
    now, settle = time.time(), target.settings.push.settle
    # A clock that was put back has left times in the future behind: they are over.
    if 0 <= now - entries[-1].received < settle and 0 <= now - entries[0].received < LONGEST_SETTLE:
        return []
    newest = entries[-1]
    if 0 < newest.next_try - now <= LONGEST_PAUSE:
        return []
    try:
        _decide(target, entries)
    except Unusable:
        raise
    except NotThere as error:
        _put_off(target, newest, str(error), lost=True)
        if entries[:-1]:
            _branch(target, entries[:-1])
    except (TryAgain, Unsound) as error:
        _put_off(target, newest, str(error))
    except StepError as error:
        target.queue.decide(newest, "refused", reason=str(error))
    except Exception as error:
        _put_off(target, newest, f"{type(error).__name__}: {error}", lost=True)
    return entries


def _put_off(target: Target, entry: Entry, reason: str, *, lost: bool = False) -> None:
    """Try it again later; what only its own commit can be at fault for (`lost`) not for ever."""
    waited = time.time() - entry.received
    if lost and waited > REMOTE_PATIENCE and entry.tries >= LEAST_TRIES:
        target.queue.decide(entry, "refused", reason=reason)
    else:
        longest = LONGEST_PAUSE if lost else LONGEST_PAUSE / 4
        target.queue.postpone(entry, min(2.0 ** min(entry.tries, 10), longest), reason)


def _decide(target: Target, entries: list[Entry]) -> None:
    queue, project = target.queue, target.project
    newest = entries[-1]
    fetch_commit(project, newest.push.after, remote=target.settings.push.remote, branch=newest.push.branch)
    # A delivery that was late is older than what came before it, unless somebody went back to it by force.
    for other in reversed(entries[:-1]):
        if _late(project, newest.push, other.push.after):
            newest = other
    last = queue.last_decided(newest.push.branch)
    if last and (last.push.after == newest.push.after or _late(project, newest.push, last.push.after)):
        for entry in entries:
            queue.decide(entry, "superseded", reason=f"{last.push.after[:7]} was decided already")
        return
    base = last.push.after if last else entries[0].push.before
    decision = _compare(target, base, newest.push)
    flow_run = ""
    if decision.action != "nothing":
        flow_run = hand_over(target, newest)
    queue.decide(
        newest,
        "started" if flow_run else "nothing",
        action=decision.action,
        reason=decision.reason,
        flow_run=flow_run,
    )
    for entry in entries:
        if entry.number != newest.number:
            queue.decide(entry, "superseded", reason=f"{newest.push.after[:7]} is newer")


def _late(project: Project, push: Push, than: str) -> bool:
    """Whether `push` moved its branch forward to a commit that `than` has in its history already."""
    forward = push.before == ZERO or is_ancestor(project, push.before, push.after)
    return push.after != than and forward and is_ancestor(project, push.after, than)


def _compare(target: Target, base: str, push: Push) -> Decision:
    """The decision about what lies between two commits. Raises ConfigError for a commit that cannot be run."""
    after = keys_at(target.project, target.settings, push.after)
    before = None
    if base != ZERO and has_commit(target.project, base):
        try:
            before = keys_at(target.project, target.settings, base)
        except StepError:  # it was broken before: there is nothing to compare with
            before = None
    return decide(before, after)


def hand_over(target: Target, entry: Entry) -> str:
    """Ask Prefect for the run of a push; returns the flow run's id. Raises TryAgain while Prefect is away.

    The key is repository, commit and pipeline; where a branch goes back to a commit that had its run, that is a cause
    of its own, told apart by the push's id.
    """
    from flows.triggers import register

    push = entry.push
    deployment = target.prefect.deployment(target.name)
    deployment_id = deployment["id"] if deployment else register(target.settings, target.place)
    key = f"{push.repository}@{push.after}:{target.name}"
    if target.queue.started(push.after):
        key += f":{entry.id}"
    tags = [target.name, "push", f"branch:{push.branch}"]
    run = target.prefect.start(
        deployment_id,
        parameters={"rev": push.after, "cause": "push"},
        name=f"{target.name} {push.after[:7]} push",
        tags=tags,
        idempotency_key=key,
    )
    for older in target.prefect.runs(states=["SCHEDULED"], deployment=deployment_id, tags=tags):
        if older["id"] != run["id"]:
            message = f"Superseded by the push of {push.after[:7]}."
            target.prefect.set_state(older["id"], "CANCELLED", "Superseded", message)
    return str(run["id"])


def local_push(target: Target, before: str, after: str, ref: str) -> tuple[Push | None, str]:
    """(the push that a hook on this machine tells of, why it is none that could start a run). Raises ConfigError."""
    for sha in (before, after):
        if not SHA.fullmatch(sha):
            raise ConfigError(f"commit {sha!r} is no full sha; expected 40 hex digits, as git gives them to a hook")
    if not ref.startswith("refs/heads/"):
        return None, f"{ref} is no branch"
    if after == ZERO:
        return None, "the branch was deleted"
    branch = ref.removeprefix("refs/heads/")
    if branch not in target.settings.push.branches:
        return None, f"branch {branch} is not listed in [push] branches"
    name = target.settings.push.repository or target.project.root.name
    return Push(repository=name, branch=branch, before=before, after=after, body=str(time.time_ns())), ""


def wait_for(target: Target, push_id: str, seconds: float) -> Entry:
    """Drain until the push is decided or the time is over; returns its entry as it is then."""
    until = time.monotonic() + seconds
    while True:
        drain(target)
        entry = target.queue.find(push_id)
        if entry is None:
            raise ConfigError(f"push {push_id!r} is not in {target.queue.path}; expected the id of a push")
        if entry.state != "waiting" or time.monotonic() > until:
            return entry
        time.sleep(0.1)
