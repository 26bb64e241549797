"""From an answer of the endpoint back to the commit, and from a data digest forward to every model made of it.

`trace` follows version -> MLflow run -> attempts -> DVC digest -> git sha; `who_uses` goes the other way. Both read the
tags that register_model wrote and say where a link is missing instead of guessing. By MLflow's REST API and the
standard library, because the flow's image has no mlflow and a reading command must not take seconds to import it.
Not covered: writing tags (tasks.register_model), whether registry and endpoint agree (`reprise audit`).
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import ConfigError, GiveUp, TryAgain
from deployments.serving import Answer, call
from tasks.endpoint import EndpointRecord
from tasks.records import Attempt, Store

API = "/api/2.0/mlflow/"
TAG = "reprise."
DIGEST = re.compile(r"[0-9a-f]{6,64}(\.dir)?")  # a whole digest, or its first six digits and more
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
EXPECTED = ("git_sha", "data_digest", "step_key", "key.train_model", "weights_sha256", "gate")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Where a model version comes from. Empty strings are links that nobody recorded; `gaps` names them."""

    model: str
    version: str
    aliases: list[str]
    in_service: bool  # the endpoint's record says so; False also when there is no record
    mar_sha256: str  # of the archive in service, if it is this version's
    gate: str  # accepted | refused
    decision: dict[str, Any]  # tasks.gate.Decision
    weights_sha256: str
    run_id: str  # MLflow run of the training
    run: str  # Reprise's run that registered it
    keys: dict[str, str]  # step name -> step key
    attempts: list[Attempt]  # the ledger; empty when the store has none
    attempts_told: str  # the ledger as the MLflow run tells it, for a store that is gone
    attempt_count: int
    interruption_count: int
    data_digest: str  # DVC
    code_digest: str
    git_sha: str
    metrics: dict[str, float]  # held-out
    run_url: str
    model_url: str
    gaps: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Use:
    """A model version that was trained on a data digest."""

    model: str
    version: str
    aliases: list[str]
    gate: str
    run_id: str
    run: str
    data_digest: str
    git_sha: str


def trace(uri: str, model: str, what: str = "champion", *, store: Store | None = None, page: str = "") -> Trace:
    """Follow one version of `model` back to its commit.

    `what` is a version, an alias, a model server's label (`3.1a2b3c4d`) or the endpoint's address. `store` gives the
    ledger of attempts and what is in service, `page` is MLflow as a browser reaches it, if that is not `uri`. Raises
    GiveUp when there is no such version, TryAgain when MLflow is away.
    """
    if what.startswith(("http://", "https://")):
        model = urllib.parse.urlsplit(what).path.rstrip("/").rsplit("/", 1)[-1]
        what = "champion"
    _check_name("model", model)
    endpoint = EndpointRecord(folder=str(store.path / "endpoints"), pipeline=model) if store else None
    serving = endpoint.serving() if endpoint else None
    if what == "champion" and serving:
        what = serving.version
    row = _version(uri, model, what)
    tags, version, run_id = _tags(row), str(row["version"]), str(row.get("run_id", ""))
    run = _get(uri, "runs/get", run_id=run_id).get("run", {}) if run_id else {}
    data, info = run.get("data", {}), run.get("info", {})
    run_tags = _tags(data)
    keys = {name.removeprefix("key."): key for name, key in tags.items() if name.startswith("key.")}
    if "step_key" in tags:
        keys["register_model"] = tags["step_key"]
    attempts = store.attempts(keys["train_model"]) if store and keys.get("train_model") else []
    serves = bool(serving and serving.version == version)
    gaps = [f"{model} version {version} has no tag {TAG}{name}" for name in EXPECTED if not tags.get(name)]
    if not run:
        gaps.append(f"{model} version {version} names no MLflow run")
    if store and keys.get("train_model") and not attempts:
        gaps.append(f"the store has no ledger of training {keys['train_model'][:12]}")
    for name in ("git_sha", "data_digest"):
        if run_tags.get(name, tags.get(name)) != tags.get(name):
            gaps.append(f"{TAG}{name} is {tags.get(name)!r} on the version and {run_tags[name]!r} on its MLflow run")
    base = (page or uri).rstrip("/")
    return Trace(
        model=model,
        version=version,
        aliases=_aliases(row),
        in_service=serves,
        mar_sha256=serving.sha256 if serving and serves else "",
        gate=tags.get("gate", ""),
        decision=json.loads(tags.get("decision") or "{}"),
        weights_sha256=tags.get("weights_sha256", ""),
        run_id=run_id,
        run=tags.get("run", ""),
        keys=keys,
        attempts=attempts,
        attempts_told=run_tags.get("ledger", ""),
        attempt_count=len(attempts) or int(tags.get("attempts") or 0),
        interruption_count=int(tags.get("interruptions") or 0),
        data_digest=tags.get("data_digest", ""),
        code_digest=tags.get("code_digest", ""),
        git_sha=tags.get("git_sha", ""),
        metrics={
            str(m["key"]).removeprefix("heldout_"): float(m["value"])
            for m in data.get("metrics", [])
            if str(m["key"]).startswith("heldout_")
        },
        run_url=f"{base}/#/experiments/{info['experiment_id']}/runs/{run_id}" if info else "",
        model_url=f"{base}/#/models/{model}/versions/{version}",
        gaps=gaps,
    )


def who_uses(uri: str, digest: str) -> list[Use]:
    """Every model version, of all pipelines, that was trained on a DVC digest (or on one beginning so), newest first.

    Raises ConfigError for what is no digest, TryAgain when MLflow is away.
    """
    check_digest(digest)
    condition = f"tags.`{TAG}data_digest` LIKE '{digest}%'"
    found: list[dict[str, Any]] = []
    page = ""
    while True:
        answer = _get(uri, "model-versions/search", filter=condition, max_results="1000", page_token=page)
        found += answer.get("model_versions", [])
        page = answer.get("next_page_token", "")
        if not page:
            break
    found.sort(key=lambda row: (-int(row.get("creation_timestamp", 0)), str(row["name"]), -int(row["version"])))
    # A search tells no aliases; the model's own row does.
    aliases = {name: _aliases_of(uri, name) for name in {str(row["name"]) for row in found}}
    return [_use(row, aliases[str(row["name"])]) for row in found]


def check_digest(digest: str) -> None:
    """Raises ConfigError for what is no DVC digest, nor the beginning of one."""
    if not DIGEST.fullmatch(digest):
        raise ConfigError(
            f"data digest {digest!r}: expected at least 6 of its hexadecimal digits, as `reprise show` prints it"
        )


def _aliases_of(uri: str, model: str) -> dict[str, list[str]]:
    """Version -> aliases, for one model."""
    found: dict[str, list[str]] = {}
    for row in _get(uri, "registered-models/get", name=model)["registered_model"].get("aliases", []):
        found.setdefault(str(row["version"]), []).append(str(row["alias"]))
    return {version: sorted(names) for version, names in found.items()}


def _use(row: dict[str, Any], aliases: dict[str, list[str]]) -> Use:
    tags = _tags(row)
    return Use(
        model=str(row["name"]),
        version=str(row["version"]),
        aliases=aliases.get(str(row["version"]), []),
        gate=tags.get("gate", ""),
        run_id=str(row.get("run_id", "")),
        run=tags.get("run", ""),
        data_digest=tags.get("data_digest", ""),
        git_sha=tags.get("git_sha", ""),
    )


def _version(uri: str, model: str, what: str) -> dict[str, Any]:
    """The registry's row of a version, a label or an alias."""
    number = what.split(".", 1)[0]
    if number.isdigit():
        answer = _get(uri, "model-versions/get", name=model, version=number)
    else:
        _check_name("alias", what)
        answer = _get(uri, "registered-models/alias", name=model, alias=what)
    row: dict[str, Any] = answer["model_version"]
    return row


def _check_name(kind: str, value: str) -> None:
    if not NAME.fullmatch(value):
        raise ConfigError(f"{kind} {value!r}: expected letters, digits, '.', '_' and '-'")


def _tags(row: dict[str, Any]) -> dict[str, str]:
    """Our tags, without their prefix."""
    return {
        str(t["key"]).removeprefix(TAG): str(t.get("value", ""))
        for t in row.get("tags", [])
        if str(t["key"]).startswith(TAG)
    }


def _aliases(row: dict[str, Any]) -> list[str]:
    return sorted(a if isinstance(a, str) else str(a.get("alias")) for a in row.get("aliases", []))


def _get(uri: str, route: str, **query: str) -> dict[str, Any]:
    """One question to MLflow. Raises GiveUp when it says no, TryAgain when it is away."""
    if not uri.startswith(("http://", "https://")):
        raise ConfigError(f"tracking_uri = {uri!r}: expected the address of an MLflow server (http://...)")
    text = urllib.parse.urlencode({k: v for k, v in query.items() if v})
    token = os.environ.get("MLFLOW_TRACKING_TOKEN", "")
    answer = call("GET", f"{uri.rstrip('/')}{API}{route}?{text}", None, token=token)
    if answer.status == 200:
        return answer.document()
    raise _refused(uri, route, answer)


def _refused(uri: str, route: str, answer: Answer) -> GiveUp | TryAgain:
    message = str(answer.document().get("message") or answer.body.decode(errors="replace"))[:300]
    kind = TryAgain if answer.status >= 500 or answer.status in (408, 429) else GiveUp
    return kind(f"MLflow at {uri} answered {route} with {answer.status}: {message}")
