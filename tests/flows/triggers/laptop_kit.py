"""The laptop place with triggers, driven from outside: commands, git, Prefect's API, signed requests. For e2e tests.

Everything is real: `reprise up` and `deploy` in a checkout, a developer's clone, the bare repository between them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flows.example import create_project
from flows.prefect_api import Prefect
from flows.zombies import REVIVALS
from tests.flows.forge_kit import TOKEN
from tests.flows.push_kit import SECRET, git, signed
from tests.laptop_leftovers import taken

PORT = 18540
NAMES = ("prefect", "mlflow", "inference", "management", "metrics", "grpc_inference", "grpc_management", "workers")
RECEIVER = PORT + 30


class Project:
    """Reprise's checkout, a developer's clone, the bare repository between them, and the commands."""

    def __init__(self, root: Path) -> None:
        self.root, self.bare, self.work, self.folder = root, root / "digits.git", root / "work", root / "checkout"
        create_project("digits", self.work)
        self.change("epochs = 12", "epochs = 2", commit=False)
        self.change("minimum = 0.95", "minimum = 0.1", commit=False)
        self.change("tolerance = 0.01", "tolerance = 1.0", commit=False)
        text = (self.work / "pipeline.toml").read_text()
        push = '[push]\nrepository = "acme/digits"\nbranches = ["main", "next"]\nsettle = "1s"\n'
        schedule = '[schedule]\nrev = "origin/main"\n'
        (self.work / "pipeline.toml").write_text(f"{text}\n{push}\n{schedule}")
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

    def change_on(self, branch: str, old: str, new: str) -> tuple[str, str]:
        """The same on a branch of its own, made from where main is; (before, after)."""
        git(self.work, "checkout", "-q", "-B", branch)
        try:
            before = self.head()
            text = (self.work / "pipeline.toml").read_text()
            assert old in text, old
            (self.work / "pipeline.toml").write_text(text.replace(old, new))
            git(self.work, "commit", "-qam", f"{old} -> {new}")
            git(self.work, "push", "-q", "--force", "origin", branch)
            return before, self.head()
        finally:
            git(self.work, "checkout", "-q", "main")

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

    def worker(self) -> int:
        """The process id of `reprise serve`."""
        return int(json.loads((self.folder / ".reprise/services/worker/process.json").read_text())["pid"])

    def kill_prefect(self) -> None:
        """Its server, without a word."""
        record = json.loads((self.folder / ".reprise/services/prefect/process.json").read_text())
        os.killpg(record["pid"], signal.SIGKILL)

    def versions(self) -> list[str]:
        url = f"http://127.0.0.1:{PORT + 1}/api/2.0/mlflow/model-versions/search?max_results=1000"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return [v["version"] for v in json.load(reply).get("model_versions", [])]


class Receiver:
    """`reprise hook serve` as a process."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [sys.executable, "-m", "flows", "hook", "serve", "--port", str(RECEIVER)]
        environment = {**os.environ, "REPRISE_PUSH_SECRET": SECRET.decode(), "REPRISE_FORGE_TOKEN": TOKEN}
        with (self.project.root / "receiver.txt").open("ab") as log:
            self.process = subprocess.Popen(argv, cwd=self.project.folder, env=environment, stdout=log, stderr=log)
        until(lambda: taken(RECEIVER) or self.process.poll() is not None, 120, "the receiver listens")
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


def until(holds: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return found


def pushed_runs(project: Project, sha: str) -> list[dict[str, Any]]:
    return [r for r in project.runs() if r["parameters"].get("rev") == sha]


def decided(project: Project, sha: str, seconds: float = 60) -> dict[str, Any]:
    """The entry of a push, once it is decided."""

    def look() -> Any:
        entries = json.loads(project.command("hook", "list", "--json"))
        return next((e for e in entries if e["push"]["after"] == sha and e["state"] != "waiting"), None)

    found: dict[str, Any] = until(look, seconds, f"the push of {sha} is decided")
    return found
