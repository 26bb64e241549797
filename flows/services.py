"""The laptop's services, with a line of progress for whoever waits: Prefect, MLflow and TorchServe on loopback.

Starting, adopting and stopping them is deployments.services; here it is settings in, lines out, and what Prefect's own
client must be told before it is imported. Not covered: a cluster, where they are Deployments.
"""

from __future__ import annotations

import json
import os
import urllib.request

from flows.display import moving, on_terminal, say, seconds
from flows.settings import PlaceSettings
from tasks.deploy_model import RollbackRequest, roll_back
from tasks.records import Store


def ensure_services(place: PlaceSettings, *, quiet: bool = False) -> dict[str, str]:
    """Start what does not run yet, in parallel; returns the URLs. Raises PreflightError for a taken port."""
    from deployments.services import ensure

    waiting: dict[str, float] = {}
    told: set[str] = set()

    def on_progress(name: str, state: str, took: float) -> None:
        if quiet or state == "reused":
            return
        if state == "starting":
            waiting[name] = took
            if on_terminal():
                moving(f"▸ starting {', '.join(sorted(waiting))} … {took:.0f} s")
            elif name not in told:
                say(f"  {name:<15} starting")
            told.add(name)
        elif state == "ready":
            waiting.pop(name, None)
            moving("")
            say(f"✓ {name:<15} ready after {seconds(took)}", style="green")

    return ensure(place.state, ports=place.ports.model_dump(), on_progress=on_progress)


def prefect_environment(place: PlaceSettings) -> None:
    """What Prefect reads at import: our server, no telemetry, a quiet console (the command prints its own lines), and a
    home of its own, so that nothing is written to or read from the user's."""
    os.environ["PREFECT_API_URL"] = f"http://127.0.0.1:{place.ports.prefect}/api"
    os.environ["PREFECT_HOME"] = str(place.state / "prefect")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")


def restore_endpoints(place: PlaceSettings, store: Store) -> list[str]:
    """Put back what was in service before the servers stopped: TorchServe forgets, the endpoint's record does not."""
    urls = service_urls(place)
    told = []
    for pipeline in store.names("endpoints"):
        serving = (store.read(f"endpoints/{pipeline}") or {}).get("serving")
        if not serving or in_service(urls["management"], pipeline) == serving["label"]:
            continue
        endpoint = roll_back(
            RollbackRequest(
                pipeline=pipeline,
                to=serving["label"],
                management_url=urls["management"],
                inference_url=urls["inference"],
                tracking_uri=urls["mlflow"],
                record=str(store.path / "endpoints"),
                soak_seconds=0.0,
            )
        )
        told.append(f"{pipeline}: version {endpoint.version} is in service again at {endpoint.url}")
    return told


def in_service(management_url: str, pipeline: str) -> str:
    """The label of the default version that the model server has for this pipeline; "" if none, or if it is away."""
    try:
        with urllib.request.urlopen(f"{management_url}/models/{pipeline}", timeout=2) as reply:
            served = json.load(reply)
        return str(served[0]["modelVersion"]) if served else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def service_urls(place: PlaceSettings) -> dict[str, str]:
    """Where the services of a laptop answer."""
    names = ("prefect", "mlflow", "inference", "management", "metrics")
    return {name: f"http://127.0.0.1:{getattr(place.ports, name)}" for name in names}
