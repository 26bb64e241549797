"""What a .mar may contain, checked before TorchServe sees it.

A .mar is a zip whose manifest names files for TorchServe to import, open and even pip install, and TorchServe believes
it. So: a plain zip that reads the same from its front (as TorchServe's Java does) and from its directory at the end (as
Python does), regular files with flat names, the expected ones and no other, sizes within bounds and true, checksums
right, a manifest whose fields stay inside the archive, settings of which none can run code, weights without pickle.

    python -m tasks.archive FILE.mar

Not covered: what the user's Python does when it is imported (that is what deploying it means), right answers
(tasks.admission). Archives of `tasks.package_model` pass; those of other tools mostly do not, on purpose.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deployments.errors import GiveUp
from tasks.strict_zip import Entry, at, read_entries, unpacked

HANDLER = "reprise_handler.py"
MANIFEST = "MAR-INF/MANIFEST.json"
MAX_BYTES = 64 << 30  # unpacked, all together
MAX_TEXT = 64 << 20  # one entry that is not the weights
MAX_RATIO = 100  # unpacked : packed; text compresses 3 to 20 times, bombs a thousand
FLAT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
# Interpreters and loaders treat these specially, wherever they lie on the worker's path.
REFUSED = (
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".bin",
    ".ckpt",
    ".pyc",
    ".so",
    ".egg",
    ".whl",
    ".sh",
    ".mar",
    ".zip",
    ".jar",
)
MANIFEST_KEYS = {"createdOn", "runtime", "model", "archiverVersion", "description"}
MODEL_KEYS = {"modelName", "modelVersion", "handler", "serializedFile", "configFile", "description"}
SETTINGS = {
    "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "jobQueueSize",
    "maxRetryTimeoutInSec",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Archive:
    """An archive that passed."""

    path: str
    entries: tuple[str, ...]
    bytes: int  # unpacked
    manifest: dict[str, Any]
    content_digest: str  # over names and bytes; the handler reports the same of what it loaded


def validate_archive(
    path: Path, *, expected: Iterable[str] | None = None, pipeline: str = "", label: str = ""
) -> Archive:
    """Read the whole archive and raise GiveUp with the first thing that is wrong. `expected`: exactly these names."""
    if path.is_symlink() or not path.is_file():
        raise GiveUp(f"{path}: not a regular file")
    try:
        with path.open("rb") as handle:
            return check(path, handle, None if expected is None else set(expected), pipeline, label)
    except (struct.error, zlib.error, UnicodeDecodeError, RecursionError, ValueError, OverflowError) as error:
        raise GiveUp(f"{path.name}: damaged: {error}") from error


def content_digest(path: Path) -> str:
    """The digest over names and bytes of a .mar's members, after the same checks. Raises GiveUp."""
    return validate_archive(path).content_digest


def check(path: Path, handle: BinaryIO, expected: set[str] | None, pipeline: str, label: str) -> Archive:
    """All checks, cheap ones first."""
    where = path.name
    entries = read_entries(handle, path.stat().st_size, where)
    names = [entry.name for entry in entries]
    for entry in entries:
        check_entry(entry, where)
    if len({name.lower() for name in names}) != len(names):
        raise GiveUp(f"{where}: two entries have the same name")
    total = sum(entry.size for entry in entries)
    if total > MAX_BYTES:
        raise GiveUp(f"{where}: unpacks to {total} bytes; at most {MAX_BYTES}")
    for needed in (MANIFEST, HANDLER, "serving.json", "model-config.yaml", "model.safetensors"):
        if needed not in names:
            raise GiveUp(f"{where}: has no {needed}")
    if expected is not None and set(names) != expected:
        odd = sorted(set(names) ^ expected)
        raise GiveUp(f"{where}: unexpected or missing entries: {', '.join(odd[:5])}")
    digests: dict[str, str] = {}
    texts: dict[str, bytes] = {}
    for entry in entries:
        digest, kept = hashlib.sha256(), bytearray()
        keep = entry.name in (MANIFEST, "serving.json", "model-config.yaml")
        for block in unpacked(handle, entry, where):
            digest.update(block)
            if keep:
                kept += block
        digests[entry.name] = digest.hexdigest()
        texts[entry.name] = bytes(kept)
        if entry.name.endswith(".safetensors"):
            check_safetensors(handle, entry, where)
    manifest = check_manifest(texts[MANIFEST], set(names), pipeline, label, where)
    check_settings(texts["model-config.yaml"], where)
    check_about(texts["serving.json"], manifest, set(names), where)
    content = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    return Archive(path=str(path), entries=tuple(names), bytes=total, manifest=manifest, content_digest=content)


def check_entry(entry: Entry, where: str) -> None:
    """Name and claimed sizes of one entry. Raises GiveUp."""
    name = entry.name
    if name != MANIFEST and not FLAT.fullmatch(name):
        raise GiveUp(f"{where}: entry {name!r}: only flat file names and {MANIFEST} are expected")
    if ".." in name or Path(name).suffix.lower() in REFUSED or name.lower() in ("sitecustomize.py", "usercustomize.py"):
        raise GiveUp(f"{where}: entry {name!r} could run or unpickle by itself; it is refused")
    if entry.method == 0 and entry.packed != entry.size:
        raise GiveUp(f"{where}: entry {name!r} claims two sizes")
    if entry.method == 8 and entry.size > MAX_RATIO * max(entry.packed, 1024):
        raise GiveUp(f"{where}: entry {name!r} grows from {entry.packed} to {entry.size} bytes: a zip bomb")
    if not name.endswith(".safetensors") and entry.size > MAX_TEXT:
        raise GiveUp(f"{where}: entry {name!r} has {entry.size} bytes; at most {MAX_TEXT} beside the weights")


def check_safetensors(handle: BinaryIO, entry: Entry, where: str) -> None:
    """Weights must be safetensors: a JSON header and plain numbers. Raises GiveUp."""
    if entry.method != 0 or entry.size < 8:
        raise GiveUp(f"{where}: {entry.name} must be stored, not packed, and be safetensors")
    length = struct.unpack("<Q", at(handle, entry.data, 8))[0]
    if length > min(entry.size - 8, 100 << 20):
        raise GiveUp(f"{where}: {entry.name} is not safetensors: its header would have {length} bytes")
    header = parse_object(at(handle, entry.data + 8, length), f"{where}: {entry.name}")
    for name, row in header.items():
        if name == "__metadata__":
            continue
        offsets = row.get("data_offsets") if isinstance(row, dict) else None
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
            raise GiveUp(f"{where}: {entry.name}: tensor {name!r} has no place")
        if not 0 <= offsets[0] <= offsets[1] <= entry.size - 8 - length:
            raise GiveUp(f"{where}: {entry.name}: tensor {name!r} lies outside the file")


def check_manifest(text: bytes, names: set[str], pipeline: str, label: str, where: str) -> dict[str, Any]:
    """The manifest names only files of this archive and asks for nothing else. Raises GiveUp."""
    manifest = parse_object(text, f"{where}: {MANIFEST}")
    model = manifest.get("model")
    if not isinstance(model, dict):
        raise GiveUp(f"{where}: {MANIFEST}: has no model")
    for found, known in ((manifest, MANIFEST_KEYS), (model, MODEL_KEYS)):
        if odd := sorted(set(found) - known):
            raise GiveUp(f"{where}: {MANIFEST}: {odd[0]} = {found[odd[0]]!r} is not allowed")
    if manifest.get("runtime") != "python":
        raise GiveUp(f"{where}: {MANIFEST}: runtime = {manifest.get('runtime')!r}; expected 'python'")
    for key, wanted in (
        ("handler", HANDLER),
        ("serializedFile", "model.safetensors"),
        ("configFile", "model-config.yaml"),
    ):
        if model.get(key) != wanted or wanted not in names:
            raise GiveUp(f"{where}: {MANIFEST}: {key} = {model.get(key)!r}; expected {wanted!r}")
    for key, wanted in (("modelName", pipeline), ("modelVersion", label)):
        value = model.get(key)
        if not isinstance(value, str) or not FLAT.fullmatch(value) or (wanted and value != wanted):
            raise GiveUp(f"{where}: {MANIFEST}: {key} = {value!r}; expected {wanted or 'a plain name'!r}")
    return manifest


def check_settings(text: bytes, where: str) -> None:
    """model-config.yaml is JSON with the known numbers: no virtual environments, launchers or tags. Raises GiveUp."""
    for key, value in parse_object(text, f"{where}: model-config.yaml").items():
        if key not in SETTINGS or type(value) is not int or not 0 <= value < 2**31:
            raise GiveUp(f"{where}: model-config.yaml: {key} = {value!r} is not allowed")


def check_about(text: bytes, manifest: dict[str, Any], names: set[str], where: str) -> None:
    """serving.json speaks of the same version, and its module is in the archive. Raises GiveUp."""
    about = parse_object(text, f"{where}: serving.json")
    model = manifest["model"]
    for key, wanted in (("label", model["modelVersion"]), ("model", model["modelName"])):
        if about.get(key) != wanted:
            raise GiveUp(f"{where}: serving.json: {key} = {about.get(key)!r}, the manifest says {wanted!r}")
    module = about.get("module")
    if not isinstance(module, str) or module not in names or not module.endswith(".py") or module == HANDLER:
        raise GiveUp(f"{where}: serving.json: module = {module!r} is not a Python file of this archive")


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Strict JSON: an object, no key twice (parsers differ in which one counts). Raises GiveUp."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise GiveUp(f"{where}: a key stands twice")
        return dict(pairs)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise GiveUp(f"{where}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise GiveUp(f"{where}: expected an object")
    return value


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tasks.archive FILE.mar")
    try:
        passed = validate_archive(Path(sys.argv[1]))
    except GiveUp as refused:
        sys.exit(f"refused: {refused}")
    print(f"{passed.path}: {len(passed.entries)} entries, {passed.bytes} bytes, content {passed.content_digest}")
