"""The receiver's server on a real socket: senders that never end, that mean two things, that send too much."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import flows.push_server
from deployments.errors import ConfigError
from flows.push_queue import PushQueue
from flows.push_receiver import MAX_BYTES, Guarded, make_app
from flows.push_server import listen, make_server
from tests.flows.push_kit import SECRET, FakePrefect, Repositories, payload, signed
from tests.flows.test_push_receiver import target

A, B = "a" * 40, "b" * 40
HEAD_SECONDS = 0.6


class Client:
    """Bytes to the server and what comes back."""

    def __init__(self, port: int) -> None:
        self.port = port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def say(self, sent: bytes) -> bytes:
        """Everything until the server hangs up; "" if it did so without a word."""
        with self.connect() as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(sent)
            return self.hear(connection)

    @staticmethod
    def hear(connection: socket.socket) -> bytes:
        heard = b""
        with contextlib.suppress(ConnectionError):
            while found := connection.recv(65_536):
                heard += found
        return heard

    def push(self, body: bytes) -> int:
        answer = self.say(request(body))
        return int(answer.split()[1])


def request(
    body: bytes, headers: dict[str, str] | None = None, *, start: str = "POST /push", close: bool = True
) -> bytes:
    found = {"Host": "x", "Content-Length": str(len(body)), **(signed(body) if headers is None else headers)}
    found |= {"Connection": "close"} if close else {}
    return (
        f"{start} HTTP/1.1\r\n".encode() + b"".join(f"{k}: {v}\r\n".encode() for k, v in found.items()) + b"\r\n" + body
    )


def codes(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+)", answer)]


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(flows.push_server, "HEAD_SECONDS", HEAD_SECONDS)
    server = make_server(make_app([Guarded(target=target(tmp_path), key=SECRET)], work=False))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        yield Client(listening.getsockname()[1])
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "it ends whatever its clients do"


@pytest.mark.parametrize("sent", [b"", b"POST /push HTTP/1.1\r\nHost: x\r\n", b"POST /pu"])
def test_a_head_that_does_not_come(client: Client, sent: bytes) -> None:
    began = time.monotonic()
    assert client.say(sent) == b""
    assert HEAD_SECONDS - 0.1 < time.monotonic() - began < HEAD_SECONDS + 3


def test_a_head_that_comes_byte_by_byte(client: Client) -> None:
    """Each byte is life, and still it is not waited for."""
    with client.connect() as connection, contextlib.suppress(ConnectionError):
        for sent in range(200):
            connection.sendall(b"x" if sent else b"GET /health HTTP/1.1\r\nX-Slow: ")
            time.sleep(0.05)
        pytest.fail("it listened for ten seconds")


def test_the_head_of_a_second_request_on_a_connection(client: Client) -> None:
    with client.connect() as connection:
        connection.sendall(request(b"", {}, start="GET /health", close=False) + b"GET /heal")
        began = time.monotonic()
        assert codes(client.hear(connection)) == [200]
        assert time.monotonic() - began < HEAD_SECONDS + 3


def test_a_body_is_not_cut_by_the_time_for_heads(client: Client) -> None:
    body = payload(A, B)
    with client.connect() as connection:
        sent = request(body)
        connection.sendall(sent[:-10])
        time.sleep(2 * HEAD_SECONDS)
        connection.sendall(sent[-10:])
        assert codes(client.hear(connection)) == [202]


def test_a_body_without_end_is_refused_and_then_cut(client: Client) -> None:
    """Chunked, so no length says how much will come."""
    heard: list[bytes] = []
    with client.connect() as connection:
        connection.sendall(b"POST /push HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        listener = threading.Thread(target=lambda: heard.append(client.hear(connection)))
        listener.start()
        sent, until = 0, time.monotonic() + 20
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until:
                connection.sendall(b"10000\r\n" + b"x" * 65_536 + b"\r\n")
                sent += 65_536
                if sent > MAX_BYTES:
                    time.sleep(0.01)
        assert time.monotonic() < until, "it read on for ever"
        listener.join(10)
    assert codes(heard[0]) == [413], "and the sender heard why"


def test_ten_megabytes_hear_why(client: Client) -> None:
    body = b"x" * (10 << 20)
    assert codes(client.say(request(body))) == [413]


def test_who_asks_before_sending_is_spared_it(client: Client) -> None:
    head = b"POST /push HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
    assert codes(client.say(head + b"Content-Length: 99999999\r\n\r\n")) == [413]
    body = payload(A, B)
    sent = request(body, {**signed(body), "Expect": "100-continue"})
    assert codes(client.say(sent)) == [100, 202]


def test_silent_connections_keep_nobody_out(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.push_server, "HEAD_SECONDS", 60.0)
    with contextlib.ExitStack() as held:
        for _ in range(flows.push_server.CONNECTIONS + 20):
            held.enter_context(client.connect())
        assert client.push(payload(A, B)) == 202


TWO_MEANINGS = {
    "two lengths": (b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", [400]),
    "a length and chunks": (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health ", [400]),
    "a negative length": (b"Content-Length: -4\r\n\r\n", [400]),
    "a length that is no number": (b"Content-Length: 0x4\r\n\r\nabcd", [400]),
    "a length of 5,000 digits": (b"Content-Length: " + b"9" * 5_000 + b"\r\n\r\n", [400]),
    "another coding": (b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [400]),
    "a folded header": (b"X-A: b\r\n c: d\r\nContent-Length: 0\r\n\r\n", [401]),
    "a blank before the colon": (b"Content-Length : 4\r\n\r\nabcd", [400]),
    "a lone line end": (b"X-A: b\nContent-Length: 0\r\n\r\n", None),
    "a zero byte": (b"X-A: \0\r\n\r\n", [400]),
}


@pytest.mark.parametrize("case", TWO_MEANINGS)
def test_requests_that_proxies_read_otherwise(client: Client, case: str) -> None:
    """Refused, and nothing behind them is taken for a request of its own."""
    sent, expected = TWO_MEANINGS[case]
    answer = client.say(b"POST /push HTTP/1.1\r\nHost: x\r\n" + sent)
    found = codes(answer)
    assert found == expected if expected else len(found) <= 1
    assert b"waiting" not in answer


def test_requests_in_a_row_on_one_connection(client: Client) -> None:
    """Each with its own signature: a right one does not speak for the next."""
    good, bad = payload(A, B), payload(A, A)
    sent = request(good, close=False) + request(bad, signed(good), close=False) + request(good)
    assert codes(client.say(sent)) == [202, 401, 200]


@pytest.mark.parametrize(
    ("start", "code"),
    [
        ("HEAD /push", 405), ("OPTIONS /push", 405), ("PUT /push", 405), ("TRACE /push", 405), ("PATCH /push", 405),
        ("POST /push/", 404), ("POST //push", 404), ("POST /", 404), ("GET /docs", 404), ("POST http://x/push", 404),
        ("CONNECT x:443", 404),
    ],
)  # fmt: skip
def test_other_methods_and_addresses(client: Client, start: str, code: int) -> None:
    answer = client.say(request(b"", {}, start=start))
    assert codes(answer) == [code] and b"location" not in answer.lower()


def test_an_upgrade_is_not_taken(client: Client) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "x"}
    assert codes(client.say(request(b"", upgrade, start="GET /push", close=False))) == [405]


def test_headers_without_end(client: Client) -> None:
    assert codes(client.say(request(b"", {"X-Large": "x" * 60_000}))) == [431]
    with client.connect() as connection, contextlib.suppress(ConnectionError):
        connection.sendall(b"GET /health HTTP/1.1\r\nX-Large: ")
        for _ in range(64):
            connection.sendall(b"x" * 65_536)
            time.sleep(0.005)
        pytest.fail("it took four megabytes of one header")


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port}: cannot listen there \(Address already in use"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"--host 192\.0\.2\.1 --port 1: cannot listen there"):
        listen("192.0.2.1", 1)


class Process:
    """`reprise hook serve` as it is started; ends with the block."""

    def __init__(self, repos: Repositories, *, largest_file: int = 0) -> None:
        root = str(Path(__file__).resolve().parents[2])
        env = {**os.environ, "REPRISE_PUSH_SECRET": SECRET.decode(), "PYTHONPATH": root}

        def limit() -> None:
            if largest_file:  # as a disk that is full: a write comes back with an error
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        argv = [sys.executable, "-m", "flows", "hook", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            argv, cwd=repos.checkout, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=limit,
        )  # fmt: skip
        assert self.process.stdout
        self.lines = [next(self.process.stdout), next(self.process.stdout)]
        self.client = Client(int(re.findall(r":(\d+)/push", self.lines[1])[0]))

    def end(self, number: int = signal.SIGTERM) -> str:
        """What it said."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=30)[0]
        return "".join(self.lines) + said

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()


def test_told_to_end_in_the_middle_of_a_request_it_answers_first(repos: Repositories, prefect: FakePrefect) -> None:
    """And a secret, a traceback or a stranger's bytes are nowhere in what it said."""
    body = payload(*repos.edit("seed = 7", "seed = 8"), pusher={"name": "\x1b[31m"})
    with Process(repos) as receiver, receiver.client.connect() as connection, receiver.client.connect() as silent:
        for sent in (b"GET /\x1b[31m HTTP/1.1\r\n\r\n", b"\0" * 99, request(body, {"X-GitHub-Event": "push\x1b[31m"})):
            receiver.client.say(sent)
        for _ in range(5):
            with receiver.client.connect() as gone:
                gone.sendall(request(body)[:-5])
        sent = request(body, {**signed(body), "X-Hub-Signature-256": f"{signed(body)['X-Hub-Signature-256']}"})
        connection.sendall(sent[:-5])
        time.sleep(0.3)
        receiver.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(sent[-5:])
        assert codes(receiver.client.hear(connection)) == [202]
        assert receiver.client.hear(silent) == b""
        said = receiver.process.communicate(timeout=30)[0]
    assert "Traceback" not in said and "\x1b" not in said and SECRET.decode() not in said
    assert len(said.splitlines()) <= 1, "at most the decision"
    assert len(PushQueue(repos.checkout / ".reprise/push/digits.db").entries()) == 1


def test_a_full_disk_is_never_answered_with_202(repos: Repositories, prefect: FakePrefect) -> None:
    """Until the queue's files may not grow; what was accepted is there."""
    with Process(repos, largest_file=36 << 10) as receiver:
        commits = [f"{n:040x}"[::-1] for n in range(1, 81)]
        answers = {after: receiver.client.push(payload(A, after, pusher={"name": "x" * 100})) for after in commits}
        said = receiver.end()
    assert set(answers.values()) == {202, 503}, "both before and after it was full"
    kept = {e.push.after for e in PushQueue(repos.checkout / ".reprise/push/digits.db").entries(1000)}
    assert kept >= {after for after, code in answers.items() if code == 202}
    assert "Traceback" not in said and "the queue of pushes cannot be used" in said


def test_two_receivers_on_one_queue(repos: Repositories, prefect: FakePrefect) -> None:
    """Copies to both, and the one of them killed: one run for each push."""
    with Process(repos) as one, Process(repos) as two:
        for seed in (7, 8):
            before, after = repos.edit(f"seed = {seed}", f"seed = {seed + 1}")
            body = payload(before, after)
            receivers = [r for r in (one, two) if r.process.poll() is None]
            with ThreadPoolExecutor(20) as pool:
                answers = list(pool.map(lambda n, b=body, r=receivers: r[n % len(r)].client.push(b), range(40)))
            assert sorted(answers) == [200] * 39 + [202]
            one.process.kill()
            one.process.wait()
            until = time.monotonic() + 20
            while (after, "SCHEDULED") not in prefect.started() and time.monotonic() < until:
                time.sleep(0.05)
        entries = PushQueue(repos.checkout / ".reprise/push/digits.db").entries()
    assert [e.state for e in entries] == ["started", "started"]
    assert len(prefect.runs) == 2
