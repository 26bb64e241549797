"""The laptop as a place: a Runner of processes.

Each workload is one program in its own session with its own folder `jobs/<name>/` (job_folder.py). A shell of a few
lines supervises it and writes its exit code, so a program outlives a kill -9 of whoever asked for it, and the next one
who asks adopts it. Asked about a name that
- runs: it waits for its end;
- exited 0: it answers with that outcome;
- failed: it starts it anew (the old log stays as log.1.txt, log.2.txt, ...);
- is an attempt of a training (image "train") whose end nobody has been told yet: it answers with that outcome, once,
  because attempts are counted.
How an exit is read as a cause stands in exit_causes.py. `on_line` and `logs` give the log from its beginning.

Not covered: the fields in IGNORED. A laptop has one node and no images; it limits neither CPU nor memory; how many
processes a program starts stands in its own argv. `spot` counts only where a SpotMarket was given. Windows.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from deployments import processes
from deployments.errors import GiveUp
from deployments.exit_causes import cause_of, oom_kills
from deployments.job_folder import JobFolder
from deployments.processes import JOB_MARK as MARK
from deployments.spot_market import PROGRESS, SpotMarket
from deployments.workload import Cause, Outcome, Workload

IGNORED = ("image", "resources", "replicas", "processes")  # fields of Workload that mean nothing here
POLL_SECONDS = 0.04
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# No fork after the program's end: what we kill in rounds must not hit the telling of the code. The trap keeps a signal
# to the whole group from taking the supervisor first; a trapped signal, unlike an ignored one, is back at its default
# in the program.
_SUPERVISOR = """trap : TERM INT HUP QUIT
cd "$1" || exit 1
shift
"$@"
echo $? > exit"""


class Laptop:
    """Runs workloads as processes of this machine; implements `Runner`."""

    place = "laptop"

    def __init__(
        self,
        jobs: Path,
        python: str = sys.executable,
        *,
        market: SpotMarket | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """`jobs`: the folder with one folder a workload. `python`: what "python" means. `env`: for every workload."""
        self.jobs, self.python, self.market, self.env = Path(jobs).resolve(), python, market, dict(env or {})

    def run(self, workload: Workload, *, on_line: Callable[[str], None] | None = None) -> Outcome:
        """Create or adopt `workload.name` and wait for its end; see the module's text for what a name that ended means.

        Raises GiveUp for a name that is no DNS label. Whatever is raised while waiting (KeyboardInterrupt, an error of
        `on_line`) leaves the workload running: `stop` it or ask for it again.
        """
        job = self._job(workload.name)
        with job.lock():
            adopted = self._adopt(job, workload)
            if isinstance(adopted, Outcome):
                return adopted
            supervisor = job.supervisor() if adopted else self._start(job, workload)
        assert supervisor is not None
        for line in self._follow(job, supervisor, lambda: self._intervene(job, workload, supervisor)):
            if on_line:
                on_line(line)
        with job.lock():
            return replace(self._told(job, workload, supervisor), adopted=adopted)

    def stop(self, name: str, *, grace_seconds: float | None = None) -> None:
        """End it: SIGTERM to the program, after the grace (default: the workload's own) SIGKILL for the whole tree."""
        job = self._job(name)
        record, supervisor = job.read("process.json"), job.supervisor()
        if record is None or supervisor is None:
            return
        if supervisor.alive():
            grace = record["grace_seconds"] if grace_seconds is None else grace_seconds
            with job.lock():
                if job.supervisor() == supervisor:
                    self._end(job, supervisor, "cancelled", "somebody stopped it", grace)
            while supervisor.alive():
                self._enforce(job, supervisor)
                time.sleep(0.01)
        with job.lock():
            if job.supervisor() == supervisor:
                job.kill()

    def logs(self, name: str, *, follow: bool = False) -> Iterator[str]:
        """Lines of its newest log so far, and with `follow` those to come. Raises GiveUp if it was never started."""
        job = self._job(name)
        if not job.log.exists():
            raise GiveUp(f"job {name!r} has no log: {job.log} does not exist; it was never started in {self.jobs}")
        yield from self._follow(job, job.supervisor() if follow else None, lambda: None)

    def reap(self) -> list[str]:
        """SIGKILL what is left of jobs whose supervisor is gone. Call it at start. Returns "name: N processes"."""
        found: dict[str, int] = {}
        for folder in set(processes.marks(MARK).values()):
            job = JobFolder(Path(folder))
            if job.folder.parent == self.jobs:
                with job.lock():  # nobody is just starting it
                    supervisor = job.supervisor()
                    if (supervisor is None or not supervisor.alive()) and (killed := job.kill()):
                        found[job.folder.name] = len(killed)
        return [f"{name}: {count} process{'es' if count > 1 else ''}" for name, count in sorted(found.items())]

    def _job(self, name: str) -> JobFolder:
        if not _NAME.fullmatch(name):
            raise GiveUp(f"workload name {name!r}: expected a DNS label (a-z, 0-9 and -, at most 63, no - at the ends)")
        return JobFolder(self.jobs / name)

    def _adopt(self, job: JobFolder, workload: Workload) -> Outcome | bool:
        """True: it runs. An outcome: it has ended and is not to be started. False: start it."""
        supervisor = job.supervisor()
        if supervisor is None:
            supervisor = _unrecorded(job)
        if supervisor is None:
            return False
        if supervisor.alive():
            return True
        unheard = job.read("outcome.json") is None
        outcome = self._told(job, workload, supervisor)  # also where it is started anew: others may be waiting for it
        if outcome.exit_code == 0 or (workload.image == "train" and unheard):
            return replace(outcome, adopted=True)
        job.archive()
        return False

    def _start(self, job: JobFolder, workload: Workload) -> processes.Identity:
        job.write("request.json", dict(workload.request))
        places = {"{request}": str(job.request), "{result}": str(job.result), "{job}": str(job.folder)}
        argv = [self.python if part == "python" else part for part in workload.command]
        for word, path in places.items():
            argv = [part.replace(word, path) for part in argv]
        defaults = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # workers share the cores; the log is followed
        env = defaults | dict(os.environ) | self.env | dict(workload.env)
        env |= {"REPRISE_JOB": workload.name, MARK: str(job.folder)}
        start = {
            "started": time.time(),
            "grace_seconds": workload.grace_seconds,
            "oom_kills": oom_kills(),
            "argv": argv,
        }
        job.write("start.json", start | {"labels": dict(workload.labels)})
        shell = ["/bin/sh", "-c", _SUPERVISOR, "reprise-job", str(job.folder), *argv]
        supervisor = processes.spawn(shell, env=env, log=job.log)
        job.record(supervisor)
        return supervisor

    def _follow(self, job: JobFolder, supervisor: processes.Identity | None, tick: Callable[[], None]) -> Iterator[str]:
        """Lines of the log from its beginning until the supervisor is gone; `tick` is called at every turn."""
        rest = b""
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(job.log.open("rb"))
            wait = stack.enter_context(_waiter(supervisor))
            while True:
                alive = supervisor is not None and supervisor.alive()  # before reading, so that nothing is missed
                while chunk := file.read(1 << 16):
                    *lines, rest = (rest + chunk).split(b"\n")
                    # A progress bar rewrites its line with \r: what a person would see is the last part.
                    yield from (line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace") for line in lines)
                if not alive:
                    break
                tick()
                wait(POLL_SECONDS)
        if rest:
            yield rest.rpartition(b"\r")[2].decode(errors="replace")

    def _intervene(self, job: JobFolder, workload: Workload, supervisor: processes.Identity) -> None:
        """What the place does to a running workload: its deadline, the spot market, the end of a grace."""
        if job.read("ending.json") is not None:
            return self._enforce(job, supervisor)
        started = (job.read("process.json") or {}).get("started", time.time())
        limit = workload.deadline_seconds
        if limit is not None and time.time() - started > limit:
            return self._end(job, supervisor, "deadline", f"longer than its {limit:g} s", workload.grace_seconds)
        if self.market is None or not workload.spot or PROGRESS not in workload.env:
            return None
        progress = Path(workload.env[PROGRESS])
        due = self.market.due(progress, started=started)
        if due is None:
            return None
        with job.lock():
            if job.supervisor() != supervisor or not self.market.claim(progress, due, job=workload.name):
                return None
            grace = self.market.grace_seconds if due.notice else 0.0
            return self._end(job, supervisor, "spot", f"the spot market took it ({due.text})", grace)

    def _end(self, job: JobFolder, supervisor: processes.Identity, cause: Cause, why: str, grace: float) -> None:
        """Begin to end it: SIGTERM to the program, with no grace SIGKILL for the whole tree at once."""
        now = time.time()
        notice = now if cause == "spot" and grace > 0 else None
        job.write("ending.json", {"cause": cause, "why": why, "notice": notice, "kill_at": now + grace})
        if grace <= 0:
            return self._enforce(job, supervisor)
        # Just started, the supervisor may not have its program yet.
        until = time.monotonic() + 1
        while not (found := processes.children(supervisor.pid)) and supervisor.alive() and time.monotonic() < until:
            time.sleep(0.005)
        processes.send(found, signal.SIGTERM)
        return None

    def _enforce(self, job: JobFolder, supervisor: processes.Identity) -> None:
        """SIGKILL once the grace is over: first all but the supervisor, which then tells the code; later that too."""
        late = time.time() - (job.read("ending.json") or {}).get("kill_at", float("inf"))
        if late >= 0:
            job.kill(spare=supervisor if late < 3 else None)

    def _told(self, job: JobFolder, workload: Workload, supervisor: processes.Identity) -> Outcome:
        """The outcome of a job whose supervisor is gone, written down the first time. Call it under the lock."""
        for path in job.folder.glob("outcome*.json"):  # an older one, if somebody has started it anew meanwhile
            told = job.read(path.name)
            if told and told.pop("process", None) == asdict(supervisor):
                return Outcome(**told)
        job.kill()
        record, ending, code = (job.read("process.json") or {}, job.read("ending.json") or {}, job.exit())
        cause, reason = cause_of(code[0] if code else None, ending, record.get("oom_kills", 0))
        last_sign = job.log.stat().st_mtime if job.log.exists() else time.time()
        outcome = Outcome(
            name=workload.name,
            exit_code=code[0] if code else None,
            cause=cause,
            reason=reason,
            started=record.get("started", last_sign),
            ended=code[1] if code else last_sign,
            result=job.read("result.json"),
            notice=ending.get("notice"),
            node=os.uname().nodename,
            capacity="spot" if workload.spot else "on-demand",
            log=str(job.log),
        )
        job.write("outcome.json", asdict(outcome) | {"process": asdict(supervisor)})
        return outcome


def _unrecorded(job: JobFolder) -> processes.Identity | None:
    """The supervisor of a start whose starter died between starting it and writing down whom; None: never started."""
    if job.read("start.json") is None:
        return None
    whole = processes.tree(MARK, str(job.folder))
    top = next((pid for pid in sorted(whole) if processes.parent(pid) not in whole), None)
    if top is None and job.exit() is None:
        return None
    supervisor = processes.Identity.of(top) if top else processes.Identity(pid=0, start="")
    job.record(supervisor)
    return supervisor


@contextlib.contextmanager
def _waiter(supervisor: processes.Identity | None) -> Iterator[Callable[[float], object]]:
    """A sleep that the end of the supervisor cuts short, where the kernel has pidfd_open."""
    descriptor = -1
    if supervisor is not None and hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(supervisor.pid)
    if descriptor < 0:
        yield time.sleep
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        yield lambda seconds: poll.poll(seconds * 1000)
    finally:
        os.close(descriptor)
