"""The receiver of pushes: one small HTTP app for GitHub, GitLab, Gitea and Forgejo.

    REPRISE_PUSH_SECRET=... reprise hook serve        # POST /push; on loopback, behind your proxy or tunnel

A request is measured, then its signature is checked over the raw body, and only then is anything in it read. A push is
on the disk before it is answered 202; deciding and handing over happens after the answer (flows.push_handover).
Answers: 202 accepted or ignored, 200 duplicate or ping, 400 malformed, 401 not signed by us, 408 too slow, 413 too
big, 415 not plain JSON, 431 too many headers, 503 could not be kept. Not covered: signatures (flows.push_signature),
what payloads say (flows.push_payload), connections (flows.push_server), TLS and rates (the proxy's).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from flows.push_handover import Target, drain_forever
from flows.push_payload import SCHEMA, Refused, event_of, read_push
from flows.push_queue import Push, Unusable
from flows.push_signature import is_signed, signing_key
from flows.push_status import report_forever
from flows.references import secret

MAX_BYTES = 8 << 20  # GitHub lists up to 2,048 commits with the names of their files: 2 to 4 MB
LARGE_BYTES = 128 << 10
LARGE_AT_ONCE = 4  # before the signature is checked anybody may send one: this bounds the memory
BODY_SECONDS = 10.0
HEADERS, HEADER_BYTES = 100, 32 << 10
LEAST_SECRET = 32  # bytes
_ANSWER = {
    "type": "object",
    "properties": {"status": {"type": "string"}, "reason": {"type": "string"}, "id": {"type": "string"}},
    "required": ["status", "reason"],
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
        415: "Not plain JSON",
        431: "Too many headers",
        503: "The push could not be kept: send it again",
    }.items()
}


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A pipeline and the secret that its pushes are signed with."""

    target: Target
    key: bytes = field(repr=False)


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
        found = secret(push.secret, what=name, least=LEAST_SECRET)
        try:
            key = signing_key(found)
        except ValueError as error:
            raise ConfigError(f"{name} = {push.secret!r}: {error}; expected GitLab's signing token, whole") from None
        if len(key) < LEAST_SECRET:
            raise ConfigError(
                f"{name} = {push.secret!r}: the signing token has {len(key)} bytes; expected at least {LEAST_SECRET}, "
                "because whoever guesses it can start runs; let GitLab make a new one"
            )
        guarded.append(Guarded(target=target, key=found))
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

    app = FastAPI(
        title="Reprise push receiver",
        version="1",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # no forge follows one; 404 says that the address is wrong
    )

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        answer = JSONResponse({"status": "refused", "reason": error.reason}, error.code)
        if error.close:
            answer.headers["connection"] = "close"
        return answer

    @app.exception_handler(Unusable)
    async def not_kept(request: Request, error: Unusable) -> JSONResponse:
        """Never 202 for what is not on the disk. Forges show the delivery as failed, with a button to send it again."""
        tell(f"{error}; answered {request.url.path} with 503")
        reason = "the queue of pushes cannot be used now; send it again when the machine of the receiver is well"
        return JSONResponse({"status": "refused", "reason": reason}, 503)

    @app.get("/health", response_class=JSONResponse, responses={503: _RESPONSES[503]})
    def health() -> dict[str, Any]:
        """Whether the queues can be read, and how many pushes wait in them."""
        return {"status": "ok", "waiting": sum(len(g.target.queue.waiting()) for g in guarded)}

    large = asyncio.Semaphore(LARGE_AT_ONCE)
    body = {"required": True, "content": {"application/json": {"schema": SCHEMA}}}

    @app.post("/push", status_code=202, responses=_RESPONSES, openapi_extra={"requestBody": body})
    async def push(request: Request) -> JSONResponse:
        """A push, as the forge sends it."""
        _measure(request)
        raw = await _body(request, large)
        ours = [one for one in guarded if is_signed(one.key, request.headers.raw, raw)]
        if not ours:
            raise Refused(401, "not signed with the secret of any pipeline here")
        _plain_json(request)
        source, event = event_of(request.headers)
        if event == "ping":
            return JSONResponse({"status": "pong", "reason": "the signature is right"}, 200)
        if event not in ("push", "push hook"):
            return _ignored(f"event {event[:80]!r}; only pushes count")
        found, why = read_push(raw, source)
        return await run_in_threadpool(_receive, ours, found) if found else _ignored(why)

    return app


def _measure(request: Request) -> None:
    """What can be refused before a byte of the body is read."""
    headers = request.headers.raw
    if len(headers) > HEADERS or sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
        raise Refused(431, f"too many headers; expected at most {HEADERS} of together {HEADER_BYTES} bytes")
    if "transfer-encoding" in request.headers and "content-length" in request.headers:
        # What follows may be the rest of the body for one reader and another request for the next.
        raise Refused(400, "Content-Length beside Transfer-Encoding; expected one of them", close=True)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > MAX_BYTES:
        raise Refused(413, f"{declared} bytes; expected at most {MAX_BYTES}")


async def _body(request: Request, large: asyncio.Semaphore) -> bytes:
    """The raw body, never more of it than allowed and never longer than allowed; few large ones at once."""
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS), AsyncExitStack() as held:
            waited = False
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BYTES:
                    raise Refused(413, f"more than {MAX_BYTES} bytes")
                if len(raw) > LARGE_BYTES and not waited:
                    waited = True
                    await held.enter_async_context(large)
    except TimeoutError:
        raise Refused(408, f"the body was not there within {BODY_SECONDS:g} s") from None
    except ClientDisconnect:
        raise Refused(400, "the body ended in the middle") from None  # nobody hears it; no traceback for it either
    return bytes(raw)


def _plain_json(request: Request) -> None:
    """Forges can also send forms, and nobody packs."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"content type {kind[:80]!r}; expected application/json: choose it in the forge")
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed != "identity":
        raise Refused(415, f"content encoding {packed[:80]!r}; expected the body as it is")


def _receive(ours: Sequence[Guarded], push: Push) -> JSONResponse:
    """Put the push into the queue of each pipeline that takes it, and answer."""
    known = [g.target for g in ours if g.target.settings.push.repository.lower() == push.repository.lower()]
    if not known:
        return _ignored(f"repository {push.repository[:120]!r} is not one of a pipeline here")
    takers = [t for t in known if push.branch in t.settings.push.branches]
    if not takers:
        return _ignored(f"branch {push.branch[:120]!r} is not listed in [push] branches")
    # By the name that is configured: a copy told under another spelling is a copy.
    kept = [t.queue.add(replace(push, repository=t.settings.push.repository)) for t in takers]
    names, push_id = ", ".join(t.name for t in takers), kept[0][0]
    if not any(new for _, new in kept):
        return JSONResponse({"status": "duplicate", "reason": f"known already for {names}", "id": push_id}, 200)
    return JSONResponse({"status": "accepted", "reason": f"to be decided for {names}", "id": push_id}, 202)


def _ignored(reason: str) -> JSONResponse:
    return JSONResponse({"status": "ignored", "reason": reason}, 202)
