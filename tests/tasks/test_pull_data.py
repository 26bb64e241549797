"""Real DVC on a real repository: what is pulled is what the commit says, or the step says which file is not and why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from deployments.errors import ConfigError, GiveUp, PreflightError, StepError, TryAgain
from flows.project import Project
from tasks.pull_data import PulledData, PullRequest, pull_data
from tests.tasks.dvc_kit import commit, copy_project, dvc, git, make_project

pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep.value:DeprecationWarning")  # pygtrie's, called by DVC
SHELL = "import json, sys; from tasks.pull_data import *; "
TAKE = "r = pull_data(PullRequest(**json.loads(sys.argv[1]))); print(json.dumps(vars(r)))"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "repo"
    root.mkdir()
    return make_project(root)


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Iterator[Path]:
    yield copy_project(template, tmp_path / "repo")


def request_for(root: Path, path: str = "data/d", sha: str = "", folder: Path | None = None) -> PullRequest:
    """A request for the newest commit, state below `folder` or the project."""
    project, state = Project(root), (folder or root) / ".reprise"
    sha = sha or project.resolve("HEAD")
    pointer = project.data_pointer(sha, path)
    splits = ("train", "heldout") if pointer.digest.endswith(".dir") else (Path(path).name, Path(path).name)
    return PullRequest(
        repo=str(root),
        sha=sha,
        path=path,
        digest=pointer.digest,
        cache=str(state / "cache"),
        folder=str(state / "data"),
        train=splits[0],
        heldout=splits[1],
    )


def objects(folder: Path, *, listing: bool = False) -> list[Path]:
    """Objects of a cache or a remote: of files, or of folders' listings."""
    return sorted(p for p in folder.rglob("files/md5/*/*") if p.name.endswith(".dir") is listing)


def alter(path: Path, *, mode: int = 0o444) -> str:
    """Other bytes of the same length under the same name; returns their md5."""
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    path.chmod(mode)
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def nothing_half_done(request: PullRequest) -> bool:
    """Neither data nor the leavings of a pull."""
    return not [p.name for p in Path(request.folder).iterdir() if p.name != "locks"]


def whole(result: PulledData, root: Path) -> bool:
    """Whether the pulled folder has exactly the bytes that were given to DVC."""
    given, pulled = root / "data" / "d", Path(result.folder)
    names = {p.relative_to(given) for p in given.rglob("*.txt")}
    return names == {p.relative_to(pulled) for p in pulled.rglob("*.txt")} and all(
        (given / n).read_bytes() == (pulled / n).read_bytes() for n in names
    )


def test_first_again_and_from_the_cache(root: Path) -> None:
    request = request_for(root)
    first = pull_data(request)
    assert whole(first, root)
    assert (first.files, first.folder) == (12, f"{request.folder}/{request.digest}")
    assert first.bytes == first.fetched_bytes == sum(p.stat().st_size for p in (root / "data/d").rglob("*.txt"))
    again = pull_data(request)
    assert replace(again, seconds=0, fetched_bytes=0) == replace(first, seconds=0, fetched_bytes=0)
    assert again.fetched_bytes == 0
    shutil.rmtree(request.folder)
    shutil.rmtree(root / ".remote")
    (root / ".remote").mkdir()
    cached = pull_data(request)
    assert whole(cached, root) and cached.fetched_bytes == 0
    assert git(root, "status", "--porcelain") == ""


def test_a_commit_s_own_data_and_only_what_is_new_is_fetched(root: Path) -> None:
    before = request_for(root)
    file = root / "data/d/train/new.txt"
    dvc(root, ["unprotect", "-q", "data/d"])
    file.write_text("new")
    dvc(root, ["add", "-q", "data/d"], ["push", "-q"])
    after = request_for(root, sha=commit(root))
    old = pull_data(before)
    new = pull_data(after)
    assert (old.files, new.files, new.fetched_bytes) == (12, 13, 3)
    assert old.digest != new.digest and old.heldout_digest == new.heldout_digest
    assert whole(new, root) and not (Path(old.folder) / "train/new.txt").exists()


def test_a_single_file(root: Path) -> None:
    result = pull_data(request_for(root, "data/one.csv"))
    assert (Path(result.folder) / "one.csv").read_text() == "a,b\n1,2\n"
    assert (result.files, result.bytes) == (1, 8)


def test_a_project_below_the_root_with_a_remote_relative_to_it(tmp_path: Path) -> None:
    root = tmp_path / "repo"
    root.mkdir()
    folder = make_project(root, prefix="a/b", files=1)
    assert (folder / ".remote").is_dir()
    assert pull_data(request_for(root, "a/b/data/d")).files == 2


@pytest.mark.parametrize("mode", [0o444, 0o644])
def test_tampered_object_in_the_remote(root: Path, mode: int) -> None:
    request = request_for(root)
    bad = next(p for p in objects(root / ".remote") if b"heldout 3" in p.read_bytes())
    expected, found = bad.parent.name + bad.name, alter(bad, mode=mode)
    with pytest.raises(GiveUp) as caught:
        pull_data(request)
    message = str(caught.value)
    assert f"data/d/heldout/3.txt: expected md5 {expected}, found md5 {found} (altered)" in message
    assert "dvc push" in message and str(root / ".remote") in message and "heldout/4" not in message
    assert nothing_half_done(request)


def test_missing_objects_in_the_remote(root: Path) -> None:
    request = request_for(root)
    for path in objects(root / ".remote"):
        path.unlink()
    with pytest.raises(
        GiveUp, match=r"data/d/heldout/0.txt: expected md5 \w{32}, found nothing \(missing\).* and 9 more"
    ):
        pull_data(request)
    assert nothing_half_done(request)


def test_tampered_single_file(root: Path) -> None:
    request = request_for(root, "data/one.csv")
    alter(next(p for p in objects(root / ".remote") if p.read_bytes().startswith(b"a,b")))
    with pytest.raises(GiveUp, match=rf": data/one.csv: expected md5 {request.digest}, found md5"):
        pull_data(request)


@pytest.mark.parametrize("how", ["altered", "missing"])
def test_listing_of_the_remote(root: Path, how: str) -> None:
    request = request_for(root)
    for path in objects(root / ".remote", listing=True):
        alter(path) if how == "altered" else path.unlink()
    with pytest.raises(
        GiveUp, match=rf"data/d \(the list of its files\): expected md5 {request.digest}, found .*{how}"
    ):
        pull_data(request)
    assert nothing_half_done(request)


def test_repaired_remote_needs_no_other_repair(root: Path) -> None:
    request = request_for(root)
    shutil.copytree(root / ".remote", root / ".reprise/keep")
    alter(objects(root / ".remote")[0])
    with pytest.raises(GiveUp):
        pull_data(request)
    shutil.rmtree(root / ".remote")
    shutil.copytree(root / ".reprise/keep", root / ".remote")
    assert whole(pull_data(request), root)


@pytest.mark.parametrize("listing", [False, True])
def test_damaged_object_of_the_own_cache_is_fetched_again(root: Path, listing: bool) -> None:
    request = request_for(root)
    pull_data(request)
    shutil.rmtree(request.folder)
    alter(objects(Path(request.cache), listing=listing)[0])
    assert whole(pull_data(request), root)


def test_damaged_pulled_data_is_pulled_again(root: Path) -> None:
    request = request_for(root)
    first = pull_data(request)
    alter(Path(first.folder) / "train/0.txt")
    assert whole(pull_data(request), root)
    (Path(first.folder) / "train/1.txt").unlink()
    assert whole(pull_data(request), root)
    (Path(first.folder) / "train/stranger.txt").write_text("x")
    assert whole(pull_data(request), root)


def test_remote_that_is_away(root: Path) -> None:
    request = request_for(root)
    (root / ".remote").rename(root / ".reprise.away")
    with pytest.raises(
        PreflightError, match=r"remote 'store' at .*\.remote: no such folder.*dvc remote modify store url"
    ):
        pull_data(request)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("x", "Unreachable: remote 'store' at s3://bucket/x: cannot be reached"),
        ("", "PreflightError: remote 'store' at s3://bucket/x: access denied: Unable to locate credentials"),
    ],
)
def test_remote_without_answer_or_without_credentials(root: Path, keys: str, expected: str, tmp_path: Path) -> None:
    config = root / ".dvc" / "config"
    config.write_text(
        config.read_text().replace("../.remote", "s3://bucket/x") + "    endpointurl = http://127.0.0.1:9\n"
    )
    environment = {"AWS_ACCESS_KEY_ID": keys, "AWS_SECRET_ACCESS_KEY": keys, "AWS_MAX_ATTEMPTS": "1"}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    code, said = in_process(request_for(root, sha=commit(root)), environment=environment)
    assert code == 1
    assert expected in said, said


def test_remote_that_does_not_verify(root: Path) -> None:
    request = request_for(root)
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace("verify = true", "verify = false"))
    with pytest.raises(PreflightError, match="dvc remote modify store verify true"):
        pull_data(replace(request, sha=commit(root)))


def test_credentials_of_the_machine_are_used(root: Path) -> None:
    config = root / ".dvc" / "config"
    config.write_text(config.read_text().replace("../.remote", "../.nowhere"))
    (root / ".dvc" / "config.local").write_text("['remote \"store\"']\n    url = ../.remote\n")
    assert pull_data(request_for(root, sha=commit(root))).files == 12


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        ({"sha": "--help"}, ConfigError, "expected a full commit sha"),
        ({"sha": "0" * 40}, GiveUp, "git checkout failed"),
        ({"path": "../x"}, ConfigError, "expected a path inside the repository"),
        ({"path": "/etc"}, ConfigError, "expected a path inside the repository"),
        ({"path": "data/e"}, ConfigError, "DVC does not track it"),
        ({"digest": "../x"}, ConfigError, "expected DVC's md5"),
        ({"digest": "a" * 32 + ".dir"}, ConfigError, "expected a{32}.dir, as planned"),
        ({"train": "training"}, ConfigError, r"split 'training': .* expected one of: heldout, train"),
        ({"heldout": "held"}, ConfigError, r"split 'held'"),
        ({"repo": "/nowhere/at/all"}, ConfigError, "/nowhere/at/all: no such folder"),
    ],
)
def test_bad_request(root: Path, change: dict[str, str], kind: type[StepError], expected: str) -> None:
    with pytest.raises(kind, match=expected) as caught:
        pull_data(replace(request_for(root), **change))
    assert not isinstance(caught.value, TryAgain)


def test_listing_that_leads_outside(root: Path) -> None:
    request = request_for(root)
    entries = [{"md5": "a" * 32, "relpath": "../../escaped.txt"}]
    text = json.dumps(entries)
    digest = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
    target = root / ".remote/files/md5" / digest[:2] / f"{digest[2:]}.dir"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    pointer = root / "data/d.dvc"
    pointer.write_text(pointer.read_text().replace(request.digest, f"{digest}.dir"))
    evil = replace(request, sha=commit(root), digest=f"{digest}.dir")
    with pytest.raises(GiveUp, match=r"names '../../escaped.txt', outside the data"):
        pull_data(evil)
    assert not list(root.rglob("escaped.txt"))


def in_process(request: PullRequest, before: str = "", environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Pull in a process of its own; returns the exit code and all that it said."""
    command = [sys.executable, "-c", SHELL + before + TAKE, json.dumps(asdict(request))]
    done = subprocess.run(command, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


KILL = "os.kill(os.getpid(), 9)"
KILLED_AT = {
    "cloning": "import tasks.dvc_clone as c; c._git = lambda *a: {kill}; ",
    "some objects are here": (
        "import itertools; n = itertools.count(); cache = '.reprise/cache/files/md5/'; "
        "sys.addaudithook(lambda e, a: {kill} if e in ('os.rename', 'os.link') and cache in str(a[1]) and next(n) == 5 "
        "else None); "
    ),
    "fetched": "import dvc.repo as r; r.Repo.checkout = lambda *a, **k: {kill}; ",
    "checked out": "import tasks.pull_data as p; p.wrong_files = lambda *a, **k: {kill}; ",
    "verified": "import tasks.pull_data as p; p.seal = lambda *a: {kill}; ",
    "sealed": "o = Path.rename; Path.rename = lambda s, t: {kill} if str(t).endswith('.dir') else o(s, t); ",
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_killed_and_run_again(root: Path, moment: str) -> None:
    request = request_for(root)
    code, said = in_process(request, "import os; " + KILLED_AT[moment].format(kill=KILL))
    assert code == -9, said
    assert not Path(request.folder, request.digest).exists()
    assert whole(pull_data(request), root)
    assert sorted(p.name for p in Path(request.folder).iterdir()) == [
        request.digest,
        f"{request.digest}.sealed.json",
        "locks",
    ]


def test_two_at_once(root: Path) -> None:
    other = copy_project(root, root.parent / "other")
    same = request_for(root)
    elsewhere = replace(request_for(other), cache=same.cache)  # two runs of two projects on one cache
    requests = [same, same, elsewhere]
    processes = [
        subprocess.Popen([sys.executable, "-c", SHELL + TAKE, json.dumps(asdict(r))], stdout=subprocess.PIPE, text=True)
        for r in requests
    ]
    results = [PulledData(**json.loads(p.communicate(timeout=60)[0].splitlines()[-1])) for p in processes]
    assert all(whole(r, root) for r in results)
    assert len({r.heldout_digest for r in results}) == 1


def test_progress_and_the_program(root: Path, tmp_path: Path) -> None:
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps(asdict(request_for(root))))
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-m",
        "tasks.step",
        "pull_data",
        str(request),
        str(result),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pull_data: 12/12 files verified" in done.stderr
    assert json.loads(result.read_text())["result"]["files"] == 12


def test_import_stays_cheap() -> None:
    program = "import sys, tasks.pull_data; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"dvc", "dvc_data", "fsspec", "prefect", "torch", "yaml", "pydantic"} & set(loaded)
