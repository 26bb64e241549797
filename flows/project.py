"""The user's git repository, read at one commit without touching its working tree: revisions, files, digests.

    project = Project(Path("demo"))
    sha = project.resolve("HEAD")
    pointer = project.data_pointer(sha, project.in_repo("data/digits"))

Every path that a method takes or gives is relative to the repository's root, with forward slashes; `in_repo` makes one
from a path that is relative to the project folder. git is run by fixed arguments, never through a shell, and nothing
from outside can become an option. Not covered: pulling data (tasks.pull_data), changes inside a data folder that nobody
has given to `dvc add`.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from deployments.errors import ConfigError, PreflightError
from flows.data_pointer import DataPointer as DataPointer
from flows.data_pointer import read_pointer

_SHA = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_ENTRY = re.compile(rb"(\d{6}) (\w+) ([0-9a-f]+)\t(.*)", re.DOTALL)


class Unsound(ConfigError):
    """git cannot read what the repository has to have: a matter of this machine, not of a commit."""


class Project:
    """A project folder: the folder of pipeline.toml, the root of a git repository or a folder below it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    @cached_property
    def root(self) -> Path:
        """The repository's root. Raises ConfigError if the folder is in no git repository."""
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: no such folder; expected the project folder, a git repository with DVC")
        found = self._run("rev-parse", "--show-toplevel", cwd=self.folder)
        if found.returncode:
            said = found.stderr.decode(errors="replace").strip()
            if "not a git repository" in said:
                raise ConfigError(
                    f"{self.folder}: is in no git repository; expected one, because a run is of a commit; "
                    "make it: git init && git add . && git commit"
                )
            raise ConfigError(f"{self.folder}: git refuses this repository: {said}")
        return Path(os.fsdecode(found.stdout.rstrip(b"\n")))

    @cached_property
    def prefix(self) -> str:
        """The project folder below the root: "" or "models/digits"."""
        inside = self.folder.resolve().relative_to(self.root.resolve()).as_posix()
        return "" if inside == "." else inside

    def in_repo(self, path: str) -> str:
        """A path relative to the project folder, made relative to the root. Raises ConfigError if it leads outside."""
        inside = os.path.normpath(os.path.join(self.prefix, path))
        if os.path.isabs(path) or inside == ".." or inside.startswith("../"):
            raise ConfigError(
                f"{path!r} points outside the repository {self.root}; expected a path inside it, "
                "because a run is of a commit; move the file or the data into the repository"
            )
        return inside

    def resolve(self, rev: str) -> str:
        """The full sha of a revision. Raises ConfigError for one that does not exist or looks like an option."""
        if rev.startswith("-"):
            raise ConfigError(
                f"revision {rev!r} begins with a dash; expected a branch, a tag or a commit, such as HEAD or main"
            )
        if not rev or not rev.isprintable():
            raise ConfigError(f"revision {rev!r} is none; expected a branch, a tag or a commit, such as HEAD or main")
        found = self._git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
        if found.returncode == 0:
            return found.stdout.decode().strip()
        if self._git("rev-parse", "--verify", "--quiet", "HEAD").returncode:
            raise ConfigError(f"{self.root}: has no commit yet; make the first one: git add . && git commit")
        names = (
            self._git("for-each-ref", "--format=%(refname:short)", "refs/heads", "refs/tags").stdout.decode().split()
        )
        import difflib

        near = difflib.get_close_matches(rev, names, n=1)
        raise ConfigError(
            f"revision {rev!r} does not exist in {self.root}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f"; branches and tags: {', '.join(names[:8])}; fetch it first if it is a remote's: git fetch"
        )

    def read_text(self, sha: str, path: str) -> str:
        """A file as it is in the commit. Raises ConfigError if the commit does not have it or it is no text."""
        blob = self.blobs(sha, [path])[path]
        if blob is None:
            raise ConfigError(self._absent(sha, path))
        try:
            return blob.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}@{sha[:7]}: byte {error.start} is not UTF-8; expected UTF-8 text") from None

    def code_digest(self, sha: str, files: Sequence[str]) -> str:
        """40 hex digits over names and git blob ids of files and of what is below folders. Raises ConfigError."""
        entries = sorted(self._entries(sha, files).items())
        return hashlib.sha256(repr(entries).encode()).hexdigest()[:40]

    def export_code(self, sha: str, files: Sequence[str], destination: Path) -> Path:
        """Write the commit's files below `destination`, complete or not at all; one that is there is kept."""
        if destination.is_dir():
            return destination
        entries = self._entries(sha, files)
        blobs = self.blobs(sha, list(entries))
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        try:
            for name in entries:
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(blobs[name] or b"")
                target.chmod(0o444)
            aside.chmod(0o755)
            try:
                aside.rename(destination)
            except OSError:
                if not destination.is_dir():  # otherwise another run was first with the same content
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return destination

    def data_pointer(self, sha: str, path: str) -> DataPointer:
        """What DVC says about `path` in the commit, nothing pulled. Raises ConfigError and PreflightError."""
        return read_pointer(self, sha, path)

    def dirty(self, paths: Sequence[str]) -> list[str]:
        """Files below `paths` with changes that no commit has, and that a run will therefore not see."""
        if not paths:
            return []
        done = self._checked("status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--", *paths)
        return sorted(os.fsdecode(line[3:]) for line in done.split(b"\0") if line)

    def changed(self, sha_a: str, sha_b: str) -> list[str]:
        """Files that differ between two commits."""
        _check_sha(sha_a)
        _check_sha(sha_b)
        done = self._checked("diff", "--name-only", "--no-renames", "-z", sha_a, sha_b, "--")
        return sorted(os.fsdecode(name) for name in done.split(b"\0") if name)

    def files(self, sha: str) -> list[str]:
        """All files of the commit."""
        _check_sha(sha)
        done = self._checked("ls-tree", "-r", "-z", "--name-only", "--full-tree", sha)
        return [os.fsdecode(name) for name in done.split(b"\0") if name]

    def blobs(self, sha: str, paths: Sequence[str]) -> dict[str, bytes | None]:
        """Contents of files in the commit, None for what is no file there; one git process for all. Raises Unsound."""
        _check_sha(sha)
        paths = [p for p in paths if "\n" not in p]
        asked = b"".join(os.fsencode(f"{sha}:{path}\n") for path in paths)
        answer = self._checked("cat-file", "--batch", stdin=asked)
        found: dict[str, bytes | None] = {}
        at = 0
        for path in paths:
            end = answer.index(b"\n", at)
            header = answer[at:end].rsplit(b" ", 2)
            at = end + 1
            found[path] = None
            if len(header) == 3 and header[2].isdigit():
                size = int(header[2])
                found[path] = answer[at : at + size] if header[1] == b"blob" else None
                at += size + 1
        self._not_damaged(sha, [path for path in paths if found[path] is None])
        return found

    def _not_damaged(self, sha: str, missing: Sequence[str]) -> None:
        """git says "missing" of a file that a commit does not have, and of one that it has and cannot be read."""
        there = self._checked("ls-tree", "-z", "--full-tree", sha, "--", *missing) if missing else b""
        for line in filter(None, there.split(b"\0")):
            match = _ENTRY.fullmatch(line)
            if match and match[2] == b"blob":
                raise Unsound(
                    f"{self.root}: git cannot read {os.fsdecode(match[4])}@{sha[:7]}; expected a sound repository: "
                    "git fsck; what is damaged comes back from a fresh clone"
                )

    def _entries(self, sha: str, files: Sequence[str]) -> dict[str, str]:
        """path -> blob id, of files and of everything below folders."""
        _check_sha(sha)
        done = self._checked("ls-tree", "-r", "-z", "--full-tree", sha, "--", *files)
        entries: dict[str, str] = {}
        for line in filter(None, done.split(b"\0")):
            match = _ENTRY.fullmatch(line)
            if match is None:
                raise ConfigError(f"{self.root}: git ls-tree answered {line!r}; expected mode, type, id and path")
            name = os.fsdecode(match[4])
            if match[1] not in (b"100644", b"100755"):
                kind = "a symbolic link" if match[1] == b"120000" else "a submodule"
                raise ConfigError(f"{name}@{sha[:7]}: is {kind}; expected a file; name or copy the file itself")
            entries[name] = match[3].decode()
        for file in files:
            if file not in entries and not any(name.startswith(f"{file}/") for name in entries):
                raise ConfigError(self._absent(sha, file))
        return entries

    def _absent(self, sha: str, path: str) -> str:
        import difflib

        there = (self.root / path).exists()
        near = difflib.get_close_matches(path, self.files(sha), n=1)
        fix = f"; it is in the folder, not in the commit: git add {path} && git commit" if there else ""
        fix = fix or (f"; did you mean {near[0]!r}?" if near else "; expected a file of the repository")
        return f"{path}@{sha[:7]}: the commit has no such file{fix}"

    def _git(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return self._run(*arguments, cwd=self.root, stdin=stdin)

    def _checked(self, *arguments: str, stdin: bytes = b"") -> bytes:
        done = self._git(*arguments, stdin=stdin)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise Unsound(f"{self.root}: git {arguments[0]} failed: {said}; expected a sound repository: git fsck")
        return done.stdout

    @staticmethod
    def _run(*arguments: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        # A git hook sets GIT_DIR and the like: they would make us read another repository than the folder's own.
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GIT_") or k.startswith("GIT_CONFIG_")}
        environment = {**kept, "LC_ALL": "C", "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
        command = ["git", "--no-pager", "--literal-pathspecs", *arguments]
        try:
            return subprocess.run(command, cwd=cwd, input=stdin, env=environment, capture_output=True, check=False)
        except FileNotFoundError:
            raise PreflightError("git is not on the PATH; expected git 2.30 or newer; install it") from None


def _check_sha(sha: str) -> None:
    if not _SHA.fullmatch(sha):
        raise ConfigError(f"commit {sha!r} is no full sha; expected 40 hex digits, as Project.resolve gives them")
