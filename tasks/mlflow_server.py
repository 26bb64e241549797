"""One place to reach the MLflow server from, and to tell its errors as "try again" or "give up".

`connect` gives the client, `told` turns what MLflow and requests raise into our two words. The client's own retries are
kept short, because the flow repeats a step that says "try again" and the two would multiply.
Not covered: metrics during training (training.tracking, which pods without mlflow must do with mlflow-skinny).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from deployments.errors import GiveUp, StepError, TryAgain

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Codes after which the same call may succeed; everything else MLflow refuses for good.
AWAY = frozenset(
    {
        "INTERNAL_ERROR",
        "TEMPORARILY_UNAVAILABLE",
        "REQUEST_LIMIT_EXCEEDED",
        "IO_ERROR",
        "ABORTED",
    }
)


def connect(uri: str) -> MlflowClient:
    """A client for runs and for the registry of one server. Raises GiveUp when there is no address."""
    if not uri:
        raise GiveUp("tracking_uri is empty; expected the MLflow server's address, such as http://127.0.0.1:5000")
    # Before the import: mlflow reads some of these once. A user's own values stand.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def told(uri: str, doing: str) -> Iterator[None]:
    """Say what failed while `doing` at the server of `uri`: TryAgain when it is away, GiveUp when it refuses."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    try:
        yield
    except StepError:
        raise
    except MlflowException as error:
        message = " ".join(str(error).split())
        if error.error_code in AWAY:
            raise TryAgain(f"MLflow at {uri} did not answer while {doing}: {message[:400]}") from error
        if "Invalid Host header" in message:
            message += " (start the server with --allowed-hosts naming this address)"
        raise GiveUp(f"MLflow at {uri} refused {doing}: {message[:400]}") from error
    except RequestException as error:
        status = error.response.status_code if error.response is not None else 0
        if 400 <= status < 500 and status not in (408, 429):
            raise GiveUp(f"MLflow at {uri} refused {doing}: HTTP {status}: {error}") from error
        raise TryAgain(f"MLflow at {uri} did not answer while {doing}: {error}") from error


def run_url(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run."""
    return f"{uri.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"


def model_url(uri: str, name: str, version: str) -> str:
    """The page of a model version."""
    return f"{uri.rstrip('/')}/#/models/{name}/versions/{version}"
