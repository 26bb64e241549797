"""What the test of triggers on a cluster is made of: the overlay with its component, pushes, flow runs from outside.

Fixtures and tests are in test_cluster_triggers.py. Not covered: the chain below them (cluster_chain_kit.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.prefect_api import Prefect
from tests.cluster_chain_kit import OVERLAY, ROOT, RUNS, SERVICES, Chain, adapted, address, kubectl
from tests.cluster_kit import until
from tests.flows.push_kit import SECRET, signed

REPOSITORY = "acme/digits"
QUICK = (
    ("epochs = 12", "epochs = 2"),
    ("workers = 2", "workers = 1"),
    ("minimum = 0.95", "minimum = 0.1"),
    ("tolerance = 0.01", "tolerance = 1.0"),
)
PUSH = f'\n[push]\nrepository = "{REPOSITORY}"\nsettle = "2s"\n'
SCHEDULE = '\n[schedule]\ncron = "{cron}"\noverlap = "{overlap}"\npaused = {paused}\n'
ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
GONE_SECONDS = 90.0  # pods of a run that ended in order


def overlay_with_triggers(folder: Path, git: str) -> str:
    """The overlay `kind` with the component switched on, as a person does it: one line, two settings."""
    folder.mkdir()
    here = os.path.relpath(ROOT / "deployments" / "k8s", folder.resolve())
    for file in OVERLAY.iterdir():
        text = file.read_text().replace("../../", f"{here}/")
        if file.name == "kustomization.yaml":
            text = text.replace("components:\n", f"components:\n  - {here}/components/triggers\n")
        if file.name == "settings.yaml":
            text += f"  triggersGit: {git}\n  triggersPipeline: pipeline.toml\n"
        (folder / file.name).write_text(text)
    return adapted(kubectl("kustomize", str(folder)))


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """A cluster whose pipeline is registered, and the receiver of its pushes."""

    chain: Chain
    prefect: Prefect
    job: dict[str, Any]  # register-pipeline as kustomize renders it

    def git(self, *arguments: str) -> str:
        """In the developer's clone. The remote's folder belongs to the pods' user."""
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.invalid")
        trust = self.chain.project.parent / "gitconfig"
        trust.write_text("[safe]\n\tdirectory = *\n")
        env = {**os.environ, "GIT_CONFIG_GLOBAL": str(trust)}
        command = ["git", *identity, *arguments]
        done = subprocess.run(command, cwd=self.chain.project, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def change(self, *pairs: tuple[str, str], more: str = "") -> tuple[str, str]:
        """Edit pipeline.toml, commit and push: (before, after)."""
        before, file = self.git("rev-parse", "HEAD"), self.chain.project / "pipeline.toml"
        text = file.read_text()
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        file.write_text(text + more)
        self.git("commit", "-qam", "a change")
        self.git("push", "-q", "origin", "HEAD:main")
        return before, self.git("rev-parse", "HEAD")

    def schedule(self, cron: str, *, overlap: str = "wait", paused: bool = False) -> None:
        """[schedule] changed on the default branch, and the Job run anew, as its file says."""
        file = self.chain.project / "pipeline.toml"
        file.write_text(re.sub(r"\n\[schedule\]\n(?:.+\n)*", "", file.read_text()))
        self.change(more=SCHEDULE.format(cron=cron, overlap=overlap, paused=str(paused).lower()))
        self.register()

    def register(self) -> str:
        """The Job run anew, as its file says; what it printed."""
        kubectl("-n", SERVICES, "delete", "job/register-pipeline", "--ignore-not-found", "--wait=true")
        kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump(self.job))
        return self.registered()

    @staticmethod
    def registered() -> str:
        """What the Job printed once it is done."""
        kubectl("-n", SERVICES, "wait", "--for=condition=complete", "job/register-pipeline", "--timeout=120s")
        return kubectl("-n", SERVICES, "logs", "job/register-pipeline", "-c", "register")

    def deliver(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, str]:
        """What the receiver answers to a delivery: (code, status)."""
        url = f"http://{address(self.chain.api, 'push-receiver')}/push"
        request = urllib.request.Request(url, body, headers or signed(body, SECRET))
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status, json.load(reply)["status"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["status"]

    def deployment(self) -> dict[str, Any]:
        """`retrain/digits` in Prefect."""
        found = self.prefect.deployment("digits")
        assert found is not None
        return found

    def start(self, **parameters: Any) -> str:
        """As the form does it: the flow run's id."""
        answer = self.prefect.start(
            self.deployment()["id"],
            parameters=parameters,
            name="by test",
            tags=["reprise"],
            idempotency_key=str(time.time_ns()),
        )
        return str(answer["id"])

    def runs(self, **wanted: Any) -> list[dict[str, Any]]:
        """Flow runs of the deployment whose parameters say so, oldest first."""
        body = {"deployments": {"id": {"any_": [self.deployment()["id"]]}}, "sort": "START_TIME_ASC", "limit": 200}
        found: list[dict[str, Any]] = self.prefect.call("POST", "/flow_runs/filter", body)
        return [r for r in found if wanted.items() <= r["parameters"].items()]

    def state(self, flow_run: str) -> dict[str, Any]:
        """As Prefect has it now."""
        found = self.prefect.run(flow_run)
        assert found is not None
        state: dict[str, Any] = found["state"]
        return state

    def reaches(self, flow_run: str, *names: str, seconds: float = 200) -> None:
        """Wait for a state's name. An end that is not awaited is a failure at once."""

        def there() -> str:
            state = self.state(flow_run)
            assert state["name"] in names or state["type"] not in ENDS, state
            return str(state["name"]) if state["name"] in names else ""

        until(there, f"{flow_run} is {' or '.join(names)}", seconds)

    def document(self, flow_run: str) -> dict[str, Any]:
        """Of the run that a flow run began; {} as long as there is none."""
        store = self.chain.state / "store"
        try:
            began = json.loads((store / "flow-runs" / f"{flow_run}.json").read_text())
            found = json.loads((store / "runs" / f"{began['run']}.json").read_text())
        except FileNotFoundError:
            return {}
        return dict(found)

    @staticmethod
    def reused(document: dict[str, Any]) -> tuple[str, ...]:
        """Steps that a run found done."""
        return tuple(s["name"] for s in document["steps"] if s["reused"])

    def trained(self, flow_run: str) -> int:
        """The step that its trainer has reached."""
        steps = self.document(flow_run).get("steps", ())
        key = next((s["key"] for s in steps if s["name"] == "train_model"), "-")
        try:
            lines = (self.chain.state / "store" / "trainings" / key / "progress.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        return max((json.loads(line).get("step", 0) for line in lines if '"step"' in line), default=0)

    def trains(self, flow_run: str, *, beyond: int = 20) -> None:
        """Wait until its trainer is past that step."""
        until(lambda: "yes" if self.trained(flow_run) > beyond else "", f"{flow_run} trains", 200)

    def jobs_of(self, flow_run: str) -> list[dict[str, Any]]:
        """The Jobs that Prefect's worker made for a flow run."""
        path, label = f"/apis/batch/v1/namespaces/{RUNS}/jobs", f"prefect.io/flow-run-id={flow_run}"
        return list(self.chain.api.get(path, labelSelector=label)["items"])

    def pods(self, namespace: str = RUNS, **labels: str) -> list[str]:
        """Names of those with these labels that have not ended."""
        selector = ",".join(f"{name}={value}" for name, value in labels.items())
        found = self.chain.api.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)["items"]
        return [str(p["metadata"]["name"]) for p in found if p["status"]["phase"] in ("Pending", "Running")]

    def nothing_runs(self, document: dict[str, Any]) -> None:
        """Neither the flow's pods nor those of its training are left."""
        key = next(s["key"] for s in document["steps"] if s["name"] == "train_model")[:12]

        def left() -> list[str]:
            return [*self.pods(**{"reprise.dev/component": "flow"}), *self.pods(**{"reprise.dev/key": key})]

        until(lambda: "" if left() else "none", "no pod of the run is left", GONE_SECONDS)
