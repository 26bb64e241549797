"""What the tests of pushes share: a Prefect that only remembers, repositories, signed requests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from flows.example import create_project
from tests.loopback_kit import JsonHandler, LoopbackFake

SECRET = b"0123456789abcdef0123456789abcdef"
SIGNING_TOKEN = b"whsec_" + base64.b64encode(SECRET)
HOOK = Path(__file__).resolve().parents[2] / "deployments" / "hooks" / "post-receive"


class FakePrefect(LoopbackFake):
    """The few routes that handing over uses, with Prefect's own rule for idempotency keys.

    A fake; tests/flows/triggers uses the real server.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, dict[str, Any]] = {}
        self.keys: dict[str, str] = {}
        self.asked = 0  # create_flow_run requests
        self.drop_answers = 0  # how many of them are carried out and then not answered
        self.deployed = True
        self.lock = threading.Lock()

    def handler(self) -> type[JsonHandler]:
        fake = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/api/deployments/name/") and not fake.deployed:
                    return self.answer(404, {"detail": "Deployment not found"})
                if self.path.startswith("/api/flow_runs/"):
                    run = fake.runs.get(self.path.split("/")[3])
                    return self.answer(200, run) if run else self.answer(404, {"detail": "Flow run not found"})
                return self.answer(200, {"id": "deployment-1", "name": "laptop"})

            def do_POST(self) -> None:
                body = self.body()
                with fake.lock:
                    if self.path.endswith("/create_flow_run"):
                        self._create(body)
                    elif self.path == "/api/flow_runs/filter":
                        self._filter(body)
                    elif self.path.endswith("/set_state"):
                        run = fake.runs[self.path.split("/")[3]]
                        run["state"] = body["state"]
                        self.answer(201, {"status": "ACCEPT"})
                    else:
                        self.answer(201, [] if self.path.endswith("/filter") else {"id": "made-1"})

            def _create(self, body: dict[str, Any]) -> None:
                fake.asked += 1
                key = body["idempotency_key"]
                if key not in fake.keys:
                    fake.keys[key] = f"run-{len(fake.keys) + 1}"
                    fake.runs[fake.keys[key]] = {"id": fake.keys[key], **body}
                if fake.drop_answers:
                    fake.drop_answers -= 1
                    self.close_connection = True
                    return
                self.answer(201, fake.runs[fake.keys[key]])

            def _filter(self, body: dict[str, Any]) -> None:
                wanted = body["flow_runs"]["state"]["type"]["any_"]
                tags = set(body["flow_runs"].get("tags", {}).get("all_", []))
                found = [r for r in fake.runs.values() if r["state"]["type"] in wanted and tags <= set(r["tags"])]
                self.answer(200, found)

        return Handler

    def started(self) -> list[tuple[str, str]]:
        """(commit, state) of each run, in the order they were asked for."""
        return [(r["parameters"]["rev"], r["state"]["type"]) for r in self.runs.values()]


def git(folder: Path, *arguments: str) -> str:
    fixed = ("-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "core.hooksPath=/dev/null")
    done = subprocess.run(["git", *fixed, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
    return done.stdout.strip()


class Repositories:
    """A bare repository, a developer's clone that pushes to it, and Reprise's checkout that fetches from it."""

    def __init__(self, root: Path, port: int, *, template: Path) -> None:
        shutil.copytree(template, root, dirs_exist_ok=True, symlinks=True)
        self.bare, self.work, self.checkout = root / "digits.git", root / "work", root / "checkout"
        ports = "\n".join(f"{n} = {port + i}" for i, n in enumerate(("prefect", "mlflow", "inference", "management")))
        (self.checkout / "laptop.toml").write_text(f'[place]\nkind = "laptop"\n[ports]\n{ports}\n')

    @staticmethod
    def make_template(root: Path) -> Path:
        """The three of them, made once: DVC takes its time."""
        work = root / "work"
        create_project("digits", work)
        push = '[push]\nrepository = "acme/digits"\nsettle = "0s"\n'
        (work / "pipeline.toml").write_text(f"{(work / 'pipeline.toml').read_text()}\n{push}")
        (work / "notes.md").write_text("# Digits\n")
        for data in ("data/digits", ".dvc-remote", ".dvc/cache", ".dvc/tmp"):  # pointers are enough to decide
            shutil.rmtree(work / data, ignore_errors=True)
        git(work, "add", "-A")
        git(work, "commit", "-qm", "pushes")
        git(root, "clone", "-q", "--bare", "work", "digits.git")
        git(work, "remote", "add", "origin", "../digits.git")
        git(root, "clone", "-q", "digits.git", "checkout")
        git(root / "checkout", "remote", "set-url", "origin", "../digits.git")
        return root

    def install_hook(self) -> None:
        """The shipped post-receive, in the bare repository."""
        hook = self.bare / "hooks" / "post-receive"
        hook.write_bytes(HOOK.read_bytes())
        hook.chmod(0o755)

    def head(self, rev: str = "HEAD") -> str:
        return git(self.work, "rev-parse", rev)

    def edit(self, old: str, new: str, file: str = "pipeline.toml") -> tuple[str, str]:
        """Change a file, commit and push it; (before, after)."""
        before = self.head()
        text = (self.work / file).read_text()
        assert old in text
        (self.work / file).write_text(text.replace(old, new))
        git(self.work, "commit", "-qam", f"{old} -> {new}")
        git(self.work, "push", "-q", "--force", "origin", "HEAD")
        return before, self.head()


def payload(
    before: str, after: str, *, ref: str = "refs/heads/main", repository: str = "acme/digits", **more: Any
) -> bytes:
    """A push as GitHub and Gitea send it, the parts that are read."""
    body = {"ref": ref, "before": before, "after": after, "repository": {"full_name": repository}, **more}
    return json.dumps(body).encode()


def signed(body: bytes, secret: bytes = SECRET, *, event: str = "push", forge: str = "github") -> dict[str, str]:
    """The headers that each forge sends with this body."""
    digest, weak = (hmac.new(secret, body, h).hexdigest() for h in (hashlib.sha256, hashlib.sha1))
    hub = {"X-GitHub-Event": event, "X-Hub-Signature": f"sha1={weak}", "X-Hub-Signature-256": f"sha256={digest}"}
    gogs = {"X-Gogs-Event": event, "X-Gogs-Event-Type": event, "X-Gogs-Signature": digest}
    gitea = {"X-Gitea-Event": event, "X-Gitea-Event-Type": event, "X-Gitea-Signature": digest}
    delivered, when = "4c4e1bd8-1f7a-4a2e-9d7c-2b6c1f0e9a11", "1795513546"
    gitlab = {"X-Gitlab-Event": "Push Hook", "X-Gitlab-Event-UUID": delivered, "Idempotency-Key": delivered}
    own = {
        "github": {"User-Agent": "GitHub-Hookshot/1", "X-GitHub-Delivery": delivered, "X-GitHub-Hook-ID": "1", **hub},
        "gitea": {"X-Gitea-Delivery": delivered, "X-GitHub-Delivery": delivered, **gitea, **gogs, **hub},
        "forgejo": {"X-Forgejo-Event": event, "X-Forgejo-Signature": digest, **gitea, **gogs, **hub},
        "gitlab": {**gitlab, "X-Gitlab-Token": secret.decode()},
        "gitlab, signed": {
            **gitlab,
            "webhook-id": delivered,
            "webhook-timestamp": when,
            "webhook-signature": standard_signature(secret, delivered, when, body) if b"whsec_" in secret else "",
        },
    }[forge]
    return {"Content-Type": "application/json", **own}


def standard_signature(secret: bytes, identity: str, when: str, body: bytes) -> str:
    """As the Standard Webhooks specification makes it, which GitLab follows."""
    key = base64.b64decode(secret.removeprefix(b"whsec_"))
    digest = hmac.new(key, f"{identity}.{when}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"
