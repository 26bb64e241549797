"""What a delivery says: which forge, which event, and of a push its repository, branch and commits.

    {"ref": "refs/heads/main", "before": SHA, "after": SHA, "repository": {"full_name": "acme/digits"}, ...}

So GitHub, Gitea and Forgejo; GitLab's name is in `project`. Nothing else is read but who pushed: what changed is asked
of git, because forges list commits only up to a number. Called when the signature is known to be right. Not covered:
which repositories and branches count (flows.push_receiver).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from flows.push_queue import ZERO, Push

_SHA = re.compile(r"[0-9a-f]{40}")
_SHA_256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = {"type": "string", "pattern": "^[0-9a-f]{40}$"}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "ref": {"type": "string", "examples": ["refs/heads/main"]},
        "before": _COMMIT,
        "after": _COMMIT,
        "deleted": {"type": "boolean"},
        "repository": {"type": "object", "properties": {"full_name": {"type": "string", "minLength": 1}}},
        "project": {"type": "object", "properties": {"path_with_namespace": {"type": "string", "minLength": 1}}},
    },
    "required": ["ref", "before", "after"],
    "anyOf": [
        {"required": ["repository"], "properties": {"repository": {"required": ["full_name"]}}},
        {"required": ["project"], "properties": {"project": {"required": ["path_with_namespace"]}}},
    ],
}


class Refused(Exception):
    """An answer that ends the request, and with `close` the connection."""

    def __init__(self, code: int, reason: str, *, close: bool = False) -> None:
        super().__init__(reason)
        self.code, self.reason, self.close = code, reason, close


def event_of(headers: Mapping[str, str]) -> tuple[str, str]:
    """(which forge, which event in lower case). Gitea and Forgejo send GitHub's header too. Raises Refused 400."""
    for source, name in (
        ("gitea", "x-forgejo-event"),
        ("gitea", "x-gitea-event"),
        ("github", "x-github-event"),
        ("gitlab", "x-gitlab-event"),
    ):
        if name in headers:
            return source, headers[name].strip().lower()
    raise Refused(400, "no X-GitHub-Event, X-Gitlab-Event or X-Gitea-Event header")


def read_push(raw: bytes, source: str) -> tuple[Push | None, str]:
    """(the push, why it is none that could start a run). Raises Refused 400 for a malformed payload."""
    try:
        payload = json.loads(raw.decode())
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(payload, dict):
        raise Refused(400, "the body is no JSON object")
    ref, before, after = (payload.get(name) for name in ("ref", "before", "after"))
    names = _name(payload, "repository", "full_name"), _name(payload, "project", "path_with_namespace")
    name = names[0] or names[1]
    if not isinstance(ref, str) or not name:
        raise Refused(400, "no ref or no name of the repository in it; expected the payload of a push")
    for sha in (before, after):
        if isinstance(sha, str) and _SHA_256.fullmatch(sha):
            raise Refused(400, "before or after has 64 hex digits; a repository of SHA-256 objects is not supported")
        if not isinstance(sha, str) or not _SHA.fullmatch(sha):
            raise Refused(400, f"before or after is {str(sha)[:60]!r}; expected 40 hex digits")
    if not isinstance(payload.get("deleted", False), bool):
        raise Refused(400, "deleted is neither true nor false")
    if not ref.startswith("refs/heads/"):
        return None, f"{ref[:120]!r} is no branch"
    if after == ZERO or payload.get("deleted"):
        return None, "the branch was deleted"
    pusher = payload.get("user_username") or payload.get("pusher")
    if isinstance(pusher, dict):
        pusher = pusher.get("name") or pusher.get("login")
    push = Push(
        repository=name,
        branch=ref.removeprefix("refs/heads/"),
        before=str(before),
        after=str(after),
        body=hashlib.sha256(raw).hexdigest(),
        pusher=str(pusher or "")[:100],
        source=source,
    )
    return push, ""


def _name(payload: dict[str, Any], holder: str, key: str) -> str:
    """acme/digits, where the forge says it; GitLab's is `project`. Raises Refused 400 for one of another form."""
    named = payload.get(holder, {})
    found = named.get(key, "-") if isinstance(named, dict) else ""
    if not isinstance(found, str) or not found:
        raise Refused(400, f"{holder} is not of the form that forges send; expected {{{key!r}: 'owner/name'}}")
    return found if key in named else ""
