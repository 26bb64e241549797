"""Closed-loop clients: each keeps one connection and asks again as soon as it is answered. A program.

    python -m tasks.load_clients URL HELDOUT CLIENTS SECONDS

Prints one JSON object: requests, failed, per_second, p50_ms, p95_ms, p99_ms. The first tenth of the time is left out.
It speaks just enough HTTP for a model server (Content-Length, no chunks), so that clients cost little of the machine
that they share with it. Not covered: open-loop load, other servers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from urllib.parse import urlsplit

from tasks.golden import percentile, read_golden


def request_bytes(url: str, body: bytes) -> bytes:
    """One whole request."""
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/octet-stream\r\n"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


async def client(
    url: str, requests: list[bytes], start: int, until: float, rows: list[tuple[float, float, int]]
) -> None:
    """Ask until the time is over. A broken connection is a failed request (status 0) and is opened again."""
    parts = urlsplit(url)
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    number = start
    while time.monotonic() < until:
        number += 1
        began = time.monotonic()
        try:
            if reader is None or writer is None:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(requests[number % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            lower = head.lower()
            at = lower.index(b"content-length:") + 15
            await reader.readexactly(int(lower[at : lower.index(b"\r", at)]))
            status = int(head[9:12])
            closed = b"connection: close" in lower
        except (OSError, ValueError, asyncio.IncompleteReadError):
            status, closed = 0, True
        rows.append((began, time.monotonic() - began, status))
        if closed and writer is not None:
            writer.close()
            reader = writer = None
    if writer is not None:
        writer.close()


async def run(url: str, heldout: str, clients: int, seconds: float) -> dict[str, float]:
    """All clients for `seconds`; the figures."""
    requests = [request_bytes(url, sample.body) for sample in read_golden(heldout)]
    rows: list[tuple[float, float, int]] = []
    began = time.monotonic()
    until = began + seconds
    await asyncio.gather(*(client(url, requests, 7 * n, until, rows) for n in range(clients)))
    warm = began + seconds / 10
    counted = [row for row in rows if row[0] >= warm and row[0] + row[1] <= until]
    good = [row[1] for row in counted if row[2] == 200]
    return {
        "requests": len(counted),
        "failed": len(counted) - len(good),
        "per_second": round(len(good) / (until - warm), 1),
        **{f"p{share}_ms": round(percentile(good, share / 100) * 1000, 2) for share in (50, 95, 99)},
    }


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: python -m tasks.load_clients URL HELDOUT CLIENTS SECONDS")
    print(json.dumps(asyncio.run(run(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))))
