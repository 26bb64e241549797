"""What run_metrics tells of a store, on documents as the tasks write them, over HTTP too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from deployments.run_metrics import collect, serve, text

KEY = "5a7a2ed7e3f895cf3f6433e9d8ec9645d8927425"
SHORT = KEY[:12]


def attempt(number: int, **other: Any) -> dict[str, Any]:
    """A row of the ledger."""
    row = {"number": number, "started": 1000.0 + number, "ended": 1010.0 + number, "cause": "spot", "capacity": "spot"}
    return {**row, "reached_step": 10 * number, "to_step": 10 * number - 2, **other}


def run(name: str, started: float, *, reused: bool, key: str = KEY) -> dict[str, Any]:
    """A run's document."""
    step = {"name": "train_model", "key": key, "reused": reused}
    return {"run": name, "pipeline": "digits", "started": started, "steps": [{"name": "pull_data", "key": "d"}, step]}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """One training, interrupted twice, running; the run that does it and a later one that only asked for it."""
    folder = tmp_path / "trainings" / KEY
    folder.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    rows = [attempt(1), attempt(2, cause="node_lost"), attempt(3, ended=None, cause="", capacity="on-demand")]
    (folder / "attempts.json").write_text(json.dumps(rows))
    lines = [
        {"event": "checkpoint", "step": 18, "stall": 0.25, "time": 1015.0},
        {"step": 25, "max_steps": 540, "epoch": 0, "loss": 2.0, "time": 1016.0},
        {"event": "worker", "rank": 0, "time": 1016.5},
    ]
    (folder / "progress.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 26, "ma')
    (tmp_path / "runs" / "digits-7.json").write_text(json.dumps(run("digits-7", 900.0, reused=False)))
    (tmp_path / "runs" / "digits-8.json").write_text(json.dumps(run("digits-8", 950.0, reused=True)))
    return tmp_path


def told(store: Path, now: float = 1020.0, active: float = 3600.0) -> dict[str, float]:
    """Sample -> value."""
    lines = text(collect(store, {"spot": 1.1}, now, active)).splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_steps_attempts_and_interruptions_of_a_training(store: Path) -> None:
    labels = f'key="{SHORT}",pipeline="digits",run="digits-7"'
    found = told(store)
    assert found[f"reprise_training_step{{{labels}}}"] == 25
    assert found[f"reprise_training_steps{{{labels}}}"] == 540
    assert found[f"reprise_training_progress_timestamp_seconds{{{labels}}}"] == 1016.5
    assert found[f"reprise_training_checkpoint_timestamp_seconds{{{labels}}}"] == 1015.0
    assert found[f"reprise_training_checkpoint_stall_seconds{{{labels}}}"] == 0.25
    assert found[f'reprise_training_running{{capacity="on-demand",{labels}}}'] == 1
    assert found[f"reprise_training_attempts{{{labels}}}"] == 3
    assert found[f"reprise_training_steps_lost{{{labels}}}"] == 4
    ended = {k: v for k, v in found.items() if k.startswith("reprise_training_attempts_ended")}
    assert ended == {
        f'reprise_training_attempts_ended{{cause="{cause}",{labels}}}': count
        for cause, count in {"spot": 1, "node_lost": 1, "consolidation": 0}.items()
    }, "causes that have not come yet are 0, so that the first one is an increase"
    assert found['reprise_attempts_ended_total{cause="spot",pipeline="digits"}'] == 1
    assert found['reprise_attempt_seconds_total{capacity="on-demand",pipeline="digits"}'] == 17, (
        "the open one until now"
    )
    assert found['reprise_gpu_price_per_hour{capacity="spot"}'] == 1.1


def test_a_training_that_is_quiet_is_left_out_and_stays_in_the_totals(store: Path) -> None:
    found = told(store, now=1016.5 + 3601)
    assert not [name for name in found if name.startswith("reprise_training_")]
    assert found['reprise_steps_lost_total{pipeline="digits"}'] == 4


def test_documents_that_are_half_there_cost_nothing(store: Path) -> None:
    (store / "runs" / "broken.json").write_text('{"run": "x"')
    (store / "trainings" / "empty").mkdir()
    (store / "trainings" / "empty" / "attempts.json").write_text("[]")
    (store / "trainings" / "new").mkdir()
    (store / "trainings" / "new" / "attempts.json").write_text(json.dumps([attempt(1)]))
    found = told(store)
    assert found['reprise_training_attempts{key="new",pipeline="",run=""}'] == 1, "no run is known, it is still told"
    assert 'reprise_training_step{key="new",pipeline="",run=""}' not in found


def test_only_the_end_of_a_long_progress_file_is_read(store: Path) -> None:
    path = store / "trainings" / KEY / "progress.jsonl"
    line = json.dumps({"step": 1, "max_steps": 9, "epoch": 0, "loss": 1.0, "time": 1015.0}) + "\n"
    path.write_text(line * 20000 + line.replace('"step": 1', '"step": 8'))
    assert told(store)[f'reprise_training_step{{key="{SHORT}",pipeline="digits",run="digits-7"}}'] == 8


def test_names_cannot_break_the_format(store: Path) -> None:
    document = run("digits-7", 900.0, reused=False) | {"pipeline": 'a"b\\c\nd'}
    (store / "runs" / "digits-7.json").write_text(json.dumps(document))
    assert r'pipeline="a\"b\\c\nd"' in text(collect(store, {}, 1020.0))


def test_prometheus_takes_it(store: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    done = subprocess.run(
        [promtool, "check", "metrics"], input=text(collect(store, {}, 1020.0)), capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.returncode == 0


def test_over_http(store: Path) -> None:
    with serve(store, {}, "127.0.0.1", 0, 1e12) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert f'reprise_training_step{{key="{SHORT}"' in answer.read().decode()
        with urllib.request.urlopen(f"{base}/healthz") as answer:
            assert answer.status == 200
        shutil.rmtree(store)
        with pytest.raises(urllib.error.HTTPError, match="503") as caught:
            urllib.request.urlopen(f"{base}/healthz")
        caught.value.close()
        with urllib.request.urlopen(f"{base}/metrics") as answer:
            assert "reprise_training_step{" not in answer.read().decode(), "an empty store is no error"
        server.shutdown()


def test_a_price_that_is_none_is_named() -> None:
    argv = [sys.executable, "-m", "deployments.run_metrics", "--store", "/x", "--price", "spot"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'spot': expected CAPACITY=PRICE, such as spot=1.10" in done.stderr
