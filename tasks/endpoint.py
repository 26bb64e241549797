"""The record of an endpoint: what is in service, what is under way, what was before. One JSON document per pipeline.

`serving` is the truth: alias `champion`, what the server has (TorchServe's default version, a cluster's Deployment) and
the .mar's digest are made to equal it, after a kill as well as after a failure. A change notes each phase before its
effect and writes `serving` in the one write that commits it. Standard library only. Not covered: the effects themselves
(tasks.rollout, tasks.rolling_update), who may write (the lock).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.errors import GiveUp
from tasks.records import Store

HISTORY = 200  # entries kept


@dataclass(frozen=True, kw_only=True)
class Version:
    """All that is needed to put one version into service, now or again."""

    version: str  # MLflow's
    label: str  # TorchServe's
    mar: str  # path
    sha256: str  # of the .mar
    golden: str  # its held-out answers
    key: str = ""
    golden_count: int = 20
    tolerance: float = 1e-4
    serve: dict[str, Any] = field(default_factory=dict)
    cluster: dict[str, Any] = field(default_factory=dict)  # the ClusterTarget it was proved with: image, resources, ...


@dataclass(frozen=True, kw_only=True)
class EndpointRecord:
    """The document of one pipeline under a folder (`<store>/endpoints`)."""

    folder: str
    pipeline: str

    @property
    def store(self) -> Store:
        """The store whose records these are."""
        return Store(root=str(Path(self.folder.removeprefix("file://")).parent))

    @contextmanager
    def lock(self, wait_seconds: float) -> Iterator[None]:
        """One rollout at a time; it ends with its process. Raises TryAgain naming the holder."""
        with self.store.lock(f"endpoint-{self.pipeline}", wait_seconds=wait_seconds):
            yield

    def read(self) -> dict[str, Any]:
        """The document, or an empty one."""
        found = self.store.read(self._name())
        empty: dict[str, Any] = {"serving": None, "previous": None, "transaction": None, "versions": {}, "history": []}
        return {**empty, **(found or {}), "pipeline": self.pipeline}

    def serving(self) -> Version | None:
        """The version in service, as committed."""
        raw = self.read()["serving"]
        return Version(**raw) if raw else None

    def previous(self) -> Version | None:
        """The version in service before it."""
        raw = self.read()["previous"]
        return Version(**raw) if raw else None

    def keep_golden(self, label: str, source: str) -> str:
        """A copy of held-out answers beside the record, so that going back works when the training is cleaned away.

        Returns its path, or `source` where neither exists.
        """
        target = Path(self.folder.removeprefix("file://")) / "golden" / f"{self.pipeline}-{label}.jsonl"
        given = Path(source.removeprefix("file://"))
        if not given.is_file():
            return str(target) if target.is_file() else source
        if given != target:
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{target.name}.{os.getpid()}")
            aside.write_bytes(given.read_bytes())
            aside.replace(target)
        return str(target)

    def find(self, wanted: str) -> Version:
        """A version that was in service once, by label or by MLflow version (its newest label). Raises GiveUp."""
        known: dict[str, Any] = self.read()["versions"]
        labels = [label for label, row in known.items() if wanted in (label, row["version"])]
        if not labels:
            raise GiveUp(
                f"{self.pipeline}: version {wanted!r} was never in service; known: {', '.join(known) or 'none'}"
            )
        return Version(**known[labels[-1]])

    def begin(self, kind: str, target: Version, alias_before: str | None) -> None:
        """Note a transaction before its first effect. A repeated begin of the same target continues it: what the alias
        was before is what it was before the first try."""
        document = self.read()
        if (unfinished := document["transaction"]) and unfinished["target"]["label"] == target.label:
            alias_before = unfinished["alias_before"]
        document["transaction"] = {
            "kind": kind,
            "target": asdict(target),
            "alias_before": alias_before,
            "phase": "begun",
            "started": time.time(),
            "process": os.getpid(),
        }
        self._write(document)

    def phase(self, phase: str, **more: Any) -> None:
        """Note the phase that comes next."""
        document = self.read()
        if phase == "undoing" and document["transaction"]["phase"] != "undoing":
            more["reached"] = document["transaction"]["phase"]
        document["transaction"] |= {"phase": phase, **more}
        self._write(document)

    def commit(self, target: Version) -> None:
        """`target` is in service: the one write that decides it."""
        document = self.read()
        if document["serving"] and document["serving"]["label"] != target.label:
            document["previous"] = document["serving"]
        document["serving"] = asdict(target)
        document["versions"].pop(target.label, None)  # the newest stands last
        document["versions"][target.label] = asdict(target)
        document["transaction"]["phase"] = "committed"
        self._write(document)

    def close(self, outcome: str, why: str = "", **figures: Any) -> None:
        """The transaction is over and nothing of it is left: into the history."""
        document = self.read()
        transaction = document["transaction"]
        if transaction is None:
            return
        document["transaction"] = None
        row = {
            "kind": transaction["kind"],
            "label": transaction["target"]["label"],
            "outcome": outcome,
            "why": why,
            "started": transaction["started"],
            "ended": time.time(),
            **figures,
        }
        document["history"] = [*document["history"], row][-HISTORY:]
        self._write(document)

    def _name(self) -> str:
        return f"{Path(self.folder).name}/{self.pipeline}"

    def _write(self, document: dict[str, Any]) -> None:
        self.store.write(self._name(), document)
