"""Real pushes, told by real signed HTTP: what they start, at which commit, and what is refused."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.flows.forge_kit import FakeForge
from tests.flows.push_kit import HOOK, git, payload, signed
from tests.flows.triggers.laptop_kit import Project, Receiver, decided, pushed_runs, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_signed_push_retrains_at_exactly_that_commit(project: Project, receiver: Receiver) -> None:
    before, after = project.change("width = 16", "width = 8")
    body = payload(before, after, pusher={"name": "ada"})
    began = time.monotonic()
    assert receiver.post(body) == (202, "accepted")
    assert time.monotonic() - began < 2
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: receiver.post(body), range(100)))
    assert set(answers) == {(200, "duplicate")}
    entry = decided(project, after)
    assert (entry["state"], entry["action"], entry["reason"]) == (
        "started", "retrain", "[train.params] width changed",
    )  # fmt: skip
    project.wait(entry["flow_run"], "Completed")
    document = project.document(entry["flow_run"])
    assert (document["git_sha"], document["cause"]) == (after, "push")
    assert (project.prefect.run(entry["flow_run"]) or {})["name"].endswith(f"{after[:7]} push")
    assert len(pushed_runs(project, after)) == 1
    assert receiver.post(body) == (200, "duplicate")


def test_documentation_nothing_and_serving_no_training(project: Project, receiver: Receiver) -> None:
    before, after = project.change("Handwritten", "Written", "README.md")
    assert receiver.post(payload(before, after)) == (202, "accepted")
    assert decided(project, after)["state"] == "nothing"
    versions = project.versions()
    before, after = project.change("batch_size = 8", "batch_size = 4")
    assert receiver.post(payload(before, after)) == (202, "accepted")
    entry = decided(project, after)
    assert (entry["action"], entry["reason"]) == ("redeploy", "[serve] changed")
    project.wait(entry["flow_run"], "Completed")
    reused = {s["name"]: s["reused"] for s in project.document(entry["flow_run"])["steps"]}
    assert reused["train_model"] and reused["register_model"] and not reused["deploy_model"]
    assert project.versions() == versions


@pytest.mark.parametrize("way", ["hook", "receiver"])
def test_of_ten_pushes_within_a_minute_the_newest_counts(project: Project, receiver: Receiver, way: str) -> None:
    """Ten times `git push`, told by the shipped post-receive or over HTTP: the newest runs, and what had begun."""
    hook = project.bare / "hooks" / "post-receive"
    if way == "hook":
        git(project.bare, "config", "reprise.pipeline", str(project.folder / "pipeline.toml"))
        git(project.bare, "config", "reprise.command", f"{sys.executable} -m flows")
        hook.write_bytes(HOOK.read_bytes())
        hook.chmod(0o755)
    began, moves = time.monotonic(), []
    try:
        for n in range(10):
            before = project.head()
            project.change("\nwidth = ", f"\nten_{way}_{n} = {n}\nwidth = ", commit=False)
            git(project.work, "commit", "-qam", f"{n} of ten")
            moves.append((before, project.head()))
            done = subprocess.run(
                ["git", "push", "origin", "main"], cwd=project.work, capture_output=True, text=True, check=True
            )
            if way == "hook":
                assert f"ten_{way}_{n} changed; flow run" in done.stderr, done.stderr
            else:
                assert receiver.post(payload(*moves[-1])) == (202, "accepted")
    finally:
        hook.unlink(missing_ok=True)
    took = time.monotonic() - began
    assert took < 60
    newest = moves[-1][1]
    flow_run = decided(project, newest)["flow_run"]
    project.wait(flow_run, "Completed", seconds=300)
    assert project.document(flow_run)["git_sha"] == newest
    earlier = [run for _, after in moves[:-1] for run in pushed_runs(project, after)]
    ends = [project.wait(run["id"], "Completed", "Superseded", seconds=60) for run in earlier]
    print(f"{way}: ten pushes in {took:.0f} s; runs of the newest: 1, of the others: {ends}")
    assert len(pushed_runs(project, newest)) == 1
    assert ends.count("Completed") <= 1, "only what had begun"
    if way == "receiver":
        assert len(earlier) <= 3, "most of them were never asked for"


def test_forged_and_broken_ones_over_real_http(project: Project, receiver: Receiver) -> None:
    body = payload("a" * 40, "b" * 40)
    forged = {**signed(body), "X-Hub-Signature-256": "sha256=" + "0" * 64}
    assert receiver.post(body, forged) == (401, "refused")
    assert receiver.post(body, {"Content-Type": "application/json"}) == (401, "refused")
    assert receiver.post(body, {**signed(body), "Content-Type": "text/plain"}) == (415, "refused")
    assert receiver.post(b"{", signed(b"{")) == (400, "refused")
    big = b"x" * (10 << 20)
    # It may hang up on the sender in the middle of the ten megabytes: also a refusal.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError, urllib.error.URLError):
        assert receiver.post(big) == (413, "refused")
    assert receiver.post(payload("0" * 40, "c" * 40, ref="refs/tags/v1")) == (202, "ignored")


def test_the_decision_is_said_at_the_forge(project: Project, receiver: Receiver) -> None:
    """Pending while it trains, success with the decision when it is done, and documentation at once."""
    file = project.folder / "pipeline.toml"
    before_it = file.read_text()
    with FakeForge("gitea") as forge:
        receiver.kill()
        file.write_text(f'{before_it}\n[push.status]\nforge = "gitea"\nurl = "{forge.url}"\n')
        receiver.start()
        try:
            words = project.change("Written", "Scrawled", "README.md")
            assert receiver.post(payload(*words)) == (202, "accepted")
            trains = project.change("shift = 1", "shift = 2")
            assert receiver.post(payload(*trains)) == (202, "accepted")
            project.wait(decided(project, trains[1])["flow_run"], "Completed")
            until(lambda: forge.words() and forge.words()[-1][0] == "success", 30, "the end is said")
            said = [(s["state"], s["description"]) for s in forge.said if s["sha"] == trains[1]]
            assert said[0] == ("pending", "Retraining: [train.params] shift changed")
            assert said[-1] == ("success", "Retrained: [train.params] shift changed") and len(said) == 2
            assert [s["state"] for s in forge.said if s["sha"] == words[1]] == ["success"]
        finally:
            file.write_text(before_it)
            receiver.kill()
            receiver.start()
