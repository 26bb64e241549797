"""Steady clients against one endpoint, each on a connection kept alive: a program, so that it shares no interpreter.

    python tests/tasks/load.py URL HELDOUT CLIENTS REQUESTS_PER_SECOND_EACH OUT

It runs until its input closes, then writes one JSON line per request: [started (unix), seconds, status, version, label,
number of the sample]. Status 0: no answer within 30 s, or the connection broke. The rate is kept by the clock: a client
that waited for an answer sends the next one at once, so a stall shows as many late requests, not as a gap.
"""

from __future__ import annotations

import base64
import http.client
import json
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit


def client(
    url: str, bodies: list[bytes], offset: float, period: float, stop: threading.Event, out: list[object]
) -> None:
    """One client's life."""
    parts = urlsplit(url)
    assert parts.hostname
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    due, number = time.time() + offset, int(offset * 1000)
    while not stop.is_set():
        time.sleep(max(0.0, due - time.time()))
        due += period
        number = (number + 1) % len(bodies)
        began = time.time()
        status, document = 0, dict[str, object]()
        try:
            connection.request("POST", parts.path, bodies[number], {"Content-Type": "application/octet-stream"})
            reply = connection.getresponse()
            content = reply.read()
            status = reply.status
            document = json.loads(content) if status == 200 else {}
        except (OSError, http.client.HTTPException, ValueError):
            connection.close()
        row = [began, time.time() - began, status, document.get("model_version"), document.get("label"), number]
        out.append(row)
        if time.time() - due > 5:  # after an outage, begin anew instead of making up for minutes
            due = time.time()
    connection.close()


def main() -> None:
    url, heldout, clients, rate, out = sys.argv[1:]
    bodies = [base64.b64decode(json.loads(line)["body_b64"]) for line in Path(heldout).read_text().splitlines()]
    stop, rows = threading.Event(), list[object]()
    period = 1 / float(rate)
    threads = [
        threading.Thread(target=client, args=(url, bodies, period * n / int(clients), period, stop, rows))
        for n in range(int(clients))
    ]
    for thread in threads:
        thread.start()
    print("up", flush=True)
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    Path(out).write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
