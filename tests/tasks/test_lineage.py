"""Lineage both ways: what register_model wrote is found again, over a real MLflow server and over scripted answers."""

from __future__ import annotations

import base64
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import ConfigError, GateRefused, GiveUp, TryAgain
from tasks.lineage import Trace, Use, trace, who_uses
from tasks.records import Attempt, Store
from tests.loopback_kit import JsonHandler, serving

TRAIN_KEY = "2" * 40
DATA = "d41d8cd98f00b204e9800998ecf8427e.dir"
TAGS = {
    "git_sha": "c" * 40,
    "data_digest": DATA,
    "code_digest": "a" * 64,
    "run": "digits-1",
    "step_key": "3" * 40,
    "key.pull_data": "1" * 40,
    "key.train_model": TRAIN_KEY,
    "weights_sha256": "b" * 64,
    "gate": "accepted",
    "decision": '{"accepted": true, "metric": "accuracy", "value": 0.97}',
    "attempts": "3",
    "interruptions": "2",
}


class Registry(JsonHandler):
    """Answers as MLflow's REST API does, from what the test puts into `versions` and `runs`."""

    versions: dict[tuple[str, str], dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    failing: int
    asked: list[tuple[str, dict[str, str]]]

    def do_GET(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.asked.append((url.path, query))
        status, body = self.look_up(url.path.removeprefix("/api/2.0/mlflow/"), query)
        self.answer(self.failing or status, body)

    def look_up(self, route: str, query: dict[str, str]) -> tuple[int, dict[str, Any]]:
        missing = (404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "Model Version not found"})
        if route == "runs/get":
            run = self.runs.get(query["run_id"])
            return (200, {"run": run}) if run else missing
        if route == "model-versions/get":
            row = self.versions.get((query["name"], query["version"]))
            return (200, {"model_version": row}) if row else missing
        if route == "registered-models/alias":
            for (name, _), row in self.versions.items():
                if name == query["name"] and query["alias"] in row["aliases"]:
                    return 200, {"model_version": row}
            return missing
        if route == "registered-models/get":
            rows = [r for (name, _), r in self.versions.items() if name == query["name"]]
            aliases = [{"alias": a, "version": r["version"]} for r in rows for a in r["aliases"]]
            return 200, {"registered_model": {"aliases": aliases}}
        assert route == "model-versions/search"
        rows = [{k: v for k, v in r.items() if k != "aliases"} for r in self.versions.values()]  # as MLflow answers
        first = int(query.get("page_token", 0))
        more = {"next_page_token": str(first + 2)} if first + 2 < len(rows) else {}
        return 200, {"model_versions": rows[first : first + 2]} | more


def row(
    name: str, version: int, tags: dict[str, str], aliases: tuple[str, ...] = (), created: int = 0
) -> dict[str, Any]:
    return {
        "name": name,
        "version": str(version),
        "run_id": "f" * 32,
        "aliases": list(aliases),
        "creation_timestamp": created,
        "tags": [{"key": f"reprise.{k}", "value": v} for k, v in tags.items()] + [{"key": "team", "value": "x"}],
    }


@pytest.fixture
def registry() -> Iterator[tuple[str, type[Registry]]]:
    handler = type("Scripted", (Registry,), {"versions": {}, "runs": {}, "failing": 0, "asked": []})
    handler.versions["digits", "3"] = row("digits", 3, TAGS, ("candidate", "champion"))
    tags = [{"key": "reprise.git_sha", "value": "c" * 40}, {"key": "reprise.ledger", "value": "1: spot, steps 0-40"}]
    metrics = [{"key": "heldout_accuracy", "value": 0.97}, {"key": "loss", "value": 1.0}]
    handler.runs["f" * 32] = {"info": {"experiment_id": "7"}, "data": {"tags": tags, "metrics": metrics}}
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        yield url, handler


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A ledger of three attempts, and version 3 in service."""
    store = Store(root=str(tmp_path / "store"))
    causes = ("spot", "spot", "complete")
    store.write_attempts(TRAIN_KEY, [Attempt(number=i + 1, started=float(i), cause=c) for i, c in enumerate(causes)])
    version = {"version": "3", "label": "3.1a2b3c4d", "mar": "/m.mar", "sha256": "e" * 64, "golden": "/h.jsonl"}
    store.write("endpoints/digits", {"serving": version})
    return store


def test_from_a_version_to_the_commit(registry: tuple[str, Any], store: Store) -> None:
    uri, _ = registry
    found = trace(uri, "digits", "3", store=store)
    assert found == Trace(
        model="digits",
        version="3",
        aliases=["candidate", "champion"],
        in_service=True,
        mar_sha256="e" * 64,
        gate="accepted",
        decision={"accepted": True, "metric": "accuracy", "value": 0.97},
        weights_sha256="b" * 64,
        run_id="f" * 32,
        run="digits-1",
        keys={"pull_data": "1" * 40, "train_model": TRAIN_KEY, "register_model": "3" * 40},
        attempts=store.attempts(TRAIN_KEY),
        attempts_told="1: spot, steps 0-40",
        attempt_count=3,
        interruption_count=2,
        data_digest=DATA,
        code_digest="a" * 64,
        git_sha="c" * 40,
        metrics={"accuracy": 0.97},
        run_url=f"{uri}/#/experiments/7/runs/{'f' * 32}",
        model_url=f"{uri}/#/models/digits/versions/3",
        gaps=[],
    )


def test_addresses_are_those_that_a_browser_reaches(registry: tuple[str, Any]) -> None:
    found = trace(registry[0], "digits", "3", page="https://mlflow.example/")
    assert found.run_url == f"https://mlflow.example/#/experiments/7/runs/{'f' * 32}"
    assert found.model_url == "https://mlflow.example/#/models/digits/versions/3"


@pytest.mark.parametrize(
    "what", ["3", "3.1a2b3c4d", "champion", "candidate", "http://127.0.0.1:8080/predictions/digits"]
)
def test_everything_that_names_a_version(registry: tuple[str, Any], store: Store, what: str) -> None:
    model = "digits" if not what.startswith("http") else "ignored"
    assert trace(registry[0], model, what, store=store).version == "3"


def test_endpoint_is_what_the_record_says_not_the_alias(registry: tuple[str, Any], store: Store) -> None:
    uri, handler = registry
    handler.versions["digits", "2"] = row("digits", 2, TAGS)
    serving = store.read("endpoints/digits")["serving"] | {"version": "2"}
    store.write("endpoints/digits", {"serving": serving})
    assert trace(uri, "", "http://127.0.0.1:8080/predictions/digits", store=store).version == "2"
    assert not trace(uri, "digits", "3", store=store).in_service
    assert trace(uri, "digits", "champion").version == "3", "without a store the alias is all there is"


def test_missing_links_are_named(registry: tuple[str, Any], store: Store) -> None:
    uri, handler = registry
    handler.versions["digits", "4"] = row("digits", 4, {"key.train_model": "9" * 40, "git_sha": "e" * 40})
    gaps = trace(uri, "digits", "4", store=store).gaps
    assert "digits version 4 has no tag reprise.data_digest" in gaps
    assert f"the store has no ledger of training {'9' * 12}" in gaps
    assert f"reprise.git_sha is {'e' * 40!r} on the version and {'c' * 40!r} on its MLflow run" in gaps
    handler.versions["digits", "5"] = row("digits", 5, {}) | {"run_id": ""}
    assert "digits version 5 names no MLflow run" in trace(uri, "digits", "5").gaps


def test_who_uses_pages_through_and_puts_the_newest_first(registry: tuple[str, Any]) -> None:
    uri, handler = registry
    handler.versions = {
        ("m", str(i)): row("m", i, TAGS, ("champion",) if i == 5 else (), created=i) for i in range(1, 6)
    }
    found = who_uses(uri, DATA)
    assert [u.version for u in found] == ["5", "4", "3", "2", "1"]
    assert found[0] == Use(
        model="m",
        version="5",
        aliases=["champion"],
        gate="accepted",
        run_id="f" * 32,
        run="digits-1",
        data_digest=DATA,
        git_sha="c" * 40,
    )
    assert handler.asked[0][1]["filter"] == f"tags.`reprise.data_digest` LIKE '{DATA}%'"


@pytest.mark.parametrize("digest", ["", "abc", "x' OR '1'='1", "%", "d41d8%", "DEADBEEF", "d41d8c.tar"])
def test_what_is_no_digest_is_not_asked_for(registry: tuple[str, Any], digest: str) -> None:
    with pytest.raises(ConfigError, match="expected at least 6"):
        who_uses(registry[0], digest)
    assert registry[1].asked == []


def test_errors(registry: tuple[str, Any]) -> None:
    uri, handler = registry
    with pytest.raises(GiveUp, match="model-versions/get with 404: Model Version not found"):
        trace(uri, "digits", "99")
    with pytest.raises(ConfigError, match="alias 'a b'"):
        trace(uri, "digits", "a b")
    with pytest.raises(ConfigError, match="model ''"):
        trace(uri, "", "3")
    with pytest.raises(ConfigError, match="tracking_uri = 'sqlite"):
        trace("sqlite:///x.db", "digits", "3")
    handler.failing = 503
    with pytest.raises(TryAgain, match="with 503"):
        trace(uri, "digits", "3")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(TryAgain):
            who_uses(f"http://127.0.0.1:{closed.getsockname()[1]}", DATA)


@pytest.mark.e2e
def test_what_was_registered_is_traced_both_ways(mlflow_server: str, tmp_path: Path) -> None:
    """Two trainings on one data set and a refused one on another, through the real step and the real server."""
    from tasks.mlflow_server import connect
    from tasks.model_folder import sha256
    from tasks.register_model import RegisterRequest, register_model

    client = connect(mlflow_server)
    experiment = client.create_experiment("digits")
    (tmp_path / "digits.py").write_text("")
    answer = {"label": 1, "scores": [0.5]}
    body = base64.b64encode(b"x").decode()
    (tmp_path / "heldout.jsonl").write_text(json.dumps({"body_b64": body, "label": 1, "answer": answer}) + "\n")
    digests = ["a" * 32 + ".dir", "a" * 32 + ".dir", "b" * 32 + ".dir"]
    for number, digest in enumerate(digests):
        weights = tmp_path / f"{number}.safetensors"
        weights.write_bytes(bytes([number]))
        request = RegisterRequest(
            key=f"{number + 1}" * 40,
            pipeline="digits",
            tracking_uri=mlflow_server,
            run_id=client.create_run(experiment).info.run_id,
            weights=str(weights),
            weights_sha256=sha256(weights),
            module=str(tmp_path / "digits.py"),
            metrics={"accuracy": 0.97 - number / 10},
            heldout=str(tmp_path / "heldout.jsonl"),
            heldout_digest="h",
            gate={"minimum": 0.8},
            lineage={"git_sha": f"{number}" * 40, "data_digest": digest, "key.train_model": f"{number + 4}" * 40},
            lock_folder=str(tmp_path / "store"),
        )
        if number < 2:
            register_model(request)
        else:
            with pytest.raises(GateRefused):
                register_model(request)
    found = trace(mlflow_server, "digits", "candidate")
    assert (found.version, found.git_sha, found.data_digest) == ("2", "1" * 40, digests[1])
    assert found.keys == {"train_model": "5" * 40, "register_model": "2" * 40}
    assert found.metrics == {"accuracy": 0.87} and found.aliases == ["candidate"] and found.gaps == []
    assert [(u.version, u.gate, u.aliases) for u in who_uses(mlflow_server, "a" * 32)] == [
        ("2", "accepted", ["candidate"]),
        ("1", "accepted", []),
    ]
    assert [(u.version, u.gate) for u in who_uses(mlflow_server, "bbbbbb")] == [("3", "refused")]
    assert who_uses(mlflow_server, "cccccc") == []
    with pytest.raises(GiveUp, match="answered model-versions/get with 404"):
        trace(mlflow_server, "digits", "9")
    with pytest.raises(GiveUp):
        trace(mlflow_server, "digits", "champion")
