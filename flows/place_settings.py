"""Where pipelines run: laptop.toml, frozen and checked once. `load_place` is all that others call.

A cluster's file is found and read here too and refused with what works on one. Not covered: what runs (flows.settings),
the keys of cluster.toml (flows.cluster_settings), the place itself (deployments.laptop).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from deployments.errors import ConfigError
from flows.quantities import Interruption, parse_interruption
from flows.setting_types import CountOrZero, Duration, Memory, OptionalMemory, Port, Section, as_tuple
from flows.settings_errors import SettingsText, check, did_you_mean, read_file, read_toml

NO_CLUSTER = (
    "this command is for a laptop; what works on a cluster: `reprise run`, `reprise plan`, `reprise runs`, "
    "`reprise show`, `reprise logs`, `reprise resume`, `reprise cancel`, `reprise rollback`, `reprise audit`, "
    "`reprise trace`, `reprise who-uses`, `reprise deploy`, `reprise hook`, `reprise preflight`, `reprise render`, "
    "`reprise gpu`, `reprise doctor`; all other commands need --place laptop"
)
KINDS = ("laptop", "cluster")
PLACES = Path(__file__).resolve().parent.parent / "deployments"  # the places shipped with Reprise


class PortSettings(Section):
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


class SpotSettings(Section):
    """[spot]: how the place interrupts. A laptop plays the spot market itself; a cluster has a real one."""

    grace: Duration = 10.0  # seconds from notice (SIGTERM) to the end (SIGKILL)
    interruptions: Annotated[
        tuple[Annotated[Interruption, BeforeValidator(parse_interruption)], ...], BeforeValidator(as_tuple)
    ] = ()  # ["notice@35%", "kill@70%"]


class StepResources(Section):
    """[resources.STEP]: what a step asks for. A laptop checks them and ignores them: its steps share the machine."""

    cpus: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    memory: Memory = "1Gi"
    gpus: CountOrZero = 0
    shm: OptionalMemory = ""  # size of /dev/shm; empty: the container's own 64Mi


class ResourceSettings(Section):
    """[resources]: by step."""

    pull_data: StepResources = StepResources()
    train_model: StepResources = StepResources()
    register_model: StepResources = StepResources()
    package_model: StepResources = StepResources()
    deploy_model: StepResources = StepResources()
    check_endpoint: StepResources = StepResources()


class PlaceSection(Section):
    """[place]"""

    kind: Literal["laptop"]  # a cluster has other keys: flows.cluster_settings
    state: Annotated[str, Field(min_length=1)] = ".reprise"  # folder for services, jobs, store, cache and data


class _PlaceFile(Section):
    place: PlaceSection
    ports: PortSettings = PortSettings()
    spot: SpotSettings = SpotSettings()
    resources: ResourceSettings = ResourceSettings()


class PlaceSettings(Section):
    """One laptop.toml, checked."""

    kind: Literal["laptop"]
    state: Path  # absolute
    ports: PortSettings
    spot: SpotSettings
    resources: ResourceSettings
    file: Path


def load_place(place: Path | str, folder: Path) -> PlaceSettings:
    """Check the settings of a laptop: its name ("laptop": `folder`/laptop.toml, else the shipped one) or a file.

    `folder` is the project folder: a relative `state` is below it. Raises ConfigError with all mistakes, a line each,
    and for a cluster, with what works there.
    """
    path, read = read_place(place, folder)
    if kind_of(read) == "cluster":
        raise read.refusal(("place", "kind"), NO_CLUSTER)
    checked = check(_PlaceFile, read)
    return PlaceSettings(
        kind="laptop",
        state=folder.absolute() / checked.place.state,
        ports=checked.ports,
        spot=checked.spot,
        resources=checked.resources,
        file=path.absolute(),
    )


def read_place(place: Path | str, folder: Path) -> tuple[Path, SettingsText]:
    """The file of a place, parsed and not checked: a name (`folder`/NAME.toml, else the shipped one) or a file."""
    path = Path(place)
    if path.suffix != ".toml":
        known = sorted({p.stem for p in PLACES.glob("*.toml")})
        path = next((p for p in (folder / f"{place}.toml", PLACES / f"{place}.toml") if p.is_file()), path)
        if path.suffix != ".toml":
            raise ConfigError(
                f"place {str(place)!r} is not known{did_you_mean(str(place), known)}; "
                f"expected one of: {', '.join(known)}, or a .toml file"
            )
    text = read_file(path, str(path), what="a place file")
    return path, read_toml(text, str(path), (), example='[place]\nkind = "laptop"')


def kind_of(read: SettingsText) -> str:
    """The kind of place that a file says it is; "" if it says none. Raises ConfigError for a word that is no kind."""
    place = read.raw.get("place")
    kind = place.get("kind") if isinstance(place, dict) else None
    if isinstance(kind, str) and kind not in KINDS:
        raise read.refusal(("place", "kind"), f'expected "laptop" or "cluster"{did_you_mean(kind, KINDS)}')
    return kind if isinstance(kind, str) else ""
