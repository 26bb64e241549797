"""The two settings files, frozen and checked once: pipeline.toml says what, laptop.toml says where.

`load_pipeline`, `load_place` and `find_pipeline` are all that others call; every mistake of a file comes back in one
ConfigError, a line each, with file, line, section, key, value, what was expected and the fix. Names and defaults of all
keys stand in the models below. Not covered: whether data, module or revision exist (flows.project).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from deployments.errors import ConfigError
from flows.quantities import Interruption, parse_duration, parse_interruption, parse_memory
from flows.settings_errors import check, did_you_mean, read_toml

PLACES = Path(__file__).resolve().parent.parent / "deployments"  # the places shipped with Reprise
STEPS = ("pull_data", "train_model", "register_model", "package_model", "deploy_model", "check_endpoint")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


def _memory(value: Any) -> Any:
    parse_memory(value)
    return value


def _memory_or_none(value: Any) -> Any:
    return value if value == "" else _memory(value)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | int | float | bool):
        raise ValueError("expected text, a number, true or false")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("expected a finite number, not nan or inf")
    return value


def _relative(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    path = PurePosixPath(value)
    if not value or path.is_absolute() or value.startswith("-") or "\\" in value or "\0" in value:
        raise ValueError("expected a path relative to the folder of pipeline.toml, with forward slashes")
    return value


def _inside(value: Any) -> Any:
    if isinstance(_relative(value), str) and ".." in PurePosixPath(value).parts:
        raise ValueError("expected a path inside the folder of pipeline.toml, without '..'")
    return value


def _python_file(value: Any) -> Any:
    if isinstance(_inside(value), str) and not (value.endswith(".py") and PurePosixPath(value).stem.isidentifier()):
        raise ValueError('expected the name of a Python file such as "digits.py"')
    return value


Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Duration = Annotated[float, BeforeValidator(parse_duration)]  # seconds; "10m" in the file
Memory = Annotated[str, BeforeValidator(_memory)]  # Kubernetes quantity
Port = Annotated[int, Field(ge=1024, le=65535)]
DataPath = Annotated[str, BeforeValidator(_relative)]  # may lead up, as long as it stays inside the repository
CodePath = Annotated[str, BeforeValidator(_inside)]
PythonFile = Annotated[str, BeforeValidator(_python_file)]
Scalar = Annotated[Any, BeforeValidator(_scalar)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class PipelineSection(_Section):
    """[pipeline]"""

    name: str  # of the model in MLflow and TorchServe, and of everything in Kubernetes

    @field_validator("name")
    @classmethod
    def _fits_everywhere(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(
                "expected 1 to 40 characters a-z, 0-9 and '-', first a letter, last no '-' (one name for MLflow, "
                "TorchServe and Kubernetes, whose labels of 63 characters also hold the step and its key); "
                f'write: name = "{slug(value)}"'
            )
        return value


class DataSettings(_Section):
    """[data]: what DVC tracks."""

    path: DataPath  # the DVC output, relative to the folder of pipeline.toml
    train: CodePath = "train"  # split: a folder or a file below path
    heldout: CodePath = "heldout"


class ModelSettings(_Section):
    """[model]: the user's code."""

    module: PythonFile
    files: Annotated[tuple[CodePath, ...], BeforeValidator(_tuple)] = ()  # whatever else the module reads or imports


class CheckpointSettings(_Section):
    """[train.checkpoint]: see training.spec.CheckpointPolicy. Seconds."""

    min_interval: Duration = 5.0
    max_interval: Duration = 600.0
    every_steps: CountOrZero = 0  # 0: by time
    keep: Annotated[int, Field(ge=2)] = 2  # a damaged newest one needs a predecessor
    mtbf: Duration = 3600.0
    notice: Duration = 120.0

    @field_validator("max_interval")
    @classmethod
    def _not_below_min(cls, value: float, info: ValidationInfo) -> float:
        least = info.data.get("min_interval")
        if least is not None and value < least:
            raise ValueError(f"expected at least min_interval, {least:g} s; raise max_interval or lower min_interval")
        return value

    @field_validator("mtbf")
    @classmethod
    def _positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("expected a time between interruptions above zero")
        return value


class TrainSettings(_Section):
    """[train]"""

    epochs: Count = 1
    batch_size: Count = 32  # global: over all workers
    accumulate: Count = 1
    seed: CountOrZero = 0
    workers: Count = 1  # torchrun processes
    shards: CountOrZero = 0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    threads: Count = 1
    interruptions: CountOrZero = 20  # budget of interruptions
    errors: CountOrZero = 2  # budget of errors
    deadline: Duration = 86400.0
    params: dict[str, Scalar] = Field(default_factory=dict)  # the user's own
    checkpoint: CheckpointSettings = CheckpointSettings()

    @field_validator("shards")
    @classmethod
    def _shards_for_workers(cls, value: int, info: ValidationInfo) -> int:
        workers = info.data.get("workers")
        if value and workers is not None and value < workers:
            raise ValueError(
                f"expected 0 (one per worker) or at least workers, {workers}; each worker takes whole shards"
            )
        return value

    @field_validator("deadline")
    @classmethod
    def _some_time(cls, value: float) -> float:
        if value <= 0:
            raise ValueError("expected a deadline above zero")
        return value

    def deciding(self) -> dict[str, Any]:
        """What decides the weights, for the step key: the budgets, deadline and checkpoint policy do not."""
        names = ("epochs", "batch_size", "accumulate", "seed", "precision", "compile", "parallel", "threads", "params")
        return {"shards": self.shards or self.workers, **{name: getattr(self, name) for name in names}}


class GateSettings(_Section):
    """[gate]: what a trained model has to reach before it may be served."""

    metric: str = "accuracy"
    minimum: Finite = 0.0  # a maximum when higher_is_better is false
    higher_is_better: bool = True
    tolerance: NotNegative = 0.0  # how much worse than the champion is still fine
    require_resume_certificate: bool = False

    @field_validator("metric")
    @classmethod
    def _metric_name(cls, value: str) -> str:
        if not _METRIC.fullmatch(value):
            raise ValueError("expected the name of a metric: letters, digits, '_', '-' and '.', first a letter")
        return value


class ServeSettings(_Section):
    """[serve]: TorchServe, and the rollout. Seconds."""

    batch_size: Count = 8
    max_batch_delay: Duration = 0.005
    workers: Count = 1
    response_timeout: Duration = 30.0
    queue: Count = 100
    golden: Count = 20  # held-out requests that the new version answers rightly before it gets traffic
    soak: Duration = 1.0  # how long both versions stand after the switch

    @field_validator("response_timeout")
    @classmethod
    def _whole_seconds(cls, value: float) -> float:
        if value < 1:
            raise ValueError("expected at least 1s: TorchServe counts its timeout in whole seconds")
        return value


class CheckSettings(_Section):
    """[check]: the endpoint against the trained model."""

    samples: Count = 1000
    min_agreement: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    max_p95: Duration = 1.0  # seconds


class _PipelineFile(_Section):
    pipeline: PipelineSection
    data: DataSettings
    model: ModelSettings
    train: TrainSettings = TrainSettings()
    gate: GateSettings = GateSettings()
    serve: ServeSettings = ServeSettings()
    check: CheckSettings = CheckSettings()


class PipelineSettings(_Section):
    """One pipeline.toml, checked."""

    name: str
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    gate: GateSettings
    serve: ServeSettings
    check: CheckSettings
    file: Path  # where pipeline.toml is, or would be when its text came from a revision

    @property
    def folder(self) -> Path:
        """The project folder: all paths of the file are relative to it."""
        return self.file.parent


class PortSettings(_Section):
    """[ports] of a laptop: all on loopback. TorchServe takes the last three too, one a worker from `workers`."""

    prefect: Port = 14200
    mlflow: Port = 15000
    inference: Port = 18080
    management: Port = 18081
    metrics: Port = 18082
    grpc_inference: Port = 17070
    grpc_management: Port = 17071
    workers: Port = 19000

    @field_validator("*")
    @classmethod
    def _distinct(cls, value: int, info: ValidationInfo) -> int:
        if (other := next((name for name, port in info.data.items() if port == value), None)) is not None:
            raise ValueError(f"expected a port of its own; {other} has {value} already")
        return value


class SpotSettings(_Section):
    """[spot]: how the place interrupts. A laptop plays the spot market itself; a cluster has a real one."""

    grace: Duration = 10.0  # seconds from notice (SIGTERM) to the end (SIGKILL)
    interruptions: Annotated[
        tuple[Annotated[Interruption, BeforeValidator(parse_interruption)], ...], BeforeValidator(_tuple)
    ] = ()  # ["notice@35%", "kill@70%"]


class StepResources(_Section):
    """[resources.STEP]: what a step asks for. A laptop checks them and ignores them: its steps share the machine."""

    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    memory: Memory = "1Gi"
    gpus: CountOrZero = 0
    shm: Annotated[str, BeforeValidator(_memory_or_none)] = ""  # size of /dev/shm; empty: the container's own 64Mi


class ResourceSettings(_Section):
    """[resources]: by step."""

    pull_data: StepResources = StepResources()
    train_model: StepResources = StepResources()
    register_model: StepResources = StepResources()
    package_model: StepResources = StepResources()
    deploy_model: StepResources = StepResources()
    check_endpoint: StepResources = StepResources()


class PlaceSection(_Section):
    """[place]"""

    kind: Literal["laptop"]
    state: Annotated[str, Field(min_length=1)] = ".reprise"  # folder for services, jobs, store, cache and data


class _PlaceFile(_Section):
    place: PlaceSection
    ports: PortSettings = PortSettings()
    spot: SpotSettings = SpotSettings()
    resources: ResourceSettings = ResourceSettings()


class PlaceSettings(_Section):
    """One laptop.toml, checked."""

    kind: Literal["laptop"]
    state: Path  # absolute
    ports: PortSettings
    spot: SpotSettings
    resources: ResourceSettings
    file: Path


def slug(name: str) -> str:
    """The nearest name that MLflow, TorchServe and Kubernetes all take."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    plain = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    plain = plain if plain[:1].isalpha() else f"m-{plain}".rstrip("-")
    return plain[:40].rstrip("-")


def load_pipeline(
    source: Path | str, *, source_name: str | None = None, overrides: Sequence[str] = (), file: Path | None = None
) -> PipelineSettings:
    """Check a pipeline file: a Path is read, a str is the TOML text itself (from git, say).

    `source_name` is how messages call it (pipeline.toml@3f2a9c1); `file` is where a text would be on disk, and gives
    the project folder; `overrides` are "train.epochs=3". Raises ConfigError with all mistakes, a line each.
    """
    place = file or (source if isinstance(source, Path) else Path("pipeline.toml"))
    text = _text(source, source_name or str(source), what="a pipeline file") if isinstance(source, Path) else source
    read = read_toml(text, source_name or str(place), overrides, example='[pipeline]\nname = "digits"')
    checked = check(_PipelineFile, read)
    sections = {name: getattr(checked, name) for name in ("data", "model", "train", "gate", "serve", "check")}
    return PipelineSettings(name=checked.pipeline.name, file=place.absolute(), **sections)


def load_place(place: Path | str, folder: Path) -> PlaceSettings:
    """Check the settings of a place: its name ("laptop": `folder`/laptop.toml, else the shipped one) or a file.

    `folder` is the project folder: a relative `state` is below it. Raises ConfigError with all mistakes, a line each.
    """
    path = Path(place)
    if path.suffix != ".toml":
        known = sorted({p.stem for p in PLACES.glob("*.toml")})
        path = next((p for p in (folder / f"{place}.toml", PLACES / f"{place}.toml") if p.is_file()), path)
        if path.suffix != ".toml":
            raise ConfigError(
                f"place {str(place)!r} is not known{did_you_mean(str(place), known)}; "
                f"expected one of: {', '.join(known)}, or a .toml file"
            )
    checked = check(
        _PlaceFile,
        read_toml(_text(path, str(path), what="a place file"), str(path), (), example='[place]\nkind = "laptop"'),
    )
    return PlaceSettings(
        kind=checked.place.kind,
        state=folder.absolute() / checked.place.state,
        ports=checked.ports,
        spot=checked.spot,
        resources=checked.resources,
        file=path.absolute(),
    )


def find_pipeline(start: Path) -> Path:
    """pipeline.toml of `start` or of a folder above it, else of start/demo. Raises ConfigError with the way out."""
    start = start.absolute()
    for folder in (start, *start.parents):
        if (found := folder / "pipeline.toml").is_file():
            return found
        if (folder / ".git").exists():  # a pipeline belongs to its repository: do not look into whatever is around it
            break
    if (found := start / "demo" / "pipeline.toml").is_file():
        return found
    raise ConfigError(
        f"pipeline.toml: not found in {start} or the folders above it; "
        "make an example with `reprise demo`, or name the file with --pipeline FILE"
    )


def _text(path: Path, name: str, *, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; expected {what}; give another with its path, or make one") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a folder; expected {what}; name the file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; expected {what}, which is UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}); expected {what}") from None
