"""Reads kustomizations as kustomize does, as far as ours go: what tests need where there is no kubectl.

`load(folder)` gives the objects of an overlay before patches and replacements, with the file each came from.
`missing(...)` says which patch or replacement would hit nothing, and which field of a target is not there: kustomize
itself passes over a target that selects nothing without a word. Not covered: applying them (kubectl does).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One object and its file."""

    path: Path
    body: Json

    @property
    def name(self) -> str:
        """kind/name, for messages."""
        return f"{self.body['kind']}/{self.body['metadata']['name']}"


def kustomization(folder: Path) -> Json:
    """The kustomization of a folder."""
    document = yaml.load((folder / "kustomization.yaml").read_text(), Loader=yaml.CSafeLoader)
    assert isinstance(document, dict)
    return document


def folders(folder: Path) -> list[Path]:
    """The folder, its bases and its components, each once, in the order in which they are taken."""
    found: list[Path] = []
    own = kustomization(folder)
    for name in [*own.get("resources", []), *own.get("components", [])]:
        if "://" not in name and not name.startswith("github.com/") and (folder / name).is_dir():
            found += [f for f in folders((folder / name).resolve()) if f not in found]
    return [*found, folder.resolve()]


def load(folder: Path) -> list[Part]:
    """All objects, generated ConfigMaps included (without hashes in their names)."""
    parts: list[Part] = []
    for one in folders(folder):
        document = kustomization(one)
        for name in document.get("resources", []):
            if (one / name).is_file():
                for body in yaml.load_all((one / name).read_text(), Loader=yaml.CSafeLoader):
                    assert body, f"{one / name}: an empty document"
                    parts.append(Part(path=one / name, body=body))
        for generator in document.get("configMapGenerator", []):
            files = (entry.rpartition("=")[2] for entry in generator["files"])
            data = {Path(name).name: (one / name).read_text() for name in files}
            metadata = {"name": generator["name"], "namespace": generator["namespace"]}
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
            parts.append(Part(path=one / "kustomization.yaml", body=body))
    return parts


def selected(parts: list[Part], select: Json) -> list[Part]:
    """Those that a selector (of a patch or a replacement) hits; its values are anchored regular expressions."""

    def hit(part: Part) -> bool:
        metadata = part.body["metadata"]
        group = part.body["apiVersion"].rpartition("/")[0]
        values = {"kind": part.body["kind"], "name": metadata["name"], "namespace": metadata.get("namespace", "")}
        values |= {"group": group, "version": part.body["apiVersion"].rpartition("/")[2]}
        return all(re.fullmatch(str(pattern), values[key]) for key, pattern in select.items())

    return [part for part in parts if hit(part)]


def steps(path: str) -> list[str]:
    """The parts of a field path: a.b.[name=x].0.[with.dots/in]."""
    return [part.strip("[]") if part.startswith("[") else part for part in re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)]


def value_at(body: Any, path: str) -> Any:
    """The value at a field path. Raises LookupError naming the step that is not there."""
    here = body
    for step in steps(path):
        if isinstance(here, list) and "=" in step:
            key, _, wanted = step.partition("=")
            hits = [item for item in here if str(item.get(key)) == wanted]
            if len(hits) != 1:
                raise LookupError(f"{path}: {len(hits)} items with {step}")
            here = hits[0]
        elif isinstance(here, list) and step.isdigit() and int(step) < len(here):
            here = here[int(step)]
        elif isinstance(here, dict) and step in here:
            here = here[step]
        else:
            raise LookupError(f"{path}: no {step}")
    return here


def missing(folder: Path) -> Iterator[str]:
    """What a patch or a replacement of this overlay would hit in vain, one sentence each."""
    parts = load(folder)
    for one in folders(folder):
        document, where = kustomization(one), one.name
        for patch in document.get("patches", []):
            if not selected(parts, patch["target"]):
                yield f"{where}: a patch hits nothing: {patch['target']}"
        for replacement in document.get("replacements", []):
            source = dict(replacement["source"])
            path = source.pop("fieldPath")
            origins = selected(parts, source)
            if len(origins) != 1:
                yield f"{where}: {len(origins)} sources {source}"
                continue
            try:
                value_at(origins[0].body, path)
            except LookupError as error:
                yield f"{where}: {origins[0].path.parent.name}/{origins[0].path.name} has no {error}"
            for target in replacement["targets"]:
                hits = selected(parts, target["select"])
                if not hits:
                    yield f"{where}: a replacement hits nothing: {target['select']}"
                for part in hits:
                    for field in target["fieldPaths"]:
                        try:
                            value_at(part.body, field)
                        except LookupError as error:
                            yield f"{where}: {part.name}: {error}"


def used_settings(folder: Path) -> set[str]:
    """Keys of settings.yaml that some replacement of this overlay reads."""
    sources = (r["source"] for one in folders(folder) for r in kustomization(one).get("replacements", []))
    return {s["fieldPath"].removeprefix("data.") for s in sources if s["name"] == "settings"}
