"""The folder that MLflow keeps for a model version: weights, the user's code, params, held-out answers, MLmodel.

A custom flavor `reprise` and plain files: no pickle, and no pt2, which MLflow's own torch flavor would write and which
freezes the batch size. The signature is the endpoint's contract, not the tensor's: one request body (bytes) in, the
JSON answer out. The step that writes it has no torch, the tensors are the user's `preprocess`'s private matter, and the
contract can be read off the held-out file: bodies that were really asked and the answers that were really given.
Not covered: uploading it (tasks.register_model), the archive that TorchServe takes (tasks.package_model).
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import ConfigError, GiveUp

if TYPE_CHECKING:
    from mlflow.types import Schema

WEIGHTS = "model.safetensors"
EXAMPLES = 2  # an example of one request would say nothing about batches
ANSWERS = 200  # answers looked at for the output's types


def sha256(path: Path) -> str:
    """Digest of a file's bytes, as hex."""
    with path.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def collect(
    *,
    weights: Path,
    weights_sha256: str,
    module: Path,
    files: Iterable[Path],
    heldout: Path,
    certificate: Path | None,
) -> dict[str, Path]:
    """Name in the folder -> file it comes from.

    Raises GiveUp when a file is missing or the weights are not those of the digest, ConfigError when two files would
    take the same name.
    """
    found: dict[str, Path] = {}
    sources = [
        (WEIGHTS, weights),
        (module.name, module),
        *((f.name, f) for f in files),
        ("heldout.jsonl", heldout),
    ]
    if certificate is not None:
        sources.append(("resume_certificate.json", certificate))
    for name, path in sources:
        if not path.is_file():
            raise GiveUp(f"{path}: there is no such file; it should go into the model as {name!r}")
        if name in found or name in ("MLmodel", "params.json", "input_example.json"):
            raise ConfigError(f"model.files: {path} and {found.get(name, name)} would both be {name!r} in the model")
        found[name] = path
    if (digest := sha256(weights)) != weights_sha256:
        raise GiveUp(f"{weights}: expected sha256 {weights_sha256}, found {digest}; train again or restore the file")
    return found


def read_heldout(path: Path, limit: int = ANSWERS) -> list[dict[str, Any]]:
    """The first `limit` rows of heldout.jsonl. Raises GiveUp naming the line that cannot be used."""
    rows: list[dict[str, Any]] = []
    with path.open() as lines:
        for number, line in enumerate(lines, 1):
            if len(rows) >= limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                base64.b64decode(row["body_b64"], validate=True)
                if not isinstance(row["answer"], dict):
                    raise TypeError("answer is no object")
            except (ValueError, KeyError, TypeError) as error:
                raise GiveUp(f"{path}:{number}: not a held-out row with body_b64 and answer ({error})") from error
            rows.append(row)
    if not rows:
        raise GiveUp(f"{path}: no held-out answers; the trainer writes them when it is complete")
    return rows


def output_schema(answers: list[dict[str, Any]]) -> Schema:
    """The type of the endpoint's answers; a key that some answers lack is optional, one of mixed types is Any."""
    from mlflow.types import ColSpec, Schema, TensorSpec

    names = sorted({name for answer in answers for name in answer})
    columns: list[ColSpec | TensorSpec] = []
    for name in names:
        values = [answer[name] for answer in answers if name in answer]
        columns.append(ColSpec(type=_kind(values), name=name, required=len(values) == len(answers)))
    return Schema(columns)


def _kind(values: list[Any]) -> Any:
    """MLflow's type of a list of JSON values."""
    from mlflow.types import DataType
    from mlflow.types.schema import AnyType, Array, Object, Property

    if all(isinstance(v, list) for v in values):
        return Array(_kind([item for v in values for item in v]))
    if all(isinstance(v, dict) and v for v in values):
        names = sorted({name for v in values for name in v})
        found = {name: [v[name] for v in values if name in v] for name in names}
        return Object([Property(n, _kind(found[n]), required=len(found[n]) == len(values)) for n in names])
    kinds = {type(v) for v in values}
    anything = AnyType()  # type: ignore[no-untyped-call]
    scalars = {
        bool: DataType.boolean,
        int: DataType.long,
        float: DataType.double,
        str: DataType.string,
    }
    if kinds == {int, float}:
        return DataType.double
    return scalars.get(kinds.pop(), anything) if len(kinds) == 1 else anything


def write_folder(
    folder: Path,
    sources: Mapping[str, Path],
    *,
    module: str,
    params: Mapping[str, Any],
    run_id: str,
) -> dict[str, str]:
    """Write the whole folder, MLmodel included; returns name -> sha256 of everything but what MLflow dates."""
    import pandas  # type: ignore[import-untyped]  # its stubs are another package
    from mlflow.models import Model, ModelSignature
    from mlflow.models.utils import _save_example
    from mlflow.types import ColSpec, DataType, Schema

    folder.mkdir(parents=True, exist_ok=True)
    for name, path in sources.items():
        _place(path, folder / name)
    (folder / "params.json").write_text(json.dumps(dict(params), indent=1, sort_keys=True) + "\n")
    digests = {path.name: sha256(path) for path in sorted(folder.iterdir())}

    rows = read_heldout(folder / "heldout.jsonl")
    bodies = [base64.b64decode(row["body_b64"]) for row in rows][:EXAMPLES]
    bodies += bodies[:1] * (EXAMPLES - len(bodies))
    signature = ModelSignature(
        inputs=Schema([ColSpec(type=DataType.binary, name="body")]),
        outputs=output_schema([row["answer"] for row in rows]),
    )
    model = Model(artifact_path="model", run_id=run_id, signature=signature)
    model.add_flavor(
        "reprise",
        weights=WEIGHTS,
        module=module,
        params="params.json",
        heldout="heldout.jsonl",
        files=digests,
    )
    with warnings.catch_warnings():  # mlflow 3.17.2 compares columns in a way that pandas 3 deprecates
        warnings.simplefilter("ignore")
        _save_example(model, pandas.DataFrame({"body": bodies}), str(folder))
    model.save(str(folder / "MLmodel"))
    return digests


def _place(source: Path, target: Path) -> None:
    """The file under another name: a link where that is possible, for weights may be large, otherwise a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def digests_of(mlmodel: str) -> dict[str, str]:
    """Name -> sha256 as an MLmodel's text tells it; empty if it is not one of ours."""
    import yaml

    raw = yaml.safe_load(mlmodel) or {}
    flavor = raw.get("flavors", {}).get("reprise", {}) if isinstance(raw, dict) else {}
    return {str(k): str(v) for k, v in flavor.get("files", {}).items()}
