"""The laptop's services, with a line of progress for whoever waits: Prefect, MLflow and TorchServe on loopback.

Starting, adopting and stopping them is deployments.services; here it is settings in, lines out, and what Prefect's own
client must be told before it is imported. Not covered: a cluster, where they are Deployments.
"""

from __future__ import annotations

import os

from flows.display import on_terminal, say, seconds
from flows.settings import PlaceSettings


def ensure_services(place: PlaceSettings, *, quiet: bool = False) -> dict[str, str]:
    """Start what does not run yet, in parallel; returns the URLs. Raises PreflightError for a taken port."""
    from deployments.services import ensure

    told: set[str] = set()

    def on_progress(name: str, state: str, took: float) -> None:
        if quiet or state == "reused" or (state == "starting" and name in told):
            return
        told.add(name)
        if state == "ready":
            say(f"✓ {name:<15} ready after {seconds(took)}", style="green")
        elif state == "starting" and not on_terminal():
            say(f"  {name:<15} starting")

    return ensure(place.state, ports=place.ports.model_dump(), on_progress=on_progress)


def prefect_environment(url: str) -> None:
    """What Prefect reads at import: our server, no telemetry, and a quiet console (the command prints its own lines)."""
    os.environ["PREFECT_API_URL"] = f"{url}/api"
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")
