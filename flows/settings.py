"""The two settings files, frozen and checked once: pipeline.toml says what, laptop.toml says where.

`load_pipeline`, `load_place` and `find_pipeline` are all that others call; every mistake of a file comes back in one
ConfigError, a line each, with file, line, section, key, value, what was expected and the fix. Names and defaults of all
keys stand in the models below and in flows.trigger_settings. Not covered: whether data, module or revision exist
(flows.project).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationInfo, field_validator

from deployments.errors import ConfigError
from flows.place_settings import PlaceSettings as PlaceSettings
from flows.place_settings import load_place as load_place
from flows.setting_types import (
    CodePath,
    Count,
    CountOrZero,
    DataPath,
    Duration,
    Finite,
    NotNegative,
    PythonFile,
    Scalar,
    Section,
    as_tuple,
)
from flows.settings_errors import SettingsText, check, read_file, read_toml
from flows.trigger_settings import DeploySettings, NotifySettings, PushSettings, ScheduleSettings

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


class PipelineSection(Section):
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


class DataSettings(Section):
    """[data]: what DVC tracks."""

    path: DataPath  # the DVC output, relative to the folder of pipeline.toml
    train: CodePath = "train"  # split: a folder or a file below path
    heldout: CodePath = "heldout"


class ModelSettings(Section):
    """[model]: the user's code."""

    module: PythonFile
    files: Annotated[tuple[CodePath, ...], BeforeValidator(as_tuple)] = ()  # whatever else the module reads or imports


class CheckpointSettings(Section):
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


class TrainSettings(Section):
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
    profile: bool = False  # record some steps: a trace and a verdict; looking decides nothing, so no step key knows it
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


class GateSettings(Section):
    """[gate]: what a trained model has to reach before it may be served."""

    metric: str = "accuracy"
    minimum: Finite | None = None  # a maximum when higher_is_better is false; left out: no bound
    higher_is_better: bool = True
    tolerance: NotNegative = 0.0  # how much worse than the champion is still fine
    require_resume_certificate: bool = False

    @field_validator("metric")
    @classmethod
    def _metric_name(cls, value: str) -> str:
        if not _METRIC.fullmatch(value):
            raise ValueError("expected the name of a metric: letters, digits, '_', '-' and '.', first a letter")
        return value


class ServeSettings(Section):
    """[serve]: TorchServe, and the rollout. Seconds."""

    batch_size: Count = 8
    max_batch_delay: Duration = 0.005
    workers: Count = 1
    response_timeout: Duration = 30.0
    queue: Count = 100
    golden: Count = 20  # held-out requests that the new version answers rightly before it gets traffic
    soak: Duration = 1.0  # how long both versions stand after the switch
    admission: bool = True  # the same server on scratch ports takes the archive first; ten seconds, once per archive
    canary_samples: CountOrZero = 0  # held-out samples on which the new and the served version are compared

    @field_validator("response_timeout")
    @classmethod
    def _whole_seconds(cls, value: float) -> float:
        if value < 1:
            raise ValueError("expected at least 1s: TorchServe counts its timeout in whole seconds")
        return value


class CheckSettings(Section):
    """[check]: the endpoint against the trained model."""

    samples: Count = 1000
    min_agreement: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    max_p95: Duration = 1.0  # seconds


class _PipelineFile(Section):
    pipeline: PipelineSection
    data: DataSettings
    model: ModelSettings
    train: TrainSettings = TrainSettings()
    gate: GateSettings = GateSettings()
    serve: ServeSettings = ServeSettings()
    check: CheckSettings = CheckSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    push: PushSettings = PushSettings()
    deploy: DeploySettings = DeploySettings()
    notify: NotifySettings = NotifySettings()


class PipelineSettings(Section):
    """One pipeline.toml, checked."""

    name: str
    data: DataSettings
    model: ModelSettings
    train: TrainSettings
    gate: GateSettings
    serve: ServeSettings
    check: CheckSettings
    schedule: ScheduleSettings
    push: PushSettings
    deploy: DeploySettings
    notify: NotifySettings
    file: Path  # where pipeline.toml is, or would be when its text came from a revision

    _text: SettingsText | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """The project folder: all paths of the file are relative to it."""
        return self.file.parent

    @contextmanager
    def blaming(self, section: str, key: str) -> Iterator[None]:
        """Lead a ConfigError from inside back to the key that caused it: its file, line and value come before it."""
        try:
            yield
        except ConfigError as error:
            if self._text is None:
                raise
            raise type(error)(self._text.say((section, key), str(error))[1]) from None


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
    text = read_file(source, source_name or str(source), what="a pipeline file") if isinstance(source, Path) else source
    read = read_toml(text, source_name or str(place), overrides, example='[pipeline]\nname = "digits"')
    checked = check(_PipelineFile, read)
    sections = {name: getattr(checked, name) for name in _PipelineFile.model_fields if name != "pipeline"}
    settings = PipelineSettings(name=checked.pipeline.name, file=place.absolute(), **sections)
    settings._text = read
    return settings


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
