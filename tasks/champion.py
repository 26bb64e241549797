"""The alias `champion` in MLflow's registry: read, moved, taken away.

By MLflow's REST API and not by its client, because the client takes about three seconds to import and an alias is three
small requests. Not covered: registering versions and the alias `candidate` (tasks.register_model).
"""

from __future__ import annotations

import json
import urllib.parse
from dataclasses import dataclass

from deployments.errors import ConfigError, GiveUp, TryAgain
from deployments.serving import Answer, call

PATH = "/api/2.0/mlflow/registered-models/alias"


@dataclass(frozen=True, kw_only=True)
class Champion:
    """The alias of one registered model. `tracking_uri` is an MLflow server."""

    tracking_uri: str
    model: str
    alias: str = "champion"

    def __post_init__(self) -> None:
        if not self.tracking_uri.startswith(("http://", "https://")):
            raise ConfigError(
                f"tracking_uri = {self.tracking_uri!r}: expected the address of an MLflow server (http://...)"
            )

    def read(self) -> str | None:
        """The version that carries the alias, or None. Raises TryAgain if the server is away."""
        query = urllib.parse.urlencode({"name": self.model, "alias": self.alias})
        answer = call("GET", f"{self._url()}?{query}", None)
        if answer.status == 200:
            return str(answer.document()["model_version"]["version"])
        error = answer.document()
        # A model without this alias is answered as a wrong parameter, an unknown model as a missing resource.
        if error.get("error_code") == "RESOURCE_DOES_NOT_EXIST" or "alias" in str(error.get("message")).lower():
            return None
        raise self._refused("read", answer)

    def move(self, version: str | None) -> None:
        """Put the alias on `version`; None takes it away. Raises TryAgain or GiveUp."""
        body = {"name": self.model, "alias": self.alias} | ({} if version is None else {"version": version})
        method = "DELETE" if version is None else "POST"
        answer = call(method, self._url(), json.dumps(body).encode(), content_type="application/json")
        if answer.status != 200 and not (version is None and answer.status == 404):
            raise self._refused(f"move to {version}", answer)

    def _url(self) -> str:
        return self.tracking_uri.rstrip("/") + PATH

    def _refused(self, what: str, answer: Answer) -> GiveUp | TryAgain:
        text = str(answer.document().get("message") or answer.body.decode(errors="replace"))[:300]
        kind = TryAgain if answer.status >= 500 or answer.status == 429 else GiveUp
        return kind(f"MLflow {self.tracking_uri}: {what} alias {self.alias!r} of {self.model}: {answer.status}: {text}")
