"""What DVC says about a data path at a commit, from git's text files alone: nothing is pulled, dvc is not imported.

A pointer is `<path>.dvc` or an output in dvc.lock. The remote's settings are those of .dvc/config at the commit, with
the machine's own .dvc/config.local over them and the user's global config under them, as in DVC. Not covered: DVC 2's
line-ending hash, cloud-versioned remotes (both refused with the reason), the data itself (tasks.pull_data).
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError, PreflightError

if TYPE_CHECKING:
    from flows.project import Project

_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")
_SECTION = re.compile(r"""\[\s*['"]?\s*([\w-]+)(?:\s+"([^"]+)")?\s*['"]?\s*\]""")


@dataclass(frozen=True, kw_only=True)
class DataPointer:
    """A DVC output at a commit."""

    path: str  # of the output, from the repository's root
    digest: str  # DVC's md5: "<32 hex>.dir" for a folder, "<32 hex>" for a file
    size: int  # bytes; 0 when the pointer does not say
    nfiles: int  # 1 for a file; 0 when the pointer does not say
    pointer_file: str  # the .dvc file or dvc.lock that says so
    dvc_root: str  # the folder that holds .dvc, from the repository's root: "" or a path
    remote: str  # name
    remote_url: str


@dataclass(frozen=True)
class _Out:
    """One output as a pointer file lists it."""

    path: str  # from the root; may lead outside
    pointer_file: str
    raw: dict[str, Any]


def read_pointer(project: Project, sha: str, path: str) -> DataPointer:
    """The pointer of `path`, relative to the root. Raises ConfigError (wrong in git) or PreflightError (the remote)."""
    folder, name = posixpath.split(path)
    configs = [posixpath.join(up, ".dvc/config") for up in _upwards(folder)]
    near = [f"{path}.dvc", *(posixpath.join(up, f) for up in _upwards(folder) for f in ("dvc.lock", "dvc.yaml"))]
    texts = {k: v.decode(errors="replace") for k, v in project.blobs(sha, [*configs, *near]).items() if v is not None}
    if not (found := [c for c in configs if c in texts]):
        raise ConfigError(
            f"{path}@{sha[:7]}: the commit has no .dvc folder, so nothing is tracked by DVC; "
            f"make it: dvc init && dvc add {path} && git commit"
        )
    dvc_root = posixpath.dirname(posixpath.dirname(found[0]))
    out = next((o for o in _outs(texts) if o.path == path), None) or _elsewhere(project, sha, path)
    digest = out.raw.get("md5")
    if out.raw.get("hash", "md5-dos2unix" if digest else "md5") != "md5":
        raise ConfigError(
            f"{out.pointer_file}@{sha[:7]}: {path} has a hash of DVC 2, which ignores line endings; "
            "expected hash: md5; convert it: dvc cache migrate --dvc-files && git commit"
        )
    if not isinstance(digest, str) or not _MD5.fullmatch(digest):
        raise ConfigError(
            f"{out.pointer_file}@{sha[:7]}: {path} has md5 {digest!r}; expected 32 hex digits; write it: dvc commit"
        )
    name, url = _remote(project, texts[found[0]], dvc_root, out.raw.get("remote"))
    return DataPointer(
        path=path,
        digest=digest,
        size=int(out.raw.get("size") or 0),
        nfiles=int(out.raw.get("nfiles") or 0) if digest.endswith(".dir") else 1,
        pointer_file=out.pointer_file,
        dvc_root=dvc_root,
        remote=name,
        remote_url=url,
    )


def _upwards(folder: str) -> Iterator[str]:
    """The folder, its parents, and the root as ""."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)
    yield ""


def _outs(texts: dict[str, str]) -> Iterator[_Out]:
    """All outputs of .dvc and dvc.lock files. Raises ConfigError for one that is no YAML of that form."""
    for file, text in texts.items():
        folder = posixpath.dirname(file)
        if file.endswith(".dvc"):
            document = _yaml(file, text)
            places = [(str(document.get("wdir") or "."), document.get("outs"))]
        elif posixpath.basename(file) == "dvc.lock":
            stages = _yaml(file, text).get("stages") or {}
            described = texts.get(posixpath.join(folder, "dvc.yaml"), "")
            wdirs = _yaml(file, described).get("stages") or {} if described else {}
            places = [
                (str((wdirs.get(n) or wdirs.get(n.partition("@")[0]) or {}).get("wdir") or "."), s.get("outs"))
                for n, s in stages.items()
                if isinstance(s, dict)
            ]
        else:
            continue
        for wdir, outs in places:
            for raw in outs if isinstance(outs, list) else []:
                if isinstance(raw, dict) and isinstance(raw.get("path"), str):
                    yield _Out(posixpath.normpath(posixpath.join(folder, wdir, raw["path"])), file, raw)


def _elsewhere(project: Project, sha: str, path: str) -> _Out:
    """The output from any pointer of the commit. Raises ConfigError listing what is tracked."""
    files = [f for f in project.files(sha) if f.endswith(".dvc") or posixpath.basename(f) in ("dvc.lock", "dvc.yaml")]
    texts = {k: v.decode(errors="replace") for k, v in project.blobs(sha, files).items() if v is not None}
    outs = list(_outs(texts))
    if found := next((o for o in outs if o.path == path), None):
        return found
    at = f"{path}@{sha[:7]}"
    own = [o for o in outs if o.pointer_file == f"{path}.dvc"]
    if own and (own[0].path.startswith(("../", "/")) or "://" in own[0].raw["path"]):
        raise ConfigError(
            f"{own[0].pointer_file}@{sha[:7]}: its output {own[0].raw['path']!r} points outside the repository; "
            "expected data inside it; bring it in: dvc import-url, or move it and dvc add"
        )
    if around := next((o for o in outs if path.startswith(f"{o.path}/")), None):
        inside = path.removeprefix(f"{around.path}/")
        raise ConfigError(
            f"{at}: DVC tracks {around.path} as a whole, which {path} is a part of; "
            f'set [data] path to {around.path} and its splits to "{inside}/..."'
        )
    tracked = sorted({o.path for o in outs if not o.path.startswith("../")})
    there = (project.root / path).exists()
    fix = f"add it: dvc add {path} && dvc push && git add {path}.dvc && git commit" if there else "check [data] path"
    listed = f"tracked are: {', '.join(tracked[:8])}" if tracked else "it tracks nothing"
    raise ConfigError(f"{at}: DVC does not track it in this commit; {listed}; {fix}")


def _yaml(file: str, text: str) -> dict[str, Any]:
    import yaml

    try:
        document = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        why = getattr(error, "problem", None) or "no YAML"
        raise ConfigError(f"{file}:{line}: expected the YAML that DVC writes, found: {why}; restore the file") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{file}:1: expected the YAML that DVC writes, found {type(document).__name__}; restore it")
    return document


def _remote(project: Project, committed: str, dvc_root: str, named: str | None) -> tuple[str, str]:
    """Name and URL of the remote. Raises PreflightError if there is none or it does not verify what it gives."""
    merged: dict[tuple[str, str], dict[str, str]] = {}
    local = project.root / dvc_root / ".dvc" / "config.local"
    for text in (_global_config(), committed, local.read_text() if local.is_file() else ""):
        for section, values in _config(text).items():
            merged.setdefault(section, {}).update(values)
    name = named or merged.get(("core", ""), {}).get("remote")
    config = f"{posixpath.join(dvc_root, '.dvc/config')}"
    known = [n for kind, n in merged if kind == "remote"]
    if not name:
        fix = f"dvc remote default {known[0]}" if known else "dvc remote add --default storage URL"
        raise PreflightError(f"{config}: no default remote, so the data cannot be pulled; set it: {fix} && git commit")
    remote = merged.get(("remote", name))
    if remote is None:
        raise PreflightError(
            f"{config}: remote {name!r} is not described; known: {', '.join(known) or 'none'}; "
            f"add it: dvc remote add {name} URL"
        )
    if remote.get("verify", "").lower() not in ("true", "1", "yes", "on"):
        raise PreflightError(
            f"{config}: remote {name!r} has verify = {remote.get('verify', 'false')}; expected true, because "
            f"DVC takes a tampered object without a word otherwise; set it: dvc remote modify {name} verify true "
            f"&& git commit (for an older commit: dvc remote modify --local {name} verify true)"
        )
    return name, remote.get("url", "")


def _config(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """DVC's INI: (section, name) -> values."""
    sections: dict[tuple[str, str], dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        line = line.strip()
        if match := _SECTION.fullmatch(line):
            current = sections.setdefault((match[1], match[2] or ""), {})
        elif "=" in line and not line.startswith(("#", ";")):
            key, _, value = line.partition("=")
            current[key.strip()] = value.strip().strip("'\"")
    return sections


def _global_config() -> str:
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    path = Path(os.environ.get("DVC_GLOBAL_CONFIG_DIR") or Path(home) / "dvc") / "config"
    return path.read_text() if path.is_file() else ""
