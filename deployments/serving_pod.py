"""What runs inside a serving pod: fetch the archive, serve it, and prove that it answers.

    python -m deployments.serving_pod fetch --mar /reprise/.../x.mar --sha256 HEX --golden heldout.jsonl --to /models
    python -m deployments.serving_pod serve --model digits --label 3.1a2b3c4d --golden ... --mar ... --state DIR
    python -m deployments.serving_pod ready --model digits --label 3.1a2b3c4d --golden /models/golden.json --state DIR

`fetch` (init container) believes only the digest. `serve` is the pod's main process: it asks all golden requests before
the pod may get ready, and where no repetition would help it ends with exit code 4, the reason as its last line. SIGTERM
to TorchServe's wrapper would leave the server behind, so this one ends the server itself; before that, preStop has
waited until nobody sends requests any more. `ready` (probe) asks one golden request: 0 if all were answered rightly
once, and this one has the right label and comes from the right version. Standard library only, because a probe starts
every few seconds. Not covered: numbers within a tolerance, which deploy_model and check_endpoint ask for.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import base64
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import GateRefused, GiveUp, StepError, TryAgain

if TYPE_CHECKING:
    from deployments.serving import ModelServer

ASK_SECONDS = 0.5
WRONG_ANSWERS = 3  # in a row, of a model that is loaded
BROKEN_SECONDS = 15.0  # TorchServe starts a worker that died again: what still fails after that is the model
WORKERS_DEAD = 3  # worker processes while loading: more of them is a loop, not bad luck
SETTINGS = Path("/etc/torchserve")  # the ConfigMap `torchserve`, where a cluster has it
PROVED = "proved"  # a file in the state folder: all golden requests were answered rightly since the server started
# What a cluster may set for all models. Addresses, authorization and where models come from are not among it, and the
# heap is REPRISE_HEAP.
TUNABLE = (
    "async_logging",
    "default_response_timeout",
    "default_startup_timeout",
    "disable_system_metrics",
    "job_queue_size",
    "max_request_size",
    "max_response_size",
    "model_metrics_auto_detect",
    "netty_client_threads",
    "number_of_netty_threads",
    "unregister_model_timeout",
)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What came back for a golden request."""

    right: bool
    loaded: bool  # the model itself answered, not the server for want of it
    text: str  # what is wrong


def fetch(mar: Path, sha256: str, golden: Path, count: int, to: Path) -> None:
    """Copy the archive and `count` golden requests to `to`. Raises GateRefused if the archive is not the one packaged,
    GiveUp if it is not there."""
    if not mar.is_file():
        raise GiveUp(f"{mar} is missing on the state volume; run package_model again")
    digest, aside = hashlib.sha256(), to / f".{mar.name}"
    with mar.open("rb") as source, aside.open("wb") as target:
        while chunk := source.read(1 << 20):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != sha256:
        aside.unlink()
        raise GateRefused(f"{mar} has sha256 {digest.hexdigest()}, packaged was {sha256}; run package_model again")
    aside.replace(to / mar.name)
    rows: list[dict[str, object]] = []
    with golden.open() as lines:
        for line in lines:
            if len(rows) == count:
                break
            row = json.loads(line)
            rows.append({"name": row["name"], "body_b64": row["body_b64"], "label": row["answer"]["label"]})
    if not rows:
        raise GateRefused(f"{golden} holds no golden request: nothing could prove that the model answers")
    (to / "golden.json").write_text(json.dumps(rows))


def ready(url: str, model: str, label: str, golden: Path, *, timeout: float = 9.0) -> Answered:
    """Ask one golden request, another at each second."""
    rows = json.loads(golden.read_text())
    return ask(url, model, label, rows[int(time.time()) % len(rows)], timeout=timeout)


def all_ready(url: str, model: str, label: str, golden: Path, *, timeout: float = 9.0) -> Answered:
    """Ask all golden requests; the first answer that is not right, or the last one."""
    answered = Answered(right=False, loaded=False, text="no golden request")
    for row in json.loads(golden.read_text()):
        answered = ask(url, model, label, row, timeout=timeout)
        if not answered.right:
            break
    return answered


def ask(url: str, model: str, label: str, row: Mapping[str, Any], *, timeout: float) -> Answered:
    """Ask one golden request and judge label and version of the answer."""
    from deployments.serving import call

    try:
        answer = call("POST", f"{url}/predictions/{model}", base64.b64decode(row["body_b64"]), timeout=timeout)
    except TryAgain as error:
        return Answered(right=False, loaded=False, text=str(error))
    if answer.status != 200:
        text = f"{row['name']}: status {answer.status}: {answer.body.decode(errors='replace')[:200]}"
        return Answered(right=False, loaded="x-model-label" in answer.headers, text=text)
    found, version = answer.document().get("label"), answer.headers.get("x-model-label")
    if found != row["label"]:
        return Answered(right=False, loaded=True, text=f"{row['name']}: answered {found!r}, expected {row['label']!r}")
    if version != label:
        return Answered(right=False, loaded=True, text=f"version {version!r} answers, expected {label!r}")
    return Answered(right=True, loaded=True, text="")


def with_settings(rendered: str, folder: Path) -> str:
    """config.properties with the cluster's values of TUNABLE; as it was where the cluster has none."""
    try:
        lines = (folder / "config.properties").read_text().splitlines()
    except FileNotFoundError:
        return rendered
    given = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    values = {key: value for key, value in given.items() if key in TUNABLE}
    kept = [line for line in rendered.splitlines() if line.partition("=")[0] not in values]
    return "\n".join([*kept, *(f"{key}={value}" for key, value in sorted(values.items()))]) + "\n"


def serve(model: str, label: str, golden: Path, mar: Path, state: Path, *, heap: str = "512m") -> int:
    """Run TorchServe with that one model until it ends or SIGTERM comes; returns an exit code.

    A model that loads and answers wrongly, or fails to load, ends the pod at once with the reason as its last line:
    the rollout need not wait for a deadline to know.
    """
    from deployments.serving import TorchServe
    from deployments.serving_manifests import INFERENCE, METRICS
    from deployments.torchserve_launch import TorchServePorts, render_config, stop_torchserve, torchserve_command

    ports = TorchServePorts(inference=INFERENCE, management=INFERENCE + 1, metrics=METRICS)
    store = state / "store"  # TorchServe writes beside its models
    store.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(mar, store / mar.name)
    launch = torchserve_command(state, store, ports, models={model: mar.name}, heap=heap)
    config = render_config(model_store=store, ports=ports, models={model: mar.name}, bind="0.0.0.0", heap=heap)
    (state / "config.properties").write_text(with_settings(config, SETTINGS))
    if (SETTINGS / "log4j2.xml").is_file():
        shutil.copyfile(SETTINGS / "log4j2.xml", state / "log4j2.xml")
    (state / PROVED).unlink(missing_ok=True)  # of a container before this one
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    server = subprocess.Popen(launch.argv, env=launch.env, cwd=launch.cwd, start_new_session=True)
    url = f"http://127.0.0.1:{INFERENCE}"
    management = TorchServe(f"http://127.0.0.1:{ports.management}", url)
    wrong = prove(
        lambda: all_ready(url, model, label, golden),
        lambda: workers(management, model),
        state / "logs",
        server,
        told,
    )
    if not wrong:
        (state / PROVED).touch()
    while server.poll() is None and not told.is_set() and not wrong:
        told.wait(0.2)
    code = server.poll()
    stop_torchserve(server)
    if told.is_set():
        return 0
    print(wrong or f"TorchServe ended by itself with {code}", file=sys.stderr, flush=True)
    return GateRefused.exit_code if wrong else code or 1


def prove(
    ask: Callable[[], Answered],
    loading: Callable[[], set[int]],
    logs: Path,
    server: subprocess.Popen[bytes],
    told: threading.Event,
) -> str:
    """Ask until all is answered rightly; "" for that (or when it is over), else what is wrong and will stay so.

    `loading` gives the processes that are the model's workers now: one after another means that each one died.
    """
    from deployments.torchserve_launch import worker_error

    wrong, broken_since, seen = 0, 0.0, set[int]()
    while server.poll() is None and not told.wait(ASK_SECONDS):
        answered = ask()
        if answered.right:
            return ""
        wrong = wrong + 1 if answered.loaded else 0
        if wrong >= WRONG_ANSWERS:
            return f"the model answers wrongly: {answered.text}"
        if answered.loaded:
            continue
        now = loading()
        seen |= now
        if error := worker_error(logs):
            broken_since = broken_since or time.monotonic()
            if time.monotonic() - broken_since > BROKEN_SECONDS:
                return f"the model does not load: {error}"
        elif (dead := len(seen - now)) > WORKERS_DEAD:
            return f"the model does not load: {dead} worker processes died, without a Python error in their log"
    return ""


def workers(server: ModelServer, model: str) -> set[int]:
    """Process ids of the model's workers; none if the server does not say."""
    try:
        return {pid for version in server.versions(model) for pid in version.pids}
    except (StepError, ValueError, LookupError):
        return set()


def main(argv: list[str] | None = None) -> int:
    """The program; exit codes are those of the errors."""
    parser = argparse.ArgumentParser(prog="python -m deployments.serving_pod")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("fetch")
    one.add_argument("--mar", type=Path, required=True)
    one.add_argument("--sha256", required=True)
    one.add_argument("--golden", type=Path, required=True)
    one.add_argument("--count", type=int, default=5)
    one.add_argument("--to", type=Path, required=True)
    two = verbs.add_parser("serve")
    two.add_argument("--model", required=True)
    two.add_argument("--label", required=True)
    two.add_argument("--golden", type=Path, required=True)
    two.add_argument("--mar", type=Path, required=True)
    two.add_argument("--state", type=Path, required=True)
    two.add_argument("--heap", default=os.environ.get("REPRISE_HEAP", "512m"))
    three = verbs.add_parser("ready")
    three.add_argument("--url", default="http://127.0.0.1:8080")
    three.add_argument("--model", required=True)
    three.add_argument("--label", required=True)
    three.add_argument("--golden", type=Path, required=True)
    three.add_argument("--state", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        if args.verb == "fetch":
            fetch(args.mar, args.sha256, args.golden, args.count, args.to)
        elif args.verb == "serve":
            return serve(args.model, args.label, args.golden, args.mar, args.state, heap=args.heap)
        elif not (args.state / PROVED).exists():
            print("it has not answered all of its golden requests yet")
            return 1
        elif not (answered := ready(args.url, args.model, args.label, args.golden)).right:
            print(answered.text)
            return 1
    except StepError as error:
        print(f"serving_pod {args.verb}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
