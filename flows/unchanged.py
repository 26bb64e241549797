"""A run in which every step is reused, told to Prefect without importing Prefect.

An unchanged run would otherwise spend most of its time on importing the orchestrator. Prefect's public REST API takes
the flow run, its state and the plan in three requests. A server that is away costs the record in Prefect, not the run.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

from flows.plan_page import plan_markdown
from flows.run import Run
from flows.start import run_title

TIMEOUT_SECONDS = 3.0


def record_unchanged(run: Run) -> str:
    """A completed flow run named like the run, with the plan as artifact; returns its id, or "" if Prefect is away."""
    api = f"{run.urls['prefect']}/api"
    try:
        flow = _post(f"{api}/flows/", {"name": "retrain"})
        flow_run = _post(
            f"{api}/flow_runs/",
            {
                "flow_id": flow["id"],
                "name": run_title(run),
                "parameters": {"rev": run.document["rev"], "cause": run.document["cause"]},
                "state": {"type": "COMPLETED", "name": "Unchanged", "message": "Every step is reused."},
                "tags": [run.plan.pipeline.name, "unchanged"],
            },
        )
        artifact = {
            "key": f"{run.plan.pipeline.name}-plan",
            "type": "markdown",
            "data": plan_markdown(run.plan, changed=run.document["overrides"]),
            "description": "What runs, what is reused, and why",
            "flow_run_id": flow_run["id"],
        }
        _post(f"{api}/artifacts/", artifact)
    except (OSError, urllib.error.URLError, KeyError, ValueError):
        return ""
    return str(flow_run["id"])


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer
