"""What a cluster looks like at one moment, as one JSON document that a preflight can judge anywhere.

    snapshot = take(connect(), place)        # deployments.snapshot_take
    snapshot.save(Path("snapshot.json"))     # reprise preflight --snapshot snapshot.json

Only what is judged is kept: no environment and no secrets' contents, so that a snapshot can be shown to others. What
may not be read is named in `unreadable` and costs the rows that needed it, nothing else.
Not covered: taking it (snapshot_take.py), the judgement (preflight.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError

Json = dict[str, Any]
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A cluster at one moment. Objects are as the API gives them, less what nobody needs."""

    namespace: str
    taken: float  # unix seconds
    version: str = ""  # of the server: v1.36.2
    clock_offset: float | None = None  # seconds, the server's clock minus ours; exact to half a second
    apis: Mapping[str, Sequence[str]] = field(default_factory=dict)  # "kubeflow.org/v1" -> plurals of its resources
    access: Sequence[Json] = ()  # {"group", "resource", "verb", "allowed", "reason"}
    objects: Mapping[str, Sequence[Json]] = field(default_factory=dict)  # plural -> objects
    unreadable: Mapping[str, str] = field(default_factory=dict)  # plural -> why
    services_of: Sequence[str] = ()  # namespaces whose Services are here; empty: the own one
    probes: Mapping[str, Json] = field(default_factory=dict)  # mlflow, dvc: asked from where the pods are
    format: int = FORMAT

    def get(self, plural: str) -> list[Json]:
        """Objects of a kind; [] if there are none, or they could not be read."""
        return list(self.objects.get(plural) or ())

    def known(self, plural: str) -> bool:
        """Whether objects of this kind could be read."""
        return plural in self.objects and plural not in self.unreadable

    def find(self, plural: str, name: str, namespace: str = "") -> Json | None:
        """One object by name."""
        for item in self.get(plural):
            metadata = item["metadata"]
            if metadata["name"] == name and (not namespace or metadata.get("namespace", namespace) == namespace):
                return item
        return None

    def to_json(self) -> str:
        """The whole document, sorted."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    def save(self, path: Path) -> None:
        """Write it to a file. Raises ConfigError if that cannot be written."""
        try:
            path.write_text(self.to_json() + "\n")
        except OSError as error:
            raise ConfigError(f"--save {path}: {error.strerror}; expected a file that can be written") from None

    @classmethod
    def from_json(cls, text: str, where: str = "snapshot") -> Snapshot:
        """Read a snapshot. Raises ConfigError that says what is wrong with it."""
        expected = "expected a file written by `reprise preflight --save`"
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error}); {expected}") from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
            raise ConfigError(f"{where}: format {found!r}; {expected} (format {FORMAT})")
        try:
            return cls(**raw)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}; {expected}") from error

    @classmethod
    def read(cls, path: Path) -> Snapshot:
        """The snapshot in that file. Raises ConfigError."""
        try:
            return cls.from_json(path.read_text(), str(path))
        except OSError as error:
            raise ConfigError(f"snapshot {path}: {error.strerror}; expected a file to read") from error
