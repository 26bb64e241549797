"""The laptop place end to end, with real parts: Prefect, DVC, torchrun, MLflow and TorchServe.

    .venv/bin/pytest -m e2e tests/test_laptop.py

One project lives through what a user's project lives through: a first run with two spot interruptions, the same again,
a data commit under load, changed serving settings, and a kill -9 of the flow in each of its steps. Order matters.
"""

from __future__ import annotations

import base64
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.example import change_data, create_project
from tests.laptop_leftovers import processes_of, taken

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PORT = 22100
NAMES = ("prefect", "mlflow", "inference", "management", "metrics", "grpc_inference", "grpc_management", "workers")
STEPS = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")


class Laptop:
    """A project folder and the command, as a user has them."""

    def __init__(self, folder: Path, example: str, port: int) -> None:
        self.folder, self.port = folder, port
        create_project(example, folder)
        ports = "\n".join(f"{name} = {port + n}" for n, name in enumerate(NAMES))
        (folder / "laptop.toml").write_text(f'[place]\nkind = "laptop"\n\n[ports]\n{ports}\n')
        # The admission test has its own test below; here it would cost ten seconds a deployment.
        pipeline = folder / "pipeline.toml"
        pipeline.write_text(pipeline.read_text().replace("[serve]\n", "[serve]\nadmission = false\n"))
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid"]
        subprocess.run(
            ["git", *identity, "commit", "--allow-empty", "-qam", "no admission test"], cwd=folder, check=True
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "flows", *arguments]
        return subprocess.Popen(argv, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def command(self, *arguments: str, code: int = 0) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=400)
        assert process.returncode == code, f"reprise {' '.join(arguments)}: exit {process.returncode}\n{out}\n{err}"
        return out

    def run(self, *arguments: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.command("run", "--json", *arguments))
        return document

    def show(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.command("show", "--json"))
        return document

    def get(self, name: str, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port + NAMES.index(name)}{path}", timeout=10) as reply:
            return json.load(reply)

    def versions(self) -> list[str]:
        found = self.get("mlflow", "/api/2.0/mlflow/model-versions/search?max_results=1000")
        return sorted(v["version"] for v in found.get("model_versions", []))

    def served(self, model: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("management", f"/models/{model}/all")
        return found

    def champion(self, model: str) -> str:
        path = f"/api/2.0/mlflow/registered-models/alias?name={model}&alias=champion"
        return str(self.get("mlflow", path)["model_version"]["version"])

    def samples(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        key = next(s["key"] for s in document["steps"] if s["name"] == "train_model")
        text = (self.folder / ".reprise" / "store" / "trainings" / key / "output" / "heldout.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path_factory.mktemp("digits"), "digits", PORT)
    yield laptop
    laptop.command("down")
    assert not [n for n in range(len(NAMES)) if taken(PORT + n)]
    assert processes_of(laptop.folder) == []


def _consistent(laptop: Laptop, document: dict[str, Any], model: str) -> None:
    """Alias, endpoint and record name the same version, alone in service."""
    served = laptop.served(model)
    assert [s["modelVersion"].partition(".")[0] for s in served] == [document["model_version"]]
    assert laptop.champion(model) == document["model_version"]


def test_the_demo_survives_two_interruptions(digits: Laptop) -> None:
    document = json.loads(digits.command("demo", "--folder", str(digits.folder), "--json"))
    assert document["status"] == "succeeded"
    assert [s["status"] for s in document["steps"]] == ["done"] * 6
    assert [a["cause"] for a in document["attempts"]] == ["spot", "spot", "complete"]
    assert document["attempts"][0]["steps_lost"] == 0, "a notice is enough to save"
    assert document["metrics"]["accuracy"] >= 0.95
    assert digits.versions() == [document["model_version"]]
    _consistent(digits, document, "digits")
    assert _no_repeated_metric(digits, document)
    assert Path(document["links"]["report"]).stat().st_size > 10_000


def _no_repeated_metric(laptop: Laptop, document: dict[str, Any]) -> bool:
    """One MLflow run over all attempts: every step of the loss once."""
    run = document["links"]["mlflow_run"].rpartition("/")[2]
    history = laptop.get(
        "mlflow", f"/api/2.0/mlflow/metrics/get-history?run_id={run}&metric_key=train_loss&max_results=25000"
    )
    steps = [int(m["step"]) for m in history["metrics"]]
    return len(steps) > 100 and sorted(steps) == list(range(1, len(steps) + 1))


def test_every_held_out_sample_is_answered_as_the_model_answers(digits: Laptop) -> None:
    document = digits.show()
    connection = http.client.HTTPConnection("127.0.0.1", PORT + NAMES.index("inference"))
    right = 0
    samples = digits.samples(document)
    for sample in samples:
        connection.request("POST", "/predictions/digits", base64.b64decode(sample["body_b64"]))
        answer = json.loads(connection.getresponse().read())
        assert answer["label"] == sample["answer"]["label"], sample["name"]
        assert answer["model_version"] == document["model_version"]
        right += answer["label"] == sample["label"]
    connection.close()
    assert right / len(samples) == pytest.approx(document["metrics"]["accuracy"])


def test_the_same_again_reuses_every_step(digits: Laptop) -> None:
    first, versions = digits.show(), digits.versions()
    began = time.monotonic()
    document = digits.run()
    took = time.monotonic() - began
    assert document["status"] == "unchanged"
    assert all(s["reused"] and s["reason"].startswith("unchanged") for s in document["steps"])
    assert digits.versions() == versions
    assert document["model_version"] == first["model_version"]
    assert took <= (first["ended"] - first["started"]) / 10


def test_serving_settings_retrain_nothing(digits: Laptop) -> None:
    document = digits.run("--set", "serve.batch_size=4", "--set", "serve.admission=true")
    assert {s["name"]: s["reused"] for s in document["steps"]} == {
        "pull_data": True, "train_model": True, "register_model": True,
        "package_model": False, "deploy_model": False, "check_endpoint": False,
    }  # fmt: skip
    assert len(digits.versions()) == 1
    _consistent(digits, document, "digits")


def test_a_data_commit_under_load_loses_no_request(digits: Laptop) -> None:
    before = digits.show()
    body = base64.b64decode(digits.samples(before)[0]["body_b64"])
    stop, failures, seen = threading.Event(), list[str](), list[str]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORT + NAMES.index("inference"), timeout=30)
        while not stop.is_set():
            try:
                connection.request("POST", "/predictions/digits", body)
                reply = connection.getresponse()
                text = reply.read()
                if reply.status == 200:
                    seen.append(json.loads(text)["model_version"])
                else:
                    failures.append(f"{reply.status} {text[:200]!r}")
            except (OSError, http.client.HTTPException, ValueError) as error:
                failures.append(repr(error))
                connection.close()
            time.sleep(0.02)
        connection.close()

    clients = [threading.Thread(target=client) for _ in range(8)]
    for thread in clients:
        thread.start()
    try:
        change_data(digits.folder)
        document = digits.run()
        time.sleep(1)
    finally:
        stop.set()
        for thread in clients:
            thread.join()
    assert document["data_digest"] != before["data_digest"]
    assert document["status"] == "succeeded"
    assert failures == []
    assert len(seen) > 100
    assert set(seen) == {before["model_version"], document["model_version"]}
    _consistent(digits, document, "digits")


@pytest.mark.parametrize(("number", "step"), list(enumerate(STEPS)))
def test_a_killed_flow_is_picked_up_by_the_same_command(digits: Laptop, number: int, step: str) -> None:
    versions = digits.versions()
    if step == "pull_data":
        change_data(digits.folder)
    arguments = ("--set", f"train.seed={100 + number}")
    process = digits.start("run", *arguments)
    try:
        killed = _kill_in(digits, process, step)
    finally:
        process.communicate(timeout=60)
    assert killed, f"the flow ended before {step} was seen running"
    assert digits.show()["status"] == "interrupted"
    document = digits.run(*arguments)
    assert document["status"] == "succeeded", document["message"]
    assert document["resumed"] == 1
    before = STEPS[: STEPS.index(step)]
    assert all(s["reused"] for s in document["steps"] if s["name"] in before)
    assert len(digits.versions()) == len(versions) + 1
    _consistent(digits, document, "digits")


def _kill_in(laptop: Laptop, process: subprocess.Popen[str], step: str) -> bool:
    """SIGKILL the flow's process as soon as its document says that the step runs."""
    known = set((laptop.folder / ".reprise" / "store" / "runs").glob("*.json"))
    while process.poll() is None:
        for path in set((laptop.folder / ".reprise" / "store" / "runs").glob("*.json")) - known:
            document = json.loads(path.read_text() or "null")
            if document and any(s["name"] == step and s["status"] == "running" for s in document["steps"]):
                time.sleep(0.3)
                process.send_signal(signal.SIGKILL)
                return True
        time.sleep(0.02)
    return False


def test_a_cancelled_run_resumes_where_it_was(digits: Laptop) -> None:
    process = digits.start("run", "--set", "train.seed=300", "--set", "train.epochs=60")
    store = digits.folder / ".reprise" / "store"
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        document = digits.show()
        key = next(s["key"] for s in document["steps"] if s["name"] == "train_model")
        progress = store / "trainings" / key / "progress.jsonl"
        if document["status"] == "running" and progress.exists() and '"checkpoint"' in progress.read_text():
            break
        time.sleep(0.1)
    digits.command("cancel")
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert digits.show()["status"] == "cancelled"
    assert digits.show()["attempts"][-1]["to_step"] > 0
    resumed = json.loads(digits.command("resume", "--json"))
    assert resumed["status"] == "succeeded"
    assert resumed["attempts"][-1]["from_step"] == resumed["attempts"][-2]["to_step"]


def test_a_model_that_is_not_good_enough_is_refused(digits: Laptop) -> None:
    before = digits.champion("digits")
    digits.command("run", "--set", "gate.minimum=0.9999", "--set", "train.seed=400", "--set", "train.epochs=1", code=4)
    document = digits.show()
    assert document["status"] == "refused"
    assert "0.9999" in document["message"]
    assert digits.champion("digits") == before


def test_two_trainings_at_once_give_two_versions_and_one_winner(digits: Laptop) -> None:
    versions = digits.versions()
    seeds = ("501", "501", "502")
    running = [digits.start("run", "--json", "--set", f"train.seed={s}", "--set", "gate.tolerance=1") for s in seeds]
    ended = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], ended
    documents = [json.loads(out) for out, _ in ended]
    assert documents[0]["model_version"] == documents[1]["model_version"] != documents[2]["model_version"]
    assert len(digits.versions()) == len(versions) + 2
    assert digits.champion("digits") in {d["model_version"] for d in documents}
    digits.command("audit")


def test_a_gate_may_require_the_proof_that_interruptions_change_nothing(digits: Laptop) -> None:
    small = (
        "--set",
        "train.seed=600",
        "--set",
        "train.epochs=3",
        "--set",
        "gate.minimum=0.1",
        "--set",
        "gate.tolerance=1",
    )
    required = (*small, "--set", "gate.require_resume_certificate=true")
    digits.command("run", *required, code=4)
    assert "there is no certificate" in digits.show()["message"]
    certificate = json.loads(digits.command("verify-resume", "--json", "--kills", "2", "--seed", "3", *small))
    assert certificate["equal"]
    assert certificate["kills"] == 2
    document = digits.run(*required)
    assert document["status"] == "succeeded"
    trace = json.loads(digits.command("trace", document["model_version"], "--json"))
    assert trace["data_digest"] == document["data_digest"]
    assert trace["git_sha"] == document["git_sha"]
    assert trace["gaps"] == []


def test_rollback_puts_the_version_before_back(digits: Laptop) -> None:
    now = digits.champion("digits")
    answer = json.loads(digits.command("rollback", "--json"))
    assert answer["was"] == now
    assert digits.champion("digits") == answer["version"] != now
    assert [s["modelVersion"].partition(".")[0] for s in digits.served("digits")] == [answer["version"]]


def test_what_was_in_service_is_again_after_down_and_up(digits: Laptop) -> None:
    before = digits.champion("digits")
    digits.command("down")
    assert processes_of(digits.folder) == []
    digits.command("up")
    assert [s["modelVersion"].partition(".")[0] for s in digits.served("digits")] == [before]


def test_git_status_is_clean_and_another_example_is_served(tmp_path: Path, digits: Laptop) -> None:
    digits.command("down")
    status = subprocess.run(
        ["git", "status", "--porcelain"], cwd=digits.folder, capture_output=True, text=True, check=True
    )
    assert status.stdout.replace("?? laptop.toml\n", "") == ""
    tumours = Laptop(tmp_path / "elsewhere", "tumours", PORT)
    try:
        document = tumours.run()
        assert document["status"] == "succeeded"
        assert document["pipeline"] == "tumours"
        assert document["metrics"]["accuracy"] > 0.9
    finally:
        tumours.command("down")
