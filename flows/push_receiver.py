"""The receiver of pushes: one small HTTP app for GitHub, GitLab, Gitea and Forgejo.

    REPRISE_PUSH_SECRET=... reprise hook serve        # POST /push; on loopback, behind your proxy or tunnel

A request is measured, then its signature is checked over the raw body, and only then is anything in it read. A push is
on the disk before it is answered 202; deciding and handing over happens after the answer (flows.push_handover).
Answers: 202 accepted or ignored, 200 duplicate or ping, 400 malformed, 401 not signed by us, 408 too slow, 413 too
big, 415 not JSON. Not covered: TLS (the proxy's), rates (the proxy's).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from flows.push_handover import Target, drain_forever
from flows.push_queue import ZERO, Push
from flows.push_status import report_forever
from flows.references import secret

MAX_BYTES = 8 << 20  # GitHub lists up to 2,048 commits with the names of their files: 2 to 4 MB
LARGE_BYTES = 1 << 20
LARGE_AT_ONCE = 4  # before the signature is checked anybody may send one: this bounds the memory
BODY_SECONDS = 10.0
LEAST_SECRET = 32  # bytes
_SHA = re.compile(r"[0-9a-f]{40}")
_SIGNATURES = ("x-hub-signature-256", "x-gitea-signature", "x-forgejo-signature", "x-gogs-signature")
_ANSWER = {
    "type": "object",
    "properties": {"status": {"type": "string"}, "reason": {"type": "string"}, "id": {"type": "string"}},
    "required": ["status", "reason"],
}
_COMMIT = {"type": "string", "pattern": "^[0-9a-f]{40}$"}
_PUSH = {
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
_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"description": text, "content": {"application/json": {"schema": _ANSWER}}}
    for code, text in {
        200: "A copy of a push that is known, or a ping",
        202: "Accepted, or ignored with the reason",
        400: "Malformed",
        401: "Not signed with the secret",
        408: "The body took too long",
        413: "Larger than 8 MiB",
        415: "Not JSON",
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A pipeline and the secret that its pushes are signed with."""

    target: Target
    key: bytes


class Refused(Exception):
    """An answer that ends the request."""

    def __init__(self, code: int, status: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.status, self.reason = code, status, reason


def guard(targets: Sequence[Target]) -> list[Guarded]:
    """Each target with its secret. Raises ConfigError without a repository or with a secret that is no secret."""
    from deployments.errors import ConfigError

    guarded = []
    for target in targets:
        push = target.settings.push
        if not push.repository:
            raise ConfigError(
                f"{target.settings.file}: [push] repository is not set; expected the full name on the forge, such as "
                '"acme/digits"; pushes of any other repository are ignored'
            )
        name = f"{target.settings.file}: [push] secret"
        guarded.append(Guarded(target=target, key=secret(push.secret, what=name, least=LEAST_SECRET)))
    return guarded


def make_app(
    guarded: Sequence[Guarded], *, tell: Callable[[str], None] = lambda line: None, work: bool = True
) -> FastAPI:
    """The app. `work`: also decide, hand over and say so at the forge; `tell` hears of each decision."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=loop, args=(g.target, stop.wait, tell), daemon=True)
            for g in (guarded if work else ())
            for loop in (drain_forever, report_forever)
        ]
        for thread in threads:
            thread.start()
        yield
        stop.set()
        for thread in threads:
            await run_in_threadpool(thread.join, 10)

    app = FastAPI(title="Reprise push receiver", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return JSONResponse({"status": error.status, "reason": error.reason}, error.code)

    @app.get("/health", response_class=JSONResponse)
    def health() -> dict[str, Any]:
        """Whether the queues can be read, and how many pushes wait in them."""
        return {"status": "ok", "waiting": sum(len(g.target.queue.waiting()) for g in guarded)}

    large = asyncio.Semaphore(LARGE_AT_ONCE)
    body = {"required": True, "content": {"application/json": {"schema": _PUSH}}}

    @app.post("/push", status_code=202, responses=_RESPONSES, openapi_extra={"requestBody": body})
    async def push(request: Request) -> JSONResponse:
        """A push, as the forge sends it."""
        raw = await _body(request, large)
        ours = _signed(guarded, request.headers, raw)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(
                415, "refused", f"content type {kind[:80]!r}; expected application/json: choose it in the forge"
            )
        source, event = _event(request.headers)
        if event == "ping":
            return JSONResponse({"status": "pong", "reason": "the signature is right"}, 200)
        if event not in ("push", "push hook"):
            return _ignored(f"event {event[:80]!r}; only pushes count")
        found, why = _read(raw, source)
        return await run_in_threadpool(_receive, ours, found) if found else _ignored(why)

    return app


async def _body(request: Request, large: asyncio.Semaphore) -> bytes:
    """The raw body, never more of it than allowed and never longer than allowed; few large ones at once."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BYTES:
        raise Refused(413, "refused", f"{declared} bytes; expected at most {MAX_BYTES}")
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS), AsyncExitStack() as held:
            waited = False
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BYTES:
                    raise Refused(413, "refused", f"more than {MAX_BYTES} bytes")
                if len(raw) > LARGE_BYTES and not waited:
                    waited = True
                    await held.enter_async_context(large)
    except TimeoutError:
        raise Refused(408, "refused", f"the body was not there within {BODY_SECONDS:g} s") from None
    return bytes(raw)


def _signed(guarded: Sequence[Guarded], headers: Mapping[str, str], raw: bytes) -> list[Guarded]:
    """Those whose secret signed this. Raises Refused 401 if there is none. Every secret is tried in constant time."""
    given = [
        headers[name].removeprefix("sha256=").encode("utf-8", "replace") for name in _SIGNATURES if name in headers
    ]
    token = headers.get("x-gitlab-token", "").encode("utf-8", "replace")
    ours = []
    for one in guarded:
        expected = hmac.new(one.key, raw, hashlib.sha256).hexdigest().encode()
        right = [hmac.compare_digest(expected, signature) for signature in given]
        # Gitea sends GitHub's header beside its own: every signature that is there has to be right.
        if (right and all(right)) or (not given and hmac.compare_digest(one.key, token)):
            ours.append(one)
    if not ours:
        raise Refused(401, "refused", "not signed with the secret of any pipeline here")
    return ours


def _event(headers: Mapping[str, str]) -> tuple[str, str]:
    """(which forge, which event in lower case)"""
    for source, name in (
        ("gitea", "x-forgejo-event"),
        ("gitea", "x-gitea-event"),
        ("github", "x-github-event"),
        ("gitlab", "x-gitlab-event"),
    ):
        if name in headers:
            return source, headers[name].strip().lower()
    raise Refused(400, "refused", "no X-GitHub-Event, X-Gitlab-Event or X-Gitea-Event header")


def _read(raw: bytes, source: str) -> tuple[Push | None, str]:
    """(the push, why it is none that could start a run). Raises Refused 400 for a malformed payload."""
    try:
        payload = json.loads(raw.decode())
    except (ValueError, RecursionError):
        raise Refused(400, "refused", "the body is not JSON") from None
    if not isinstance(payload, dict):
        raise Refused(400, "refused", "the body is no JSON object")
    ref, before, after = (payload.get(name) for name in ("ref", "before", "after"))
    names = _name(payload, "repository", "full_name"), _name(payload, "project", "path_with_namespace")
    name = names[0] or names[1]
    if not isinstance(ref, str) or not name:
        raise Refused(400, "refused", "no ref or no name of the repository in it; expected the payload of a push")
    for sha in (before, after):
        if not isinstance(sha, str) or not _SHA.fullmatch(sha):
            raise Refused(400, "refused", f"before or after is {str(sha)[:60]!r}; expected 40 hex digits")
    if not ref.startswith("refs/heads/"):
        return None, f"{ref[:120]!r} is no branch"
    if not isinstance(payload.get("deleted", False), bool):
        raise Refused(400, "refused", "deleted is neither true nor false")
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
        raise Refused(
            400, "refused", f"{holder} is not of the form that forges send; expected {{{key!r}: 'owner/name'}}"
        )
    return found if key in named else ""


def _receive(ours: Sequence[Guarded], push: Push) -> JSONResponse:
    """Put the push into the queue of each pipeline that takes it, and answer."""
    known = [g.target for g in ours if g.target.settings.push.repository.lower() == push.repository.lower()]
    if not known:
        return _ignored(f"repository {push.repository[:120]!r} is not one of a pipeline here")
    takers = [t for t in known if push.branch in t.settings.push.branches]
    if not takers:
        return _ignored(f"branch {push.branch[:120]!r} is not listed in [push] branches")
    kept = [t.queue.add(push) for t in takers]
    names, push_id = ", ".join(t.name for t in takers), kept[0][0]
    if not any(new for _, new in kept):
        return JSONResponse({"status": "duplicate", "reason": f"known already for {names}", "id": push_id}, 200)
    return JSONResponse({"status": "accepted", "reason": f"to be decided for {names}", "id": push_id}, 202)


def _ignored(reason: str) -> JSONResponse:
    return JSONResponse({"status": "ignored", "reason": reason}, 202)
