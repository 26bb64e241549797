"""The receiver over HTTP: what each forge sends, what an attacker sends, and copies by the hundred."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import ConfigError
from flows.place_settings import load_place
from flows.prefect_api import Prefect
from flows.project import Project
from flows.push_handover import Target
from flows.push_queue import PushQueue, Unusable
from flows.push_receiver import LARGE_AT_ONCE, MAX_BYTES, Guarded, guard, make_app
from flows.push_signature import is_signed
from flows.settings import load_pipeline
from tests.flows.push_kit import SECRET, SIGNING_TOKEN, payload, signed

A, B, ZERO = "a" * 40, "b" * 40, "0" * 40
PIPELINE = '[pipeline]\nname = "{name}"\n[data]\npath = "d"\n[model]\nmodule = "m.py"\n[push]\n{push}\n'


def target(folder: Path, push: str = 'repository = "acme/digits"', name: str = "digits") -> Target:
    file = folder / "pipeline.toml"
    settings = load_pipeline(PIPELINE.format(name=name, push=push), file=file)
    place = load_place("laptop", folder)
    queue = PushQueue(folder / name / "queue.db")
    return Target(settings=settings, place=place, project=Project(folder), queue=queue, prefect=Prefect(url="http://x"))


class Receiver:
    """The app without a network, and its queue."""

    def __init__(self, guarded: list[Guarded]) -> None:
        self.queue = guarded[0].target.queue
        self.told: list[str] = []
        self.app = make_app(guarded, tell=self.told.append, work=False)

    async def send(self, body: Any, headers: Any, method: str = "POST") -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            return await client.request(method, "/push", content=body, headers=headers)

    def post(self, body: Any, headers: Any, method: str = "POST") -> tuple[int, str]:
        answer = asyncio.run(self.send(body, headers, method))
        return answer.status_code, answer.json().get("status", "")


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    yield Receiver([Guarded(target=target(tmp_path), key=SECRET)])


GITLAB = {
    "object_kind": "push",
    "checkout_sha": B,
    "project": {"path_with_namespace": "acme/digits"},
    "repository": {"name": "digits", "url": "git@gitlab.example:acme/digits.git"},
    "user_username": "ada",
    "commits": [],
    "total_commits_count": 4,
}


@pytest.mark.parametrize("forge", ["github", "gitea", "forgejo", "gitlab", "gitlab, signed"])
def test_a_push_of_each_forge_is_kept(tmp_path: Path, forge: str) -> None:
    secret = SIGNING_TOKEN if forge == "gitlab, signed" else SECRET
    receiver = Receiver([Guarded(target=target(tmp_path), key=secret)])
    body = payload(A, B, pusher={"name": "ada"} if forge == "github" else {"login": "ada"})
    if "gitlab" in forge:
        body = json.dumps({"ref": "refs/heads/main", "before": A, "after": B, **GITLAB}).encode()
    assert receiver.post(body, signed(body, secret, forge=forge)) == (202, "accepted")
    (entry,) = receiver.queue.waiting()
    assert (entry.push.repository, entry.push.branch, entry.push.before, entry.push.after, entry.push.pusher) == (
        "acme/digits", "main", A, B, "ada",
    )  # fmt: skip
    assert entry.push.source == forge.partition(",")[0].replace("forgejo", "gitea")
    again = {**signed(body, secret, forge=forge), "X-GitHub-Delivery": "another", "X-Gitlab-Event-UUID": "another"}
    assert receiver.post(body, again) == (200, "duplicate"), "whatever id the delivery has"


def test_another_spelling_is_no_other_push(receiver: Receiver) -> None:
    """Forges take names in either case; the name that is configured is the one that is kept."""
    for spelling, answer in (("acme/digits", (202, "accepted")), ("Acme/Digits", (200, "duplicate"))):
        body = payload(A, B, repository=spelling)
        assert receiver.post(body, signed(body)) == answer
    assert [e.push.repository for e in receiver.queue.entries()] == ["acme/digits"]


def test_the_published_example_of_github() -> None:
    """docs.github.com, validating webhook deliveries: secret, payload and signature as printed there."""
    secret = b"It's a Secret to Everybody"
    wanted = b"sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
    assert is_signed(secret, [(b"x-hub-signature-256", wanted)], b"Hello, World!")


IGNORED = {
    "another event": (payload(A, B), "issues", 202),
    "tag": (payload(ZERO, B, ref="refs/tags/v1"), "push", 202),
    "deleted branch": (payload(A, ZERO), "push", 202),
    "deleted, said so": (payload(A, B, deleted=True), "push", 202),
    "other branch": (payload(A, B, ref="refs/heads/next"), "push", 202),
    "a branch that begins alike": (payload(A, B, ref="refs/heads/main2"), "push", 202),
    "a branch below": (payload(A, B, ref="refs/heads/main/x"), "push", 202),
    "other repository": (payload(A, B, repository="evil/digits"), "push", 202),
    "repository that begins alike": (payload(A, B, repository="acme/digits2"), "push", 202),
    "with .git": (payload(A, B, repository="acme/digits.git"), "push", 202),
    "a fork": (payload(A, B, repository="eve/digits"), "push", 202),
    "pull request": (payload(A, B), "pull_request", 202),
    "tag of GitLab": (payload(A, B), "Tag Push Hook", 202),
    "two dots": (payload(A, B, ref="refs/heads/a..b"), "push", 202),
    "an option": (payload(A, B, ref="refs/heads/--upload-pack=touch x"), "push", 202),
    "an option without a branch": (payload(A, B, ref="--upload-pack=touch x"), "push", 202),
    "a line end": (payload(A, B, ref="refs/heads/main\n"), "push", 202),
    "ten thousand characters": (payload(A, B, ref="refs/heads/" + "x" * 10_000), "push", 202),
    "letters of elsewhere": (payload(A, B, ref="refs/heads/m\u0430in"), "push", 202),
    "half a character": (payload(A, B, ref="refs/heads/\ud800", pusher={"name": "\ud800"}), "push", 202),
}


@pytest.mark.parametrize("case", IGNORED)
def test_what_starts_nothing_is_ignored(receiver: Receiver, case: str) -> None:
    body, event, code = IGNORED[case]
    assert receiver.post(body, signed(body, event=event)) == (code, "ignored")
    assert receiver.queue.entries() == []


def test_ping(receiver: Receiver) -> None:
    assert receiver.post(b'{"zen": "x"}', signed(b'{"zen": "x"}', event="ping")) == (200, "pong")


MALFORMED = {
    "no JSON": b"{",
    "not UTF-8": b'{"ref": "\xff"}',
    "no object": b"[1]",
    "deep": b"[" * 100_000,
    "empty": b"",
    "no ref": b'{"before": "", "after": ""}',
    "ref is a number": json.dumps(
        {"ref": 1, "before": A, "after": B, "repository": {"full_name": "acme/digits"}}
    ).encode(),
    "repository is text": json.dumps({"ref": "refs/heads/main", "before": A, "after": B, "repository": "x"}).encode(),
    "short sha": payload(A, "b" * 39),
    "upper-case sha": payload(A, "B" * 40),
    "deleted is text": payload(A, B, deleted="no"),
    "deleted is text, of no branch": payload(A, B, ref="refs/tags/v1", deleted="no"),
    "SHA-256 objects": payload("a" * 64, "b" * 64),
    "a number of 9,000 digits": b'{"x": ' + b"9" * 9_000 + b"}",
    "option as sha": payload(A, "--upload-pack=touch /tmp/x".ljust(40, "x")),
    "sha with a line end": payload(A, "b" * 40 + "\n"),
    "sha is a number": payload(A, 1),  # type: ignore[arg-type]
    "sha is null": payload(None, B),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(receiver: Receiver, case: str) -> None:
    body = MALFORMED[case]
    assert receiver.post(body, signed(body)) == (400, "refused")
    assert receiver.queue.entries() == []


def test_an_event_without_its_header(receiver: Receiver) -> None:
    headers = signed(payload(A, B))
    del headers["X-GitHub-Event"]
    assert receiver.post(payload(A, B), headers) == (400, "refused")


FORGED = {
    "unsigned": {},
    "empty": {"X-Hub-Signature-256": ""},
    "only the prefix": {"X-Hub-Signature-256": "sha256="},
    "of another secret": {"X-Hub-Signature-256": signed(payload(A, B), b"x" * 32)["X-Hub-Signature-256"]},
    "of another body": {"X-Hub-Signature-256": signed(payload(A, A))["X-Hub-Signature-256"]},
    "not ASCII": {b"X-Hub-Signature-256": "sha256=ä€".encode()},
    "not ASCII, Latin-1": {b"X-Hub-Signature-256": b"sha256=\xe4"},
    "SHA-1": {"X-Hub-Signature": signed(payload(A, B))["X-Hub-Signature"]},
    "blanks in it": {"X-Hub-Signature-256": signed(payload(A, B))["X-Hub-Signature-256"].replace("=", "= ")},
    "upper case": {"X-Hub-Signature-256": signed(payload(A, B))["X-Hub-Signature-256"].upper()},
    "gitea's right, github's wrong": {
        **{k: v for k, v in signed(payload(A, B), forge="gitea").items() if "Signature" in k},
        "X-Hub-Signature-256": "sha256=0",
    },
    "right token beside a wrong signature": {"X-Gitlab-Token": SECRET.decode(), "X-Hub-Signature-256": "sha256=0"},
    "wrong token": {"X-Gitlab-Token": "x" * 32},
    "empty token": {"X-Gitlab-Token": ""},
    "token not ASCII": {b"X-Gitlab-Token": "ä€".encode()},
}


@pytest.mark.parametrize("case", FORGED)
def test_forged(receiver: Receiver, case: str) -> None:
    headers = {"Content-Type": "application/json", "X-GitHub-Event": "push", **FORGED[case]}
    assert receiver.post(payload(A, B), list(headers.items())) == (401, "refused")
    assert receiver.queue.entries() == []


def test_the_signature_comes_before_everything_but_the_size(receiver: Receiver) -> None:
    for body, headers in ((b"{", {}), (b"x", {"Content-Type": "text/plain"}), (b"", {"X-GitHub-Event": "issues"})):
        assert receiver.post(body, headers)[0] == 401


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_wrong_content_type(receiver: Receiver, kind: str) -> None:
    body = payload(A, B)
    assert receiver.post(body, {**signed(body), "Content-Type": kind}) == (415, "refused")


def test_content_type_with_a_charset(receiver: Receiver) -> None:
    body = payload(A, B)
    assert receiver.post(body, {**signed(body), "Content-Type": "application/json; charset=utf-8"})[0] == 202


@pytest.mark.parametrize("packed", ["gzip", "br", "deflate, gzip"])
def test_packed_bodies(receiver: Receiver, packed: str) -> None:
    body = payload(A, B)
    assert receiver.post(body, {**signed(body), "Content-Encoding": packed}) == (415, "refused")


def test_too_many_headers(receiver: Receiver) -> None:
    body = payload(A, B)
    assert receiver.post(body, {**signed(body), "X-Large": "x" * (32 << 10)}) == (431, "refused")
    assert receiver.post(body, {**signed(body), **{f"X-{n}": "x" for n in range(100)}}) == (431, "refused")


def test_two_lengths_end_the_connection(receiver: Receiver) -> None:
    body = payload(A, B)
    both = {**signed(body), "Content-Length": "4", "Transfer-Encoding": "chunked"}
    answer = asyncio.run(receiver.send(body, both))
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")


def test_a_sender_that_goes_in_the_middle(receiver: Receiver) -> None:
    """No exception for it, which a server would log with its whole traceback."""
    from starlette.requests import ClientDisconnect

    async def gone() -> Any:
        yield b"{"
        raise ClientDisconnect

    assert receiver.post(gone(), signed(b"{")) == (400, "refused")


def test_too_big_by_its_header_and_by_its_bytes(receiver: Receiver) -> None:
    big = payload(A, B, padding="x" * (10 << 20))

    async def chunks() -> Any:
        for at in range(0, len(big), 65_536):
            yield big[at : at + 65_536]

    assert receiver.post(big, signed(big)) == (413, "refused")
    assert receiver.post(chunks(), signed(big)) == (413, "refused")
    just = payload(A, B, padding="x" * (MAX_BYTES - len(payload(A, B, padding=""))))
    assert len(just) == MAX_BYTES and receiver.post(just, signed(just))[0] == 202


def test_two_thousand_commits_as_github_lists_them(receiver: Receiver) -> None:
    """Each with its message, people and files: megabytes, and still one push."""
    person = {"name": "Ada Lovelace", "email": "ada@users.noreply.example.com", "username": "ada"}
    commits = [
        {
            "id": f"{n:040x}", "tree_id": f"{n + 9:040x}", "distinct": True, "timestamp": "2026-11-24T12:00:00+01:00",
            "message": f"Change {n}\n\n" + "why " * 60, "author": person, "committer": person,
            "url": f"https://forge.example/acme/digits/commit/{n:040x}",
            "added": [], "removed": [], "modified": [f"src/ünïcode folder/file {n}-{k}\n.py" for k in range(10)],
        }
        for n in range(2048)
    ]  # fmt: skip
    body = payload(A, B, commits=commits, head_commit=commits[-1])
    assert len(body) > 2 << 20
    assert receiver.post(body, signed(body)) == (202, "accepted")
    assert len(receiver.queue.waiting()) == 1


def test_few_large_bodies_at_once(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends large ones slowly, unsigned, keeps other large ones waiting, and no small one."""
    monkeypatch.setattr("flows.push_receiver.BODY_SECONDS", 1.0)

    async def slow() -> Any:
        yield b"x" * (2 << 20)
        await asyncio.sleep(3)

    async def both() -> list[int]:
        slow_ones = [asyncio.create_task(receiver.send(slow(), {})) for _ in range(LARGE_AT_ONCE)]
        await asyncio.sleep(0.3)
        big, small = payload(A, B, padding="x" * (2 << 20)), payload(A, B)
        answers = [await receiver.send(small, signed(small)), await receiver.send(big, signed(big))]
        return [a.status_code for a in (*answers, *[await t for t in slow_ones])]

    small, big, *slow_answers = asyncio.run(both())
    assert (small, big) == (202, 200) and slow_answers == [408] * LARGE_AT_ONCE


def test_too_slow(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.push_receiver.BODY_SECONDS", 0.1)

    async def chunks() -> Any:
        yield b"{"
        await asyncio.sleep(2)

    assert receiver.post(chunks(), signed(b"{")) == (408, "refused")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
def test_other_methods(receiver: Receiver, method: str) -> None:
    assert asyncio.run(receiver.send(b"", {}, method)).status_code == 405


def test_a_hundred_copies_at_once_are_one(receiver: Receiver) -> None:
    body = payload(A, B)

    async def storm() -> list[int]:
        answers = await asyncio.gather(*(receiver.send(body, signed(body)) for _ in range(100)))
        return sorted(a.status_code for a in answers)

    assert asyncio.run(storm()) == [200] * 99 + [202]
    assert len(receiver.queue.entries()) == 1


def test_it_is_on_the_disk_before_it_is_answered(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue that cannot be written answers no 202: the forge will deliver again."""

    def full(*_: object) -> None:
        raise Unusable("the queue of pushes cannot be used: database or disk is full")

    monkeypatch.setattr(PushQueue, "add", full)
    body = payload(A, B)
    assert receiver.post(body, signed(body)) == (503, "refused")
    assert receiver.told == ["the queue of pushes cannot be used: database or disk is full; answered /push with 503"]


def test_a_queue_that_somebody_holds(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.push_queue.BUSY_SECONDS", 0.2)
    body = payload(A, B)
    holder = sqlite3.connect(receiver.queue.path, isolation_level=None)
    try:
        holder.execute("BEGIN IMMEDIATE")
        assert receiver.post(body, signed(body)) == (503, "refused")
        holder.execute("ROLLBACK")
    finally:
        holder.close()
    assert receiver.post(body, signed(body)) == (202, "accepted"), "sent again"


def test_one_of_two_queues_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is for both: sent again, the one that has it already is not told twice."""
    targets = [target(tmp_path / name, name=name) for name in ("one", "two")]
    receiver = Receiver([Guarded(target=t, key=SECRET) for t in targets])
    body, add = payload(A, B), PushQueue.add

    def full(queue: PushQueue, push: Any) -> Any:
        if queue is targets[1].queue:
            raise Unusable("the queue of pushes cannot be used: database or disk is full")
        return add(queue, push)

    with monkeypatch.context() as patched:
        patched.setattr(PushQueue, "add", full)
        assert receiver.post(body, signed(body)) == (503, "refused")
    assert receiver.post(body, signed(body)) == (202, "accepted")
    assert [len(t.queue.entries()) for t in targets] == [1, 1]


def test_two_pipelines_two_secrets(tmp_path: Path) -> None:
    other = b"another secret of at least 32 bytes!"
    one = target(tmp_path / "a", name="one")
    two = target(tmp_path / "b", name="two")
    receiver = Receiver([Guarded(target=one, key=SECRET), Guarded(target=two, key=other)])
    body = payload(A, B)
    assert receiver.post(body, signed(body, other)) == (202, "accepted")
    assert (len(one.queue.waiting()), len(two.queue.waiting())) == (0, 1)
    same = Receiver([Guarded(target=one, key=SECRET), Guarded(target=two, key=SECRET)])
    assert same.post(body, signed(body)) == (202, "accepted"), "new for one of the two"
    assert (len(one.queue.waiting()), len(two.queue.waiting())) == (1, 1)


@pytest.mark.parametrize(
    ("push", "environment", "message"),
    [
        ("", {}, r"\[push\] repository is not set; expected the full name on the forge"),
        ('repository = "a/b"', {}, r"REPRISE_PUSH_SECRET is not set; make one: export REPRISE_PUSH_SECRET="),
        ('repository = "a/b"', {"REPRISE_PUSH_SECRET": ""}, r"has 0 bytes; expected at least 32"),
        ('repository = "a/b"', {"REPRISE_PUSH_SECRET": " " * 40}, r"has 0 bytes; expected at least 32"),
        ('repository = "a/b"', {"REPRISE_PUSH_SECRET": "x" * 31}, r"has 31 bytes; expected at least 32"),
        ('repository = "a/b"\nsecret = "file:/no/such"', {}, r"cannot be read \(No such file"),
        ('repository = "a/b"', {"REPRISE_PUSH_SECRET": "whsec_" + "x" * 43}, r"follows whsec_ is not base64"),
        ('repository = "a/b"', {"REPRISE_PUSH_SECRET": "whsec_" + "xxxx" * 10}, r"has 30 bytes; expected at least 32"),
    ],
)
def test_it_does_not_start_without_a_secret_worth_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, push: str, environment: dict[str, str], message: str
) -> None:
    monkeypatch.delenv("REPRISE_PUSH_SECRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        guard([target(tmp_path, push)])
    assert "xxx" not in str(caught.value)


def test_a_secret_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    (one,) = guard([target(tmp_path, f'repository = "a/b"\nsecret = "file:{tmp_path}/secret"')])
    assert one.key == SECRET and "0123456789" not in repr(one)


def test_health(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> Any:
        transport = httpx.ASGITransport(app=receiver.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://receiver") as client:
            answer = await client.get("/health")
            return answer.status_code, answer.json()["status"]

    assert asyncio.run(ask()) == (200, "ok")
    receiver.queue.path.write_bytes(b"no database" * 1000)
    assert asyncio.run(ask()) == (503, "refused")


def test_the_script_for_ci_over_real_http(receiver: Receiver) -> None:
    """deployments/hooks/send-push signs as the receiver checks; its exit code and output tell a CI job enough."""
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(receiver.app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    script = Path(__file__).resolve().parents[2] / "deployments" / "hooks" / "send-push"

    def send(*arguments: str, secret: str = SECRET.decode()) -> tuple[int, str]:
        environment = {**os.environ, "REPRISE_URL": f"http://127.0.0.1:{port}/push", "REPRISE_PUSH_SECRET": secret}
        done = subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    try:
        code, said = send("acme/digits", A, B, "refs/heads/main")
        assert code == 0 and '"accepted"' in said, said
        assert '"duplicate"' in send("acme/digits", A, B, "refs/heads/main")[1]
        code, said = send("acme/digits", A, B, "refs/heads/main", secret="x" * 32)
        assert code != 0 and '"refused"' in said
        assert send("acme/digits", A, B)[0] == 2
        assert send('acme/digits"}', A, B, "refs/heads/main")[0] == 2
    finally:
        server.should_exit = True
        thread.join(10)
    assert len(receiver.queue.entries()) == 1
