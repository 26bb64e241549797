"""Weights and the user's module become one .mar: same inputs, same bytes, checked before anybody may load it.

    python -m tasks.step package_model request.json result.json

torch-model-archiver writes it, in a private temporary folder: it removes `$TMPDIR/<model name>` before it starts, and
two of them with one name destroy each other's work. Its output differs from second to second, so it is written again
with sorted names, one date, one mode and a pinned manifest, uncompressed, because deflate differs between zlib builds.
Not covered: whether the model answers rightly (tasks.admission), pickled weights (refused), pip requirements in a .mar.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError, GiveUp
from tasks.archive import HANDLER, MANIFEST, validate_archive

NAME = re.compile(
    r"[a-z0-9]([a-z0-9-]{0,51}[a-z0-9])?"
)  # what MLflow, Kubernetes and TorchServe all take, room for suffixes
EPOCH = (1980, 1, 1, 0, 0, 0)  # the oldest date a zip can tell
PINNED = "01/01/1980 00:00:00"
RESERVED = {"reprise_handler", "serving", "ts", "torch", "numpy", "safetensors"}


@dataclass(frozen=True, kw_only=True)
class PackageRequest:
    """What goes into the archive. Paths are absolute."""

    key: str
    pipeline: str
    version: str  # MLflow's model version
    weights: str  # model.safetensors
    weights_sha256: str
    module: str  # the user's Python file
    files: list[str] = field(default_factory=list)  # more files of the user's, all put beside the module
    params: dict[str, Any] = field(default_factory=dict)  # for build_model
    serve: dict[str, Any] = field(default_factory=dict)  # batch_size, max_batch_delay_seconds, workers, ...
    model_store: str  # TorchServe's folder of .mar files


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """The archive that was written, or was there already with the same bytes."""

    mar: str  # path
    sha256: str
    label: str  # TorchServe's name of this version: "<MLflow version>.<first 8 of the package key>"
    bytes: int
    validated: bool


def package_model(request: PackageRequest) -> PackagedModel:
    """Build, normalise, validate and move the archive into the store. Raises ConfigError, GiveUp."""
    check_request(request)
    label = f"{request.version}.{request.key[:8]}"
    store = Path(request.model_store)
    store.mkdir(parents=True, exist_ok=True)
    target = store / f"{request.pipeline}-{label}.mar"
    with tempfile.TemporaryDirectory(prefix=".package-", dir=store) as private:
        raw = build(request, label, Path(private))
        final = Path(private) / "final.mar"
        normalise(raw, final)
        with final.open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
        entries = [*member_names(request), MANIFEST]
        validate_archive(final, expected=entries, pipeline=request.pipeline, label=label)
        size = final.stat().st_size
        final.replace(target)
    return PackagedModel(mar=str(target), sha256=sha256, label=label, bytes=size, validated=True)


def check_request(request: PackageRequest) -> None:
    """Refuse what no archive should be made of. Raises ConfigError naming the field, or GiveUp for damaged weights."""
    if not NAME.fullmatch(request.pipeline):
        raise ConfigError(
            f"pipeline name {request.pipeline!r}: MLflow, Kubernetes and TorchServe all take only lower-case letters, "
            "digits and dashes (not first or last), at most 53"
        )
    if not re.fullmatch(r"[0-9a-f]{8,}", request.key) or not re.fullmatch(r"[0-9]+", request.version):
        raise GiveUp(f"package: key {request.key!r} must be hexadecimal, version {request.version!r} a number")
    module = Path(request.module)
    if module.suffix != ".py" or not module.stem.isidentifier():
        raise ConfigError(f"model.module = {module.name!r}: expected a Python file whose name can be imported")
    if module.stem in sys.stdlib_module_names or module.stem in RESERVED:
        raise ConfigError(
            f"model.module = {module.name!r}: the server's worker finds it before the package {module.stem!r} that "
            "others import; rename the file"
        )
    seen: dict[str, str] = {}
    for path in [request.weights, request.module, *request.files]:
        name = Path(path).name
        if not Path(path).is_file() or Path(path).is_symlink():
            raise GiveUp(f"package: {path} is not a regular file")
        if name in seen or name in (HANDLER, "serving.json", "model-config.yaml"):
            raise ConfigError(f"model.files: two files would be called {name!r} in the .mar ({seen.get(name)}, {path})")
        if any(c in name for c in ",*?[]") or name.startswith("."):
            raise ConfigError(f"model.files: {name!r}: commas, wildcards and a leading dot are not possible in a .mar")
        seen[name] = path
    if Path(request.weights).name != "model.safetensors":
        raise GiveUp(f"package: weights must be model.safetensors (no pickle is served), got {request.weights}")
    with Path(request.weights).open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != request.weights_sha256:
        raise GiveUp(f"package: {request.weights} has sha256 {found}, the training recorded {request.weights_sha256}")


def member_names(request: PackageRequest) -> list[str]:
    """Names of the files in the archive, without the manifest."""
    users = [Path(p).name for p in (request.weights, request.module, *request.files)]
    return [HANDLER, "serving.json", "model-config.yaml", *users]


def model_config(serve: dict[str, Any]) -> dict[str, Any]:
    """TorchServe's settings of the model. They travel in the .mar, so a restarted server uses the same."""
    workers = int(serve.get("workers", 1))
    response = max(1, round(float(serve.get("response_timeout_seconds", 30))))
    return {
        "minWorkers": workers,
        "maxWorkers": workers,
        "batchSize": int(serve.get("batch_size", 1)),
        "maxBatchDelay": max(1, round(float(serve.get("max_batch_delay_seconds", 0.005)) * 1000)),
        "responseTimeout": response,
        "startupTimeout": max(1, round(float(serve.get("startup_timeout_seconds", 120)))),
        "jobQueueSize": int(serve.get("queue", 100)),
        "maxRetryTimeoutInSec": 300,
    }


def build(request: PackageRequest, label: str, private: Path) -> Path:
    """Run torch-model-archiver on files of ours and the user's; returns its .mar. Raises GiveUp with its last line."""
    stage, temporary, out = private / "stage", private / "tmp", private / "out"
    for folder in (stage, temporary, out):
        folder.mkdir()
    (stage / HANDLER).write_text(resources("deployments").joinpath("torchserve/handler.py").read_text())
    about = {
        "key": request.key,
        "label": label,
        "model": request.pipeline,
        "module": Path(request.module).name,
        "params": request.params,
        "serve": request.serve,
        "version": request.version,
        "weights_sha256": request.weights_sha256,
    }
    (stage / "serving.json").write_text(json.dumps(about, sort_keys=True, indent=1))
    config = stage / "model-config.yaml"  # JSON is YAML that cannot run code or surprise a reader
    config.write_text(json.dumps(model_config(request.serve), sort_keys=True, indent=1))
    for path in (
        request.module,
        *request.files,
    ):  # copied: the archiver fails at files dated before 1980, and at commas
        shutil.copyfile(path, stage / Path(path).name)
    extra = ["serving.json", *(Path(path).name for path in (request.module, *request.files))]
    # -P: the stage is the working folder, and must not be where the archiver finds its imports.
    argv = [sys.executable, "-P", "-m", "model_archiver.model_packaging", "--model-name", request.pipeline]
    argv += ["--version", label, "--serialized-file", request.weights, "--handler", HANDLER]
    argv += ["--config-file", config.name, "--extra-files", ",".join(extra)]
    argv += ["--export-path", str(out), "--archive-format", "zip-store"]
    env = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(argv, env=env, cwd=stage, capture_output=True, text=True, timeout=600, check=False)
    mar = out / f"{request.pipeline}.mar"
    if done.returncode != 0 or not mar.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise GiveUp(f"torch-model-archiver failed ({done.returncode}): {lines[-1]}")
    return mar


def normalise(source: Path, target: Path) -> None:
    """Write the archive again so that its bytes depend on its content alone."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for name in sorted(old.namelist()):
            info = zipfile.ZipInfo(name, EPOCH)
            info.external_attr = 0o100644 << 16
            info.create_system = 3
            size = old.getinfo(name).file_size
            info.file_size = size
            if name == MANIFEST:
                manifest = json.loads(old.read(name)) | {"createdOn": PINNED}
                new.writestr(info, json.dumps(manifest, sort_keys=True, indent=1))
                continue
            with old.open(name) as reader, new.open(info, "w", force_zip64=size >= 2**31) as writer:
                while block := reader.read(1 << 20):
                    writer.write(block)
