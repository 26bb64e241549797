"""A commit status at GitHub, GitLab, Gitea or Forgejo: their three dialects of one request.

    POST {url}/repos/{owner}/{name}/statuses/{sha}               GitHub           Authorization: Bearer
    POST {url}/api/v4/projects/{owner%2Fname}/statuses/{sha}     GitLab           PRIVATE-TOKEN
    POST {url}/api/v1/repos/{owner}/{name}/statuses/{sha}        Gitea, Forgejo   Authorization: token

Standard library only. A redirect is not followed: it would take the token elsewhere. Not covered: what to say and when
(flows.push_status).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any, Literal

from deployments.errors import GiveUp, TryAgain

Forge = Literal["github", "gitlab", "gitea"]
Word = Literal["waiting", "running", "success", "failure", "cancelled"]
TIMEOUT_SECONDS = 10.0
LONGEST_WAIT = 3600.0  # seconds that a forge's Retry-After is believed
DESCRIPTION = 140  # characters: GitHub refuses more
HOMES: dict[str, str] = {"github": "https://api.github.com", "gitlab": "https://gitlab.com", "gitea": ""}
WORDS: dict[str, dict[Word, str]] = {
    "github": {
        "waiting": "pending",
        "running": "pending",
        "success": "success",
        "failure": "failure",
        "cancelled": "error",
    },
    "gitlab": {
        "waiting": "pending",
        "running": "running",
        "success": "success",
        "failure": "failed",
        "cancelled": "canceled",
    },
    "gitea": {
        "waiting": "pending",
        "running": "pending",
        "success": "success",
        "failure": "failure",
        "cancelled": "error",
    },
}
# What the token has to be allowed, in each forge's own words.
RIGHTS = {
    "github": 'a fine-grained token with "Commit statuses: write" on this repository (a classic one: repo:status)',
    "gitlab": "a project access token with the scope api and the role Developer",
    "gitea": "an access token with the scope write:repository, of a user who may write to it",
}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What a commit's page shows."""

    word: Word
    description: str  # one sentence; cut to what the strictest forge takes
    target_url: str = ""  # where a click leads


class Away(TryAgain):
    """The forge cannot be reached or is in trouble: no other status would fare better now. `seconds` as it asked."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class Barred(TryAgain):
    """The forge does not let us: a person has to change the token, the address or the repository's name."""


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository of a forge, and the token that may write its statuses. Never tells the token."""

    forge: Forge
    url: str  # https://api.github.com, https://gitlab.com, https://gitea.example
    name: str  # "acme/digits"
    token: str = field(repr=False)
    context: str  # tells this status from those of others

    def post(self, sha: str, status: Status) -> None:
        """Say it, once more if it was said. Raises Away, Barred, or GiveUp for a status that it will never take."""
        body = {"state": WORDS[self.forge][status.word], "context": self.context}
        body["description"] = shortened(status.description)
        if status.target_url:
            body["target_url"] = status.target_url
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}{self._path(sha)}", json.dumps(body).encode(), self._headers(), method="POST"
        )
        try:
            with _OPENER.open(request, timeout=TIMEOUT_SECONDS) as reply:
                reply.read()
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode(errors="replace")
            self._refuse(error.code, error.headers, said)
        except (OSError, http.client.HTTPException) as error:
            raise Away(f"{self.url} does not answer: {getattr(error, 'reason', '') or error}") from None

    def _path(self, sha: str) -> str:
        quoted = urllib.parse.quote(self.name, safe="" if self.forge == "gitlab" else "/")
        return {
            "github": f"/repos/{quoted}/statuses/{sha}",
            "gitlab": f"/api/v4/projects/{quoted}/statuses/{sha}",
            "gitea": f"/api/v1/repos/{quoted}/statuses/{sha}",
        }[self.forge]

    def _headers(self) -> dict[str, str]:
        own = {
            "github": {
                "Authorization": f"Bearer {self.token}",
                "Accept": "application/vnd.github+json",
                "X-GitHub-Api-Version": "2022-11-28",
            },
            "gitlab": {"PRIVATE-TOKEN": self.token},
            "gitea": {"Authorization": f"token {self.token}"},
        }[self.forge]
        return {"Content-Type": "application/json", "User-Agent": "reprise", **own}

    def _refuse(self, code: int, headers: Message, said: str) -> None:
        """Raise what an answer that is none of success means."""
        what = f"{self.url} answered {code} for {self.name}"
        limited = code == 403 and ("retry-after" in headers or headers.get("x-ratelimit-remaining") == "0")
        if limited or code in (408, 425, 429) or code >= 500:
            raise Away(what, _asked_wait(headers))
        if 300 <= code < 400:
            raise Barred(f"{what}: moved to {headers.get('location', 'elsewhere')!r}; set url or repository to that")
        if code == 401:
            raise Barred(f"{what}: the token is not accepted; make a new one: {RIGHTS[self.forge]}")
        if code in (403, 404):
            raise Barred(f"{what}: the token may not, or the repository is not there; needed is {RIGHTS[self.forge]}")
        # GitLab refuses a status that is there already: said before, and the answer or our record was lost.
        if self.forge == "gitlab" and code == 400 and "Cannot transition status" in said:
            return
        raise GiveUp(f"{what}: {' '.join(said.split())[:200]}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> Any:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def shortened(text: str) -> str:
    """One line of at most DESCRIPTION characters."""
    line = " ".join(text.split())
    return line if len(line) <= DESCRIPTION else f"{line[: DESCRIPTION - 1]}…"


def _asked_wait(headers: Message) -> float:
    """Seconds that the forge asks to be left alone; 0 if it does not say."""
    try:
        if "retry-after" in headers:
            wait = float(headers["retry-after"])
        else:
            wait = float(headers.get("x-ratelimit-reset", 0.0)) - time.time()
    except ValueError:  # an HTTP date: our own back-off is as good
        wait = 0.0
    return min(max(wait, 0.0), LONGEST_WAIT)
