"""The options that several commands of `reprise` share, and the order that they make.

A command takes one of the classes as a parameter; cyclopts makes an option of each field. Importing this costs no
more than cyclopts: flows.start is imported when an order is made. Not covered: options of one command (flows.__main__).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from flows.start import Order

Pipeline = Annotated[
    str, Parameter(name=["--pipeline", "-p"], help="The pipeline.toml; default: here, above, or demo/.")
]
Place = Annotated[str, Parameter(help="Where to run: laptop, cluster, or a .toml file.")]
ClusterName = Annotated[str, Parameter(name="--place", help="Which cluster: cluster, or a .toml file.")]
Rev = Annotated[str, Parameter(help="Git revision to train at: code, data pointer and parameters.")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", help="Change a setting: train.epochs=3")]
Snapshot = Annotated[str, Parameter(help="A cluster's state from this file, not from the cluster.")]
Json = Annotated[bool, Parameter(name="--json", help="The same as JSON, for programs.")]
RunId = Annotated[str, Parameter(help="As `reprise runs` names it; default: the newest.")]


def shown(default: Any) -> str | None:
    """A default as the help tells it: what is off, empty or none needs no word."""
    return None if default is False or default in ("", ()) else str(default)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Target:
    """Which pipeline, and where."""

    pipeline: Pipeline = ""
    place: Place = "laptop"

    def order(self, *, cause: str = "command") -> Order:
        """As the commands take it."""
        from flows.start import Order

        return Order(pipeline=self.pipeline, place=self.place, cause=cause)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Work:
    """Which pipeline at which revision, changed how, and where."""

    pipeline: Pipeline = ""
    rev: Rev = "HEAD"
    set: Set = ()
    place: Place = "laptop"

    def order(self, *, interruptions: tuple[str, ...] = ()) -> Order:
        """As the commands take it."""
        from flows.start import Order

        return Order(
            pipeline=self.pipeline, rev=self.rev, overrides=self.set, place=self.place, interruptions=interruptions
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ClusterWork(Work):
    """The same, on a cluster unless told otherwise."""

    place: ClusterName = "cluster"


HERE, HEAD, ON_CLUSTER = Target(), Work(), ClusterWork()
