"""Questions that only somebody inside the cluster can ask: does MLflow answer an API request under its Service name.

    probe_mlflow("http://mlflow:5000") -> {"url": ..., "status": 200}

The answer goes into a snapshot (`take(api, place, probes={"mlflow": ...})`). /health is not asked: it is well while
every client gets 403. Standard library. Not covered: judging it (preflight_services.py).
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

ROUTE = "/api/2.0/mlflow/experiments/search?max_results=1"
TIMEOUT = 5.0  # seconds


def probe_mlflow(url: str, *, host: str = "", headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Ask one API route. `host`: a Host header to send instead of the URL's own. Never raises."""
    asked: dict[str, Any] = {"url": url, "status": None}
    request = urllib.request.Request(url.rstrip("/") + ROUTE, headers=headers or {})
    if host:
        request.add_unredirected_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            json.loads(answer.read())
            asked["status"] = answer.status
    except urllib.error.HTTPError as error:
        asked |= {"status": error.code, "body": " ".join(error.read(400).decode(errors="replace").split())}
        error.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        asked["error"] = f"{type(error).__name__}: {error}"
    return asked
