"""Faults while a step and a training run: the API server away, objects deleted by hand, the watch cut. Nothing twice.

Every program here holds a lock file while it runs, and a second one that finds it ends the test.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from deployments.cluster import Cluster
from deployments.kube_connect import connect
from deployments.workload import Workload
from tests.cluster_faults import Wire, dead_api_server, hanging_api_server, wait_between_cuts
from tests.cluster_kit import SMALL, Background, needs_rig, step, until

pytestmark = pytest.mark.cluster
# Works for so many seconds over all its lives; told to leave it takes its time, then goes with 143.
ALONE = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)
seconds, leaving = float(sys.argv[2]), []
try:
    os.close(os.open(folder / "lock", os.O_CREAT | os.O_EXCL))
except FileExistsError:
    (folder / "two-at-once").touch(); sys.exit("TWO AT ONCE")
signal.signal(signal.SIGTERM, lambda *_: leaving.append(1))
mark = folder / "done"; done = float(mark.read_text()) if mark.exists() else 0.0
with (folder / "starts").open("a") as out: out.write(f"{os.environ['HOSTNAME']}\\n")
print("starts at", round(done, 1), flush=True)
while done < seconds and not leaving:
    time.sleep(0.1); done += 0.1
if leaving: time.sleep(1.5)
mark.write_text(str(done)); (folder / "lock").unlink()
print("leaves" if leaving else "over", flush=True); sys.exit(143 if leaving else 0)
"""


def alone_step(name: str, seconds: float) -> Workload:
    return step(name, ALONE, f"/reprise/{name}", str(seconds), grace_seconds=6.0)


def alone_training(name: str, seconds: float) -> Workload:
    command = ("python", "-c", ALONE, f"/reprise/{name}", str(seconds))
    return Workload(name=name, image="train", command=command, spot=True, grace_seconds=6.0, resources=SMALL)


def starts(cluster: Cluster, name: str) -> list[str]:
    """The hosts on which the program started, in order; fails if two of it ran at once."""
    assert cluster.state is not None
    folder = cluster.state / name
    assert not (folder / "two-at-once").exists()
    return (folder / "starts").read_text().splitlines()


def objects(cluster: Cluster, image: Any, name: str) -> list[str]:
    """uids of the workload's objects."""
    items = cluster.api.get(cluster.object_path(image, ""))["items"]
    return [i["metadata"]["uid"] for i in items if i["metadata"]["name"] == name]


@pytest.mark.parametrize(("fault", "seconds"), [(dead_api_server, 30.0), (hanging_api_server, 12.0)])
def test_the_api_server_is_away(
    cluster: Cluster, fault: Callable[[], AbstractContextManager[None]], seconds: float
) -> None:
    """What ends meanwhile, what ends afterwards: the right outcome, one object, one start."""
    needs_rig()
    tag = "dead" if fault is dead_api_server else "hung"
    runs = {
        f"{tag}-step-short": Background(cluster, alone_step(f"{tag}-step-short", seconds / 3)),
        f"{tag}-step-long": Background(cluster, alone_step(f"{tag}-step-long", seconds + 3)),
        f"train-{tag}-short-1": Background(cluster, alone_training(f"train-{tag}-short-1", seconds / 2)),
        f"train-{tag}-long-1": Background(cluster, alone_training(f"train-{tag}-long-1", seconds + 3)),
    }
    for run in runs.values():
        run.until_line("starts at")
    kinds = {name: "train" if name.startswith("train") else "step" for name in runs}
    before = {name: objects(cluster, kind, name) for name, kind in kinds.items()}
    with fault():
        time.sleep(seconds)
    for name, run in runs.items():
        outcome = run.end()
        assert (outcome.cause, outcome.exit_code, outcome.adopted) == ("complete", 0, False), (name, outcome.reason)
        assert run.lines[-1] == "over", run.lines
        assert objects(cluster, kinds[name], name) == before[name] and len(before[name]) == 1
        assert len(starts(cluster, name)) == 1


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
@pytest.mark.parametrize("image", ["step", "train"])
def test_an_object_deleted_by_hand_is_made_again_when_nothing_of_it_runs(
    cluster: Cluster, image: str, propagation: str
) -> None:
    needs_rig()
    name = f"{'train-' if image == 'train' else ''}hand-{propagation.lower()}-1"
    run = Background(cluster, (alone_training if image == "train" else alone_step)(name, 4.0))
    run.until_line("starts at")
    (first,) = objects(cluster, image, name)
    time.sleep(0.5)
    cluster.api.delete(cluster.object_path(image, name), propagation=propagation)  # type: ignore[arg-type]
    outcome = run.end()
    assert outcome.cause == "complete", outcome.reason
    assert len(starts(cluster, name)) == 2 and objects(cluster, image, name) != [first]
    assert any("deleted by somebody's hand" in line for line in run.lines)


def test_an_object_deleted_twice_is_taken_for_a_wish(cluster: Cluster) -> None:
    needs_rig()
    run = Background(cluster, alone_step("twice", 60.0))
    for count in (1, 2):
        until(lambda count=count: "x" * (len(_started(cluster, "twice")) >= count), f"start {count}")  # type: ignore[misc]
        cluster.api.delete(cluster.object_path("step", "twice"), propagation="Background")
    outcome = run.end()
    assert (outcome.cause, outcome.reason) == ("cancelled", "it was deleted twice by somebody's hand")
    assert len(starts(cluster, "twice")) == 2 and objects(cluster, "step", "twice") == []


def _started(cluster: Cluster, name: str) -> list[str]:
    assert cluster.state is not None
    return starts(cluster, name) if (cluster.state / name / "starts").exists() else []


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    made = Wire(tmp_path)
    yield made
    made.close()


def test_the_watch_is_cut_again_and_again(cluster: Cluster, wire: Wire) -> None:
    api = connect(kubeconfig=str(wire.kubeconfig))
    far = Cluster(cluster.settings, api=api, state=cluster.state)
    runs = [
        Background(far, alone_step("cut-step", 6.0)),
        Background(far, alone_training("train-cut-1", 6.0)),
        Background(far, alone_step("cut-later", 9.0)),
    ]
    wait_between_cuts(wire, 6.0, 0.7)
    outcomes = [run.end() for run in runs]
    assert [o.cause for o in outcomes] == ["complete"] * 3, [o.reason for o in outcomes]
    assert wire.cuts > 10
    assert api.calls["WATCH"] < 60 and api.calls["GET"] < 100, api.calls  # it does not hammer a server that is away
    if cluster.state is not None:
        assert [len(starts(cluster, n)) for n in ("cut-step", "train-cut-1", "cut-later")] == [1, 1, 1]
    far.close()
    api.close()


def test_what_happens_while_the_wire_is_down_is_seen_afterwards(cluster: Cluster, wire: Wire) -> None:
    """One ends, one is deleted by hand: told by the list that follows, for no watch event ever will."""
    needs_rig()
    api = connect(kubeconfig=str(wire.kubeconfig))
    far = Cluster(cluster.settings, api=api, state=cluster.state)
    ends, deleted = Background(far, alone_step("down-ends", 3.0)), Background(far, alone_training("train-down-1", 5.0))
    for run in (ends, deleted):
        run.until_line("starts at")
    wire.refusing = True
    wire.cut()
    cluster.api.delete(cluster.object_path("train", "train-down-1"), propagation="Background")
    time.sleep(6.0)
    wire.refusing = False
    assert ends.end().cause == "complete" and len(starts(cluster, "down-ends")) == 1
    assert deleted.end().cause == "complete" and len(starts(cluster, "train-down-1")) == 2
    far.close()
    api.close()
