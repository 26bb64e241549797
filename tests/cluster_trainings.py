"""Real trainings for the cluster tests, on nodes of their own that are taken away at a moment of the training.

The nodes (label `reprise-test/pool`) join for one test, so that what is taken from one training is not taken from
another. The state volume has one path here and in the pods. Needs the rig. Not covered: fixtures (conftest.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deployments.cluster import Cluster
from deployments.workload import Resources
from tasks.attempts import progress_of
from tasks.records import Attempt, Store
from tasks.train_model import TrainedModel, TrainRequest, train_model
from tests.cluster_kit import RIG, node_of, reclaim, rig_state, until
from training.spec import CheckpointPolicy, TrainSpec

MODULES = Path(__file__).parent / "training" / "modules"
POOL = "reprise-test/pool"
NOTICE, NONE = ("--notice", "40"), ("--no-notice",)
STEPS = 80


def spec_in(folder: Path, key: str, **more: Any) -> TrainSpec:
    """A training of 80 steps, saved each 5."""
    settings: dict[str, Any] = {
        "key": key * 40,
        "pipeline": "tiny",
        "module": str(MODULES / "tiny.py"),
        "data": str(folder),
        "checkpoints": f"file://{folder}/checkpoints",
        "output": str(folder / "output"),
        "progress": str(folder / "progress.jsonl"),
        "epochs": 10,
        "batch_size": 12,
        "checkpoint": CheckpointPolicy(every_steps=5),
    }
    return TrainSpec(**(settings | more))


def uninterrupted(folder: Path) -> dict[str, Any]:
    """The result of the same training without an interruption, in two processes of this machine."""
    (folder / "spec.json").write_text(spec_in(folder, "q").to_json())
    command = [sys.executable, "-m", "training.launch", "--spec", str(folder / "spec.json"), "--processes", "2"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], timeout=300, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / "output" / "result.json").read_text())
    assert result["step"] == STEPS
    return result


@dataclass(kw_only=True)
class Bench:
    """Where trainings of a test run, and what was taken from them."""

    home: Cluster
    pool: str  # label of its nodes
    folder: Path  # the state volume
    takers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def store(self) -> Store:
        """Of the ledgers."""
        return Store(root=str(self.folder / "store"))

    def request(
        self, key: str, *, module: str = "tiny.py", params: Mapping[str, Any] = {}, **more: Any
    ) -> TrainRequest:
        """A training of 80 steps on two workers, saved each 5; no error is forgiven."""
        folder = self.folder / key
        for made in (folder, folder / "output", folder / "checkpoints"):
            made.mkdir(exist_ok=True)
            made.chmod(0o2775)
        spec = spec_in(folder, key, module=str(MODULES / module), params=dict(params))
        wanted = Resources(cpus=0.2, memory="3Gi")
        return TrainRequest(
            **{
                "spec": spec,
                "experiment": "t",
                "workers": 2,
                "errors": 0,
                "grace_seconds": 30.0,
                "resources": wanted,
                **more,
            }
        )

    def train(
        self, request: TrainRequest, taken: Mapping[int, Callable[[Attempt], None]] = {}
    ) -> tuple[TrainedModel, list[Attempt]]:
        """Train to the end; each attempt in `taken` is attended from its beginning by what takes something from it."""
        threads = []
        failures: list[BaseException] = []

        def attend(attempt: Attempt) -> None:
            try:
                taken[attempt.number](attempt)
            except BaseException as error:
                failures.append(error)

        def on_attempts(attempts: list[Attempt]) -> None:
            if attempts[-1].ended is None and attempts[-1].number in taken:
                threads.append(threading.Thread(target=attend, args=(attempts[-1],), daemon=True))
                threads[-1].start()

        trained = train_model(
            request, runner=self.home, store=self.store, on_line=self.said.append, on_attempts=on_attempts
        )
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        rows = self.store.attempts(request.spec.key)
        for row in rows:
            told = (row.capacity, row.node, row.cause, row.exit_code, row.from_step, row.to_step, row.reason)
            print(row.number, *told, "|", row.asked)
        return trained, rows

    def lines(self, request: TrainRequest, row: Attempt) -> list[dict[str, Any]]:
        """What the trainer told in this attempt, so far or until it ended."""
        lines = progress_of(request.spec.progress)
        return [e for e in lines if e["time"] >= row.started and (row.ended is None or e["time"] <= row.ended)]

    def take(
        self, request: TrainRequest, *parts: str, how: tuple[str, ...], at: str = "steps"
    ) -> Callable[[Attempt], None]:
        """What takes the nodes of the pods with these parts in their names: after some steps, or as it is saving."""

        def act(row: Attempt) -> None:
            name = f"train-{request.spec.key[:12]}-{row.number}"

            def begun() -> str:
                lines = self.lines(request, row)
                if at == "saving":
                    return "x" * any(e.get("event") == "saving" for e in lines)
                return "x" * (sum("max_steps" in e and "event" not in e for e in lines) > 4)

            until(begun, f"{name}: {at}", seconds=150)
            for node in [node_of(self.home, name, part) for part in parts]:
                self.takers.append(reclaim(node, *how))

        return act

    def close(self) -> None:
        """Its nodes go."""
        self.home.close()
        for process in self.takers:
            process.wait(90)
        for node in self.nodes(""):
            command = [
                sys.executable,
                str(RIG / "spot.py"),
                "--state",
                str(rig_state()),
                "reclaim",
                node,
                "--no-notice",
            ]
            subprocess.run(command, check=True, cwd=RIG, stdout=subprocess.DEVNULL)

    def nodes(self, kind: str) -> list[str]:
        """Names of its nodes of that capacity; "" is both."""
        selector = f"{POOL}={self.pool}" + (f",karpenter.sh/capacity-type={kind}" if kind else "")
        items = self.home.api.get("/api/v1/nodes", labelSelector=selector)["items"]
        return [str(node["metadata"]["name"]) for node in items]


def add_nodes(*specs: str) -> None:
    """Nodes that join the rig now."""
    for spec in specs:
        _spot("add", spec)


def _spot(*words: str) -> None:
    command = [sys.executable, str(RIG / "spot.py"), "--state", str(rig_state()), *words]
    subprocess.run(command, check=True, cwd=RIG, stdout=subprocess.DEVNULL)


def bench_on(cluster: Cluster, folder: Path, pool: str) -> Bench:
    """Three spot nodes and two on-demand ones of their own."""
    for kind, count in (("spot", 3), ("on-demand", 2)):
        add_nodes(*(f"{pool}-{kind}-{n}:karpenter.sh/capacity-type={kind},{POOL}={pool}" for n in range(count)))
    spot, on_demand = ({"karpenter.sh/capacity-type": kind, POOL: pool} for kind in ("spot", "on-demand"))
    settings = replace(cluster.settings, state_mount=str(folder), spot_selector=spot, on_demand_selector=on_demand)
    return Bench(home=Cluster(settings, api=cluster.api, state=folder), pool=pool, folder=folder)
