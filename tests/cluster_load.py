"""Load on a model that is served on a cluster, from outside the pods, with every answer judged.

    with Load(url, bodies, {"1": labels}) as load: ...
    assert load.failures == []

Not covered: where it is served (cluster_serving_kit.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import TryAgain
from deployments.serving import call
from tasks.golden import percentile

CLIENTS = 8


@dataclass
class Load:
    """Golden requests without a pause from several threads; every answer is judged by the version that gave it."""

    url: str
    bodies: list[bytes]
    right: dict[str, list[Any]]  # version -> label per body
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    versions: set[str] = field(default_factory=set)

    def __enter__(self) -> Load:
        self.stop = threading.Event()
        self.threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(CLIENTS)]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(35)

    def _run(self, number: int) -> None:
        while not self.stop.wait(0.05):
            number = (number + 1) % len(self.bodies)
            try:
                answer = call("POST", f"{self.url}/predictions/toy", self.bodies[number], timeout=30)
            except TryAgain as error:
                self.failures.append(str(error))
                continue
            self.seconds.append(answer.seconds)
            version = str(answer.document().get("model_version"))
            self.versions.add(version)
            if answer.status != 200 or answer.document().get("label") != self.right.get(version, [None] * 99)[number]:
                self.failures.append(f"{answer.status} {answer.body[:200]!r}")

    def told(self) -> str:
        p50, p99 = (1000 * percentile(self.seconds, share) for share in (0.5, 0.99))
        return (
            f"{len(self.seconds)} requests of {CLIENTS} clients, {len(self.failures)} failed, versions "
            f"{sorted(self.versions)}, p50 {p50:.0f} ms, p99 {p99:.0f} ms, max {1000 * max(self.seconds):.0f} ms"
        )
