"""A project read at one commit: revisions, files, digests, pointers; everything real, nothing pulled."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.errors import ConfigError, PreflightError
from flows.project import Project, Unsound
from tests.tasks.dvc_kit import MODULE, commit, copy_project, git, make_project


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "repo"
    root.mkdir()
    make_project(root)
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Iterator[Project]:
    yield Project(copy_project(template, tmp_path / "repo"))


@pytest.fixture
def sha(project: Project) -> str:
    return project.resolve("HEAD")


def test_revisions(project: Project, sha: str) -> None:
    git(project.root, "tag", "v1")
    assert project.resolve("main") == project.resolve("v1") == project.resolve(sha[:8]) == sha
    assert len(sha) == 40


@pytest.mark.parametrize(
    ("rev", "expected"),
    [
        ("mian", r"revision 'mian' does not exist in .*; did you mean 'main'\?; branches and tags: main"),
        ("HEAD~1", "does not exist"),
        ("HEAD:m.py", "does not exist"),
        ("--output=x", "begins with a dash"),
        ("-", "begins with a dash"),
        ("", "is none; expected a branch"),
        ("a\nb", "is none; expected a branch"),
    ],
)
def test_bad_revision(project: Project, rev: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        project.resolve(rev)


def test_no_repository_and_no_commit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        Project(tmp_path / "nowhere").resolve("HEAD")
    with pytest.raises(ConfigError, match="is in no git repository"):
        Project(tmp_path).resolve("HEAD")
    git(tmp_path, "init", "-q")
    with pytest.raises(ConfigError, match="has no commit yet"):
        Project(tmp_path).resolve("HEAD")


def test_a_hook_s_environment_does_not_lead_elsewhere(
    project: Project, sha: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert Project(project.folder).resolve("HEAD") == sha


def test_reads_the_commit_and_not_the_folder(project: Project, sha: str) -> None:
    (project.root / "m.py").write_text("other")
    assert project.read_text(sha, "m.py") == MODULE
    assert project.dirty(["m.py", "pipeline.toml"]) == ["m.py"]
    (project.root / "new name.py").write_text("x")
    assert project.dirty(["."]) == ["m.py", "new name.py"]
    assert project.dirty([]) == []


@pytest.mark.parametrize(("path", "expected"), [("mm.py", r"did you mean 'm.py'"), ("data", "no such file")])
def test_absent_file(project: Project, sha: str, path: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        project.read_text(sha, path)


def test_uncommitted_file_says_so(project: Project, sha: str) -> None:
    (project.root / "late.py").write_text("x")
    with pytest.raises(ConfigError, match=r"not in the commit: git add late\.py"):
        project.code_digest(sha, ["late.py"])


def test_text_that_is_none(project: Project) -> None:
    (project.root / "b.py").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="byte 0 is not UTF-8"):
        project.read_text(commit(project.root), "b.py")


def test_sha_is_checked_before_git_sees_it(project: Project) -> None:
    for bad in ("--help", "HEAD", "a" * 39, "g" * 40):
        with pytest.raises(ConfigError, match="no full sha"):
            project.read_text(bad, "m.py")


def test_code_digest_follows_content_and_name_only(project: Project, sha: str) -> None:
    first = project.code_digest(sha, ["m.py"])
    assert len(first) == 40
    (project.root / "other.txt").write_text("x")
    assert project.code_digest(commit(project.root), ["m.py"]) == first
    (project.root / "m.py").write_text("changed")
    changed = commit(project.root)
    assert project.code_digest(changed, ["m.py"]) != first
    assert project.changed(sha, changed) == ["m.py", "other.txt"]
    git(project.root, "mv", "m.py", "n.py")
    assert project.code_digest(commit(project.root), ["n.py"]) != project.code_digest(changed, ["m.py"])


def test_code_digest_of_a_folder_covers_what_is_below(project: Project, sha: str) -> None:
    package = project.root / "lib"
    package.mkdir()
    (package / "a.py").write_text("1")
    before = project.code_digest(commit(project.root), ["m.py", "lib"])
    (package / "a.py").write_text("2")
    assert project.code_digest(commit(project.root), ["m.py", "lib"]) != before


def test_symbolic_link_is_no_code(project: Project) -> None:
    (project.root / "link.py").symlink_to("/etc/passwd")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        project.code_digest(commit(project.root), ["link.py"])


def test_export_is_complete_or_not_there(project: Project, tmp_path: Path) -> None:
    (project.root / "lib").mkdir()
    (project.root / "lib" / "ä b.py").write_bytes(b"crlf\r\n\x00")
    (project.root / ".gitattributes").write_text("m.py export-ignore\n*.py text eol=lf\n")
    sha = commit(project.root)
    out = project.export_code(sha, ["m.py", "lib"], tmp_path / "code" / "x")
    assert (out / "m.py").read_text() == MODULE
    assert sorted(p.name for p in out.rglob("*.py")) == ["m.py", "ä b.py"]
    assert [p.name for p in out.parent.iterdir()] == ["x"]
    (out / "m.py").chmod(0o644)
    (out / "m.py").write_text("kept")
    assert (project.export_code(sha, ["m.py"], out) / "m.py").read_text() == "kept"
    with pytest.raises(ConfigError):
        project.export_code(sha, ["nothing.py"], tmp_path / "code" / "y")
    assert [p.name for p in out.parent.iterdir()] == ["x"]


def test_paths_stay_inside_the_repository(project: Project) -> None:
    assert project.in_repo("./data/../data/d") == "data/d"
    for path in ("../x", "/etc/passwd", "data/../../x"):
        with pytest.raises(ConfigError, match="points outside the repository"):
            project.in_repo(path)


def test_project_below_the_root(tmp_path: Path) -> None:
    folder = make_project(tmp_path, prefix="models/t", files=1)
    project = Project(folder)
    assert (project.prefix, project.in_repo("m.py")) == ("models/t", "models/t/m.py")
    assert project.in_repo("../x.py") == "models/x.py"
    sha = project.resolve("HEAD")
    pointer = project.data_pointer(sha, project.in_repo("data/d"))
    assert (pointer.path, pointer.dvc_root, pointer.remote) == ("models/t/data/d", "models/t", "store")
    out = project.export_code(sha, [project.in_repo("m.py")], tmp_path / "code")
    assert (out / project.prefix / "m.py").is_file()


def test_pointer_is_what_dvc_says(project: Project, sha: str) -> None:
    pointer = project.data_pointer(sha, "data/d")
    assert (pointer.nfiles, pointer.digest[32:], pointer.pointer_file) == (12, ".dir", "data/d.dvc")
    assert pointer.size == sum(p.stat().st_size for p in (project.root / "data" / "d").rglob("*.txt"))
    one = project.data_pointer(sha, "data/one.csv")
    assert (one.nfiles, len(one.digest)) == (1, 32)
    from dvc.repo import Repo

    with Repo(str(project.root)) as repo:
        assert repo.find_outs_by_path(str(project.root / "data/d"))[0].hash_info.value == pointer.digest


def test_pointer_of_a_stage(project: Project) -> None:
    entry = "    - path: made\n      hash: md5\n      md5: " + "a" * 32 + ".dir\n      size: 9\n      nfiles: 2\n"
    (project.root / "dvc.yaml").write_text("stages:\n  make:\n    cmd: x\n    wdir: data\n    outs:\n    - made\n")
    (project.root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  make:\n    cmd: x\n    outs:\n" + entry)
    pointer = project.data_pointer(commit(project.root), "data/made")
    assert (pointer.digest, pointer.pointer_file, pointer.nfiles) == ("a" * 32 + ".dir", "dvc.lock", 2)


def test_pointer_file_of_another_name(project: Project) -> None:
    git(project.root, "mv", "data/d.dvc", "data/renamed.dvc")
    assert project.data_pointer(commit(project.root), "data/d").pointer_file == "data/renamed.dvc"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("data/e", r"data/e@\w{7}: DVC does not track it in this commit; tracked are: data/d, data/one.csv; check"),
        ("data/d/train", r"DVC tracks data/d as a whole.*set \[data\] path to data/d"),
        ("m.py", r"does not track it.*dvc add m.py"),
    ],
)
def test_what_dvc_does_not_track(project: Project, sha: str, path: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        project.data_pointer(sha, path)


def test_output_outside_the_repository(project: Project) -> None:
    (project.root / "data" / "x.dvc").write_text(f"outs:\n- md5: {'a' * 32}\n  hash: md5\n  path: ../../x\n")
    with pytest.raises(ConfigError, match=r"data/x.dvc@\w+: its output '../../x' points outside the repository"):
        project.data_pointer(commit(project.root), "data/x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("outs:\n- md5: zz\n  hash: md5\n  path: d\n", "has md5 'zz'; expected 32 hex digits"),
        ("outs:\n- path: d\n", "has md5 None"),
        (f"outs:\n- md5: {'a' * 32}\n  path: d\n", "hash of DVC 2"),
        ("outs: [\n", r"data/d.dvc:2: expected the YAML that DVC writes"),
        ("- x\n", r"data/d.dvc:1: expected the YAML that DVC writes, found list"),
    ],
)
def test_damaged_pointer(project: Project, text: str, expected: str) -> None:
    (project.root / "data" / "d.dvc").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        project.data_pointer(commit(project.root), "data/d")


def test_no_dvc_folder(project: Project) -> None:
    git(project.root, "rm", "-rq", ".dvc")
    with pytest.raises(ConfigError, match=r"no \.dvc folder.*dvc init"):
        project.data_pointer(commit(project.root), "data/d")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("", r"no default remote.*dvc remote add --default storage URL"),
        ("['remote \"a\"']\nurl = x\n", r"no default remote.*dvc remote default a"),
        ("[core]\nremote = b\n['remote \"a\"']\nurl = x\n", r"remote 'b' is not described; known: a"),
        (
            "[core]\nremote = a\n['remote \"a\"']\nurl = x\n",
            r"verify = false; expected true.*dvc remote modify a verify true",
        ),
        ("[core]\nremote = a\n['remote \"a\"']\nurl = x\nverify = false\n", "dvc remote modify a verify true"),
    ],
)
def test_remote_unfit(
    project: Project, config: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path))
    (project.root / ".dvc" / "config").write_text(config)
    with pytest.raises(PreflightError, match=expected) as caught:
        project.data_pointer(commit(project.root), "data/d")
    assert caught.value.exit_code == 3


def test_the_machine_s_own_config_lies_over_the_commit_s(project: Project) -> None:
    (project.root / ".dvc" / "config").write_text("[core]\nremote = a\n['remote \"a\"']\nurl = x\n")
    sha = commit(project.root)
    (project.root / ".dvc" / "config.local").write_text("['remote \"a\"']\nurl = /y\nverify = true\n")
    assert project.data_pointer(sha, "data/d").remote_url == "/y"


def test_nothing_is_pulled_or_written(project: Project, sha: str) -> None:
    shutil.rmtree(project.root / ".remote")
    shutil.rmtree(project.root / ".dvc" / "cache")
    before = sorted(str(p) for p in project.root.rglob("*") if ".git/" not in str(p))
    project.data_pointer(sha, "data/d")
    assert sorted(str(p) for p in project.root.rglob("*") if ".git/" not in str(p)) == before


def test_a_damaged_file_is_not_taken_for_one_that_is_not_there(project: Project) -> None:
    """git says "missing" of both."""
    sha = project.resolve("HEAD")
    assert project.blobs(sha, ["m.py", "nowhere.py"])["nowhere.py"] is None
    blob = project._git("rev-parse", f"{sha}:m.py").stdout.decode().strip()
    loose = project.root / ".git" / "objects" / blob[:2] / blob[2:]
    loose.chmod(0o644)
    loose.write_bytes(b"damaged")
    with pytest.raises(Unsound, match=r"git cannot read m\.py@.*expected a sound repository: git fsck"):
        project.blobs(sha, ["m.py", "nowhere.py"])
