"""Runs that start by themselves, with real parts: Prefect's server and worker, git push, signed HTTP, kills.

    .venv/bin/pytest -m e2e tests/test_triggers_laptop.py

One project behind a bare repository lives through it; order matters. The UI is walked by tests/flows/ui_form.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flows.example import create_project
from flows.prefect_api import Prefect
from flows.push_queue import PushQueue
from flows.zombies import REVIVALS
from tests.flows.push_kit import SECRET, git, payload, signed

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PORT = 18540
NAMES = ("prefect", "mlflow", "inference", "management", "metrics", "grpc_inference", "grpc_management", "workers")
RECEIVER = PORT + 30
ROOT = Path(__file__).resolve().parents[1]


class Project:
    """Reprise's checkout, a developer's clone, the bare repository between them, and the commands."""

    def __init__(self, root: Path) -> None:
        self.root, self.bare, self.work, self.folder = root, root / "digits.git", root / "work", root / "checkout"
        create_project("digits", self.work)
        self.change("epochs = 12", "epochs = 2", commit=False)
        self.change("minimum = 0.95", "minimum = 0.1", commit=False)
        self.change("tolerance = 0.01", "tolerance = 1.0", commit=False)
        text = (self.work / "pipeline.toml").read_text()
        push = '\n[push]\nrepository = "acme/digits"\nsettle = "1s"\n\n[schedule]\nrev = "origin/main"\n'
        (self.work / "pipeline.toml").write_text(text + push)
        (self.work / ".dvc" / "config").write_text(
            (self.work / ".dvc" / "config").read_text().replace("../.dvc-remote", str(self.work / ".dvc-remote"))
        )
        git(self.work, "commit", "-qam", "quick, and pushes")
        git(root, "clone", "-q", "--bare", str(self.work), str(self.bare))
        git(self.work, "remote", "add", "origin", str(self.bare))
        git(root, "clone", "-q", str(self.bare), str(self.folder))
        ports = "\n".join(f"{name} = {PORT + n}" for n, name in enumerate(NAMES))
        (self.folder / "laptop.toml").write_text(f'[place]\nkind = "laptop"\n\n[ports]\n{ports}\n')
        self.prefect = Prefect(url=f"http://127.0.0.1:{PORT}")
        self.store = self.folder / ".reprise" / "store"

    def command(self, *arguments: str, code: int = 0) -> str:
        argv = [sys.executable, "-m", "flows", *arguments]
        done = subprocess.run(argv, cwd=self.folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, (
            f"reprise {' '.join(arguments)}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout

    def change(self, old: str, new: str, file: str = "pipeline.toml", *, commit: bool = True) -> tuple[str, str]:
        """Edit, commit and push; (before, after)."""
        text = (self.work / file).read_text()
        assert old in text, old
        (self.work / file).write_text(text.replace(old, new))
        if not commit:
            return "", ""
        before = self.head()
        git(self.work, "commit", "-qam", f"{old} -> {new}")
        git(self.work, "push", "-q", "--force", "origin", "main")
        return before, self.head()

    def head(self) -> str:
        return git(self.work, "rev-parse", "HEAD")

    def set_schedule(self, text: str) -> None:
        """[schedule] of the checkout, as an operator edits it, and `reprise deploy`."""
        file = self.folder / "pipeline.toml"
        before = file.read_text().partition("\n[schedule]")[0]
        file.write_text(f'{before}\n[schedule]\nrev = "origin/main"\n{text}\n')
        self.command("deploy")

    def runs(self) -> list[dict[str, Any]]:
        deployment = self.prefect.deployment("digits")
        assert deployment
        body = {"deployments": {"id": {"any_": [deployment["id"]]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 200}
        found: list[dict[str, Any]] = self.prefect.call("POST", "/flow_runs/filter", body)
        return found

    def start(self, **parameters: Any) -> str:
        deployment = self.prefect.deployment("digits")
        assert deployment
        answer = self.prefect.start(
            deployment["id"], parameters=parameters, name="by test", tags=[], idempotency_key=str(time.time_ns())
        )
        return str(answer["id"])

    def state(self, flow_run: str) -> str:
        found = self.prefect.run(flow_run)
        assert found
        return str(found["state"]["name"])

    def wait(self, flow_run: str, *states: str, seconds: float = 150) -> str:
        until = time.monotonic() + seconds
        while (now := self.state(flow_run)) not in states:
            assert time.monotonic() < until, f"{flow_run} is {now}, not {states}: {self.prefect.run(flow_run)}"
            assert now not in ("Failed", "Crashed") or REVIVALS, now
            time.sleep(0.2)
        return now

    def document(self, flow_run: str) -> dict[str, Any]:
        began = json.loads((self.store / "flow-runs" / f"{flow_run}.json").read_text())
        found: dict[str, Any] = json.loads((self.store / "runs" / f"{began['run']}.json").read_text())
        return found

    def trained_steps(self, flow_run: str) -> int:
        """How far its trainer is."""
        try:
            key = next(s["key"] for s in self.document(flow_run)["steps"] if s["name"] == "train_model")
            text = (self.store / "trainings" / key / "progress.jsonl").read_text()
        except OSError:
            return 0
        return max((json.loads(line).get("step", 0) for line in text.splitlines() if '"step"' in line), default=0)

    def processes(self, flow_run: str) -> list[int]:
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                inside = f"PREFECT__FLOW_RUN_ID={flow_run}".encode() in (entry / "environ").read_bytes()
                engine = b"prefect.engine" in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if inside and engine:
                found.append(int(entry.name))
        return found

    def versions(self) -> list[str]:
        url = f"http://127.0.0.1:{PORT + 1}/api/2.0/mlflow/model-versions/search?max_results=1000"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return [v["version"] for v in json.load(reply).get("model_versions", [])]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    made = Project(tmp_path_factory.mktemp("triggers"))
    made.command("up")
    made.command("deploy")
    yield made
    made.command("down")
    left = [n for n in range(len(NAMES)) if _taken(PORT + n)]
    assert left == []
    assert _processes_of(made.root) == []


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _processes_of(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if entry.name != str(os.getpid()) and (
                str(folder) in line or os.readlink(entry / "cwd").startswith(str(folder))
            ):
                found.append(line)
        except OSError:
            continue
    return found


def _until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


def test_a_schedule_fires_and_retrains(project: Project) -> None:
    project.change("seed = 7", "seed = 8")  # pushed, and not in the checkout: "origin/main" is fetched
    project.set_schedule('cron = "* * * * *"')
    flow_run = _until(
        lambda: next((r["id"] for r in project.runs() if r["state"]["name"] in ("Pending", "Running")), ""),
        100,
        "a scheduled run starts",
    )
    project.set_schedule('cron = "* * * * *"\npaused = true')
    project.wait(flow_run, "Completed")
    document = project.document(flow_run)
    assert (document["cause"], document["git_sha"], document["status"]) == ("schedule", project.head(), "succeeded")
    name = (project.prefect.run(flow_run) or {})["name"]
    assert name == f"{document['run']} {project.head()[:7]} schedule"
    assert [r for r in project.runs() if r["state"]["type"] == "SCHEDULED"] == [], "paused: nothing is to come"


def test_one_retraining_at_a_time_and_the_next_waits_or_is_cancelled(project: Project) -> None:
    long = {"rev": "origin/main", "train": {"epochs": 200, "seed": 50}}
    first = project.start(**long)
    project.wait(first, "Running")
    second = project.start(rev="origin/main", train={"seed": 51})
    project.wait(second, "AwaitingConcurrencySlot", seconds=30)
    project.prefect.set_state(second, "CANCELLED", "Cancelled", "by test")
    project.set_schedule('overlap = "skip"')
    third = project.start(rev="origin/main", train={"seed": 52})
    project.wait(third, "Cancelled", seconds=30)
    project.set_schedule('overlap = "wait"')

    # Cancel in the UI is this state: the trainer saves, and a retry goes on where it was.
    _until(lambda: project.trained_steps(first) > 50, 60, "it trains")
    project.prefect.set_state(first, "CANCELLING", "Cancelling", "by test")
    project.wait(first, "Cancelled", seconds=45)
    document = project.document(first)
    (attempt,) = document["attempts"]
    assert (document["status"], attempt["cause"], attempt["steps_lost"]) == ("cancelled", "cancelled", 0)
    assert attempt["to_step"] > 50
    project.prefect.set_state(first, "SCHEDULED", "AwaitingRetry", "by test", force=True)
    again = _until(lambda: len(project.document(first)["attempts"]) == 2, 60, "the retry trains")
    assert again and project.document(first)["attempts"][1]["from_step"] == attempt["to_step"]
    assert project.document(first)["run"] == document["run"]
    project.prefect.set_state(first, "CANCELLING", "Cancelling", "by test")
    project.wait(first, "Cancelled", seconds=45)


def test_wrong_parameters_are_refused_by_the_server(project: Project) -> None:
    for wrong in ({"train": {"epochs": 0}}, {"rev": "--all"}, {"train": {"params": {"widht": 1}}}, {"nothing": 1}):
        with pytest.raises(Exception, match=r"answered 409|answered 422"):
            project.start(**wrong)


class Receiver:
    """`reprise hook serve` as a process."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "flows", "hook", "serve", "--port", str(RECEIVER)]
        environment = {**os.environ, "REPRISE_PUSH_SECRET": SECRET.decode()}
        with (self.project.root / "receiver.txt").open("ab") as log:
            self.process = subprocess.Popen(argv, cwd=self.project.folder, env=environment, stdout=log, stderr=log)
        _until(lambda: _taken(RECEIVER) or self.process.poll() is not None, 120, "the receiver listens")
        assert self.process.poll() is None, (self.project.root / "receiver.txt").read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{RECEIVER}/push", body, signed(body) if headers is None else headers
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, json.load(reply)["status"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["status"]


@pytest.fixture(scope="module")
def receiver(project: Project) -> Iterator[Receiver]:
    made = Receiver(project)
    try:
        made.start()
        yield made
    finally:
        made.kill(signal.SIGTERM)


def pushed_runs(project: Project, sha: str) -> list[dict[str, Any]]:
    return [r for r in project.runs() if r["parameters"].get("rev") == sha]


def decided(project: Project, sha: str, seconds: float = 60) -> dict[str, Any]:
    """The entry of a push, once it is decided."""

    def look() -> Any:
        entries = json.loads(project.command("hook", "list", "--json"))
        return next((e for e in entries if e["push"]["after"] == sha and e["state"] != "waiting"), None)

    found: dict[str, Any] = _until(look, seconds, f"the push of {sha} is decided")
    return found


def test_a_signed_push_retrains_at_exactly_that_commit(project: Project, receiver: Receiver) -> None:
    before, after = project.change("width = 16", "width = 8")
    body = payload(before, after, pusher={"name": "ada"})
    began = time.monotonic()
    assert receiver.post(body) == (202, "accepted")
    assert time.monotonic() - began < 2
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: receiver.post(body), range(100)))
    assert set(answers) == {(200, "duplicate")}
    entry = decided(project, after)
    assert (entry["state"], entry["action"], entry["reason"]) == (
        "started", "retrain", "[train.params] width changed",
    )  # fmt: skip
    project.wait(entry["flow_run"], "Completed")
    document = project.document(entry["flow_run"])
    assert (document["git_sha"], document["cause"]) == (after, "push")
    assert (project.prefect.run(entry["flow_run"]) or {})["name"].endswith(f"{after[:7]} push")
    assert len(pushed_runs(project, after)) == 1
    assert receiver.post(body) == (200, "duplicate")


def test_documentation_nothing_and_serving_no_training(project: Project, receiver: Receiver) -> None:
    before, after = project.change("Handwritten", "Written", "README.md")
    assert receiver.post(payload(before, after)) == (202, "accepted")
    assert decided(project, after)["state"] == "nothing"
    versions = project.versions()
    before, after = project.change("batch_size = 8", "batch_size = 4")
    assert receiver.post(payload(before, after)) == (202, "accepted")
    entry = decided(project, after)
    assert (entry["action"], entry["reason"]) == ("redeploy", "[serve] changed")
    project.wait(entry["flow_run"], "Completed")
    reused = {s["name"]: s["reused"] for s in project.document(entry["flow_run"])["steps"]}
    assert reused["train_model"] and reused["register_model"] and not reused["deploy_model"]
    assert project.versions() == versions


def test_forged_and_broken_ones_over_real_http(project: Project, receiver: Receiver) -> None:
    body = payload("a" * 40, "b" * 40)
    forged = {**signed(body), "X-Hub-Signature-256": "sha256=" + "0" * 64}
    assert receiver.post(body, forged) == (401, "refused")
    assert receiver.post(body, {"Content-Type": "application/json"}) == (401, "refused")
    assert receiver.post(body, {**signed(body), "Content-Type": "text/plain"}) == (415, "refused")
    assert receiver.post(b"{", signed(b"{")) == (400, "refused")
    big = b"x" * (10 << 20)
    # It may hang up on the sender in the middle of the ten megabytes: also a refusal.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, urllib.error.URLError):
        assert receiver.post(big) == (413, "refused")
    assert receiver.post(payload("0" * 40, "c" * 40, ref="refs/tags/v1")) == (202, "ignored")


@pytest.mark.parametrize("delay", [0.0, 0.3, 1.0, 1.4, 2.0])
def test_killed_between_receipt_and_hand_over_it_is_one_run(project: Project, receiver: Receiver, delay: float) -> None:
    """The worker's own loop is stopped for it, so that only the receiver decides."""
    worker = json.loads((project.folder / ".reprise/services/worker/process.json").read_text())["pid"]
    queue = PushQueue(project.folder / ".reprise" / "push" / "queue.db")
    while True:
        os.kill(worker, signal.SIGSTOP)
        with queue.turn() as free:  # stopped in the middle of its turn, it would keep everybody from theirs
            if free:
                break
        os.kill(worker, signal.SIGCONT)
        time.sleep(0.05)
    try:
        before, after = project.change("shift = 1", f"shift = 1  # {delay}")
        before, after = project.change("learning_rate = 0.00", f"learning_rate = 0.00{int(delay * 10)}")
        assert receiver.post(payload(before, after)) == (202, "accepted")
        time.sleep(delay)
        receiver.kill()
        receiver.start()
        assert receiver.post(payload(before, after)) == (200, "duplicate")
        assert decided(project, after)["state"] == "started"
        (run,) = pushed_runs(project, after)
        project.prefect.set_state(run["id"], "CANCELLED", "Cancelled", "by test")
    finally:
        os.kill(worker, signal.SIGCONT)


def test_prefect_away_when_it_is_pushed(project: Project, receiver: Receiver) -> None:
    record = json.loads((project.folder / ".reprise/services/prefect/process.json").read_text())
    os.killpg(record["pid"], signal.SIGKILL)
    before, after = project.change("dropout = 0.25", "dropout = 0.3")
    assert receiver.post(payload(before, after)) == (202, "accepted")
    time.sleep(20)
    waiting = json.loads(project.command("hook", "list", "--json"))[0]
    assert waiting["state"] == "waiting" and "does not answer" in waiting["reason"]
    project.command("up")
    entry = decided(project, after, 90)
    assert entry["state"] == "started"
    assert len(pushed_runs(project, after)) == 1
    project.wait(entry["flow_run"], "Completed", seconds=200)
    assert project.document(entry["flow_run"])["git_sha"] == after


def test_a_flow_killed_without_a_word_is_found_and_resumed_once(project: Project) -> None:
    versions = len(project.versions())
    flow_run = project.start(rev="origin/main", train={"epochs": 25, "seed": 77})
    _until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    worker = json.loads((project.folder / ".reprise/services/worker/process.json").read_text())["pid"]
    victims = [worker, *project.processes(flow_run)]
    assert len(victims) >= 2
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    assert project.state(flow_run) == "Running", "nobody is left to say otherwise"
    project.command("up")
    _until(lambda: (project.prefect.run(flow_run) or {})["state"]["name"] != "Running", 90, "it is found")
    assert time.monotonic() - began < 90, "within three heartbeats"
    project.wait(flow_run, "Completed", seconds=200)
    document = project.document(flow_run)
    assert (document["status"], document["resumed"]) == ("succeeded", 1)
    assert len(project.versions()) == versions + 1


def test_a_person_approves_or_refuses(project: Project) -> None:
    project.change('rev = "origin/main"', 'rev = "origin/main"\n\n[deploy]\napproval = true')
    flow_run = project.start(rev="origin/main", train={"seed": 90})
    project.wait(flow_run, "Suspended")
    _until(lambda: project.processes(flow_run) == [], 30, "its process ends: nothing is held while a person thinks")
    assert project.document(flow_run)["status"] == "waiting"
    other = project.start(rev="origin/main", train={"seed": 91})
    project.wait(other, "Suspended")
    answer = {"run_input": {"decision": "refuse", "comment": "not on a Friday"}}
    project.prefect.call("POST", f"/flow_runs/{other}/resume", answer)
    project.wait(other, "Failed")
    refused = project.document(other)
    assert refused["status"] == "refused" and "not on a Friday" in refused["message"]
    project.prefect.call("POST", f"/flow_runs/{flow_run}/resume", {"run_input": {"decision": "deploy", "comment": ""}})
    project.wait(flow_run, "Completed")
    document = project.document(flow_run)
    assert document["status"] == "succeeded"
    assert document["approval"]["decision"] == "deploy"
    assert all(s["reused"] for s in document["steps"] if s["name"] in ("train_model", "register_model"))


def test_down_lets_a_running_trainer_save_and_up_resumes_it(project: Project) -> None:
    flow_run = project.start(rev="origin/main", train={"epochs": 200, "seed": 92})
    _until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    project.command("down")
    document = project.document(flow_run)
    assert document["status"] == "interrupted"
    assert document["attempts"][-1]["steps_lost"] == 0
    project.command("up")
    _until(lambda: len(project.document(flow_run)["attempts"]) == 2, 120, "it goes on")
    assert project.document(flow_run)["attempts"][1]["from_step"] == document["attempts"][0]["to_step"]
    project.prefect.set_state(flow_run, "CANCELLING", "Cancelling", "by test")
    project.wait(flow_run, "Cancelled", seconds=60)
