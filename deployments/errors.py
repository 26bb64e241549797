"""The two words of failure, shared by every layer: try again, or give up.

A task raises `TryAgain` when the same request may succeed later (a server is away, a lock is held) and `GiveUp` when
it never will (bad data, a refused gate). Whatever else escapes a step is a bug: it counts as giving up and its
traceback stays in the step's log. Exit codes are the command's: 1 failed, 2 usage or config, 3 preflight, 4 gate.
"""

from __future__ import annotations


class StepError(Exception):
    """A failure told in one message for a person: what, where, what was found, what was expected, the fix."""

    word = "give up"
    exit_code = 1


class TryAgain(StepError):
    """The same request may succeed later, unchanged."""

    word = "try again"


class Unreachable(TryAgain):
    """Something outside does not answer: tried again, and if it stays away the place cannot run this."""

    exit_code = 3


class GiveUp(StepError):
    """No repetition will help; somebody has to change something."""


class ConfigError(GiveUp):
    """A file, a key or an argument is wrong."""

    exit_code = 2


class PreflightError(GiveUp):
    """The place cannot run this: a port, a remote, a missing piece."""

    exit_code = 3


class GateRefused(GiveUp):
    """The model was trained and is not good enough to serve."""

    exit_code = 4


WORDS: dict[str, type[StepError]] = {
    c.__name__: c for c in (TryAgain, Unreachable, GiveUp, ConfigError, PreflightError, GateRefused)
}
