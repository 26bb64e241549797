"""The first step: the data of a commit, pulled by DVC, every byte checked against the commit's digest.

    python -m tasks.step pull_data request.json result.json

`<folder>/<digest>` appears complete and verified or not at all, and is adopted when it is there. An object
of the own cache that turns out damaged is fetched again, once. Not covered: which digest a commit has before anything
is pulled (flows.data_pointer); the words for what failed (tasks.data_faults); cloud-versioned remotes.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from deployments.errors import ConfigError, GiveUp, PreflightError, StepError
from tasks.data_faults import LISTING, Remote, explained, translated
from tasks.data_listing import (
    Listing,
    Wrong,
    md5_of,
    object_path,
    read_listing,
    seal,
    sealed,
    split_digest,
    wrong_files,
)
from tasks.dvc_clone import open_clone, remote_of
from tasks.records import Store

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """What to pull. Paths of the machine are absolute."""

    repo: str  # the user's git repository
    sha: str
    path: str  # the DVC output, from the repository's root
    digest: str  # as the commit says: md5, with ".dir" for a folder
    cache: str  # DVC's cache, shared by all runs
    folder: str  # root of pulled data: the data comes to <folder>/<digest>
    train: str  # splits below the data: a folder or a file
    heldout: str


@dataclass(frozen=True, kw_only=True)
class PulledData:
    """The data, verified."""

    folder: str
    digest: str
    heldout_digest: str  # sha256 over the held-out split: two data sets with equal ones can be compared on it
    files: int
    bytes: int
    fetched_bytes: int  # that were not in the cache
    seconds: float


@dataclass(kw_only=True)
class _Pull:
    """One pull in progress."""

    request: PullRequest
    cache: Path
    size: int = 0  # bytes of the data, as the pointer says
    fetched: int = 0
    last_line: float = 0.0

    @property
    def name(self) -> str:
        return PurePosixPath(self.request.path).name

    def listing(self) -> Listing | None:
        return read_listing(self.cache, self.request.digest, self.name)

    def say(self, text: str, *, force: bool = False) -> None:
        """A progress line, at most two a second."""
        if force or time.monotonic() - self.last_line >= 0.5:
            self.last_line = time.monotonic()
            print(f"pull_data: {text}", file=sys.stderr, flush=True)


def pull_data(request: PullRequest) -> PulledData:
    """Pull, verify, put into place. Raises ConfigError, PreflightError, TryAgain (network), GiveUp (bad data)."""
    began = time.monotonic()
    _check(request)
    root = Path(request.folder)
    root.mkdir(parents=True, exist_ok=True)
    target, seal_file = root / request.digest, root / f"{request.digest}.sealed.json"
    fetched = 0
    with Store(root=str(root)).lock(f"pull-{request.digest}", wait_seconds=3600):
        found = sealed(target, seal_file)
        if found is None:
            for left in (target, seal_file, *root.glob(f".pull-{request.digest}-*")):  # by a pull that was killed
                shutil.rmtree(left, ignore_errors=True)
                left.unlink(missing_ok=True)
            pull = _Pull(request=request, cache=Path(request.cache))
            listing = _pull_into(pull, root, target, seal_file)
            found = listing, sum((target / path).stat().st_size for path in listing)
            fetched = pull.fetched
    listing, size = found
    split_digest(listing, request.train)
    return PulledData(
        folder=str(target),
        digest=request.digest,
        heldout_digest=split_digest(listing, request.heldout),
        files=len(listing),
        bytes=size,
        fetched_bytes=fetched,
        seconds=round(time.monotonic() - began, 3),
    )


def _check(request: PullRequest) -> None:
    if not re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", request.sha):
        raise ConfigError(f"pull_data.sha = {request.sha!r}: expected a full commit sha of hex digits")
    if not re.fullmatch(r"[0-9a-f]{32}(\.dir)?", request.digest):
        raise ConfigError(f'pull_data.digest = {request.digest!r}: expected DVC\'s md5, with ".dir" for a folder')
    path = PurePosixPath(request.path)
    if path.is_absolute() or ".." in path.parts or not path.parts or request.path.startswith("-"):
        raise ConfigError(f"pull_data.path = {request.path!r}: expected a path inside the repository, from its root")


def _pull_into(pull: _Pull, root: Path, target: Path, seal_file: Path) -> Listing:
    """Clone, fetch, check out, verify, move. The target exists afterwards."""
    request = pull.request
    aside = Path(tempfile.mkdtemp(prefix=f".pull-{request.digest}-", dir=root))
    try:
        with open_clone(Path(request.repo), request.sha, request.path, aside / "clone", pull.cache) as repo:
            out = _find_out(repo, aside / "clone" / request.path, request)
            remote = remote_of(repo, out)
            pull.size = out.meta.size or 0
            _check_reachable(remote, request.path)
            if not request.digest.endswith(".dir"):
                (aside / "data").mkdir()
            place = aside / "data" if request.digest.endswith(".dir") else aside / "data" / pull.name
            listing = _checked_out(pull, remote, repo, out, place)
        if not listing:
            raise ConfigError(f"{request.path}@{request.sha[:7]}: the data is empty; expected files; dvc add them")
        seal(aside / "data", listing, seal_file)
        (aside / "data").rename(target)
        return listing
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _find_out(repo: Any, path: Path, request: PullRequest) -> Any:
    from dvc.exceptions import DvcException, OutputNotFoundError

    at = f"{request.path}@{request.sha[:7]}"
    try:
        out = repo.find_outs_by_path(str(path))[0]
    except OutputNotFoundError:
        raise ConfigError(f"{at}: DVC does not track it in this commit; dvc add {request.path} && git commit") from None
    except DvcException as error:
        raise ConfigError(f"{at}: DVC cannot read its files: {error}; see `dvc status`") from None
    if not out.is_in_repo or out.fs.protocol != "local":
        raise ConfigError(f"{at}: points outside the repository; expected data inside it; dvc import-url brings it in")
    if out.hash_info.value != request.digest:
        raise ConfigError(f"{at}: has digest {out.hash_info.value}; expected {request.digest}, as planned; plan again")
    return out


def _checked_out(pull: _Pull, remote: Remote, repo: Any, out: Any, place: Path) -> Listing:
    """Fetch and check out until every file is what the digest says: once more after a damaged object of the cache."""
    request, target = pull.request, out.fs_path
    failure: Exception | None = None
    wrong: list[Wrong] = []
    for second in (False, True):
        with _progress(pull):
            try:
                pull.fetched += _fetch(pull, remote, repo, out)
                repo.checkout(targets=[target], force=True)
                failure = None
            except Exception as error:  # whatever DVC and its file systems raise; told apart below
                failure = translated(error, remote, request.path)
        if isinstance(failure, StepError):
            raise failure
        listing = pull.listing()
        if listing is None:
            wrong = [Wrong(path=LISTING, expected=request.digest, found=md5_of(_object(pull, request.digest)))]
        elif failure is not None:
            found = {path: (md5, md5_of(_object(pull, md5))) for path, md5 in sorted(listing.items())}
            wrong = [Wrong(path=p, expected=md5, found=f) for p, (md5, f) in found.items() if f != md5]
        else:
            base = Path(target) if out.is_dir_checksum else Path(target).parent
            wrong = wrong_files(base, listing, on_file=lambda n: pull.say(f"verified {n} files"))
            if not wrong:
                pull.say(f"{len(listing)}/{len(listing)} files verified", force=True)
                Path(target).rename(place)
                return listing
        if not second:  # an object of our own cache may be damaged: drop it, so that DVC fetches it again
            for bad in wrong:
                _object(pull, bad.expected).unlink(missing_ok=True)
            out.remove()  # a checkout that is there already would not be made anew
            repo.drop_data_index()
    if not out.is_dir_checksum:
        wrong = [replace(w, path="") for w in wrong]  # the output itself is the file
    raise explained(wrong, failure, remote, request.path, request.sha)


def _object(pull: _Pull, oid: str) -> Path:
    return object_path(pull.cache, oid)


def _fetch(pull: _Pull, remote: Remote, repo: Any, out: Any) -> int:
    """Bring what the cache lacks; returns its bytes."""
    if out.is_dir_checksum:
        out.get_dir_cache(remote=remote.name)  # the listing, to know what is absent; a failure shows in the fetch
    absent = {m for m in (pull.listing() or {}).values() if not object_path(pull.cache, m).exists()}
    repo.fetch(targets=[out.fs_path])
    return sum(p.stat().st_size for m in absent if (p := object_path(pull.cache, m)).exists())


@contextmanager
def _progress(pull: _Pull) -> Iterator[None]:
    """Tell what has arrived in the cache, at most twice a second, while DVC is at work."""
    done = threading.Event()

    def watch() -> None:
        missing: dict[str, str] | None = None
        size = 0
        total = 0
        while not done.wait(0.5):
            with suppress(OSError, ValueError, GiveUp):
                if missing is None:
                    if (listing := pull.listing()) is None:
                        continue
                    missing, total = dict(listing), len(listing)
                for path, md5 in list(missing.items()):
                    file = object_path(pull.cache, md5)
                    if file.exists():
                        size += file.stat().st_size
                        del missing[path]
                pull.say(f"{total - len(missing)}/{total} files, {_bytes(size)} of {_bytes(pull.size)}")

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _check_reachable(remote: Remote, path: str) -> None:
    """Raise PreflightError for a remote that is a folder and not there: DVC would call every file missing."""
    if remote.odb.fs.protocol == "local" and not Path(remote.url).is_dir():
        raise PreflightError(
            f"remote {remote.name!r} at {remote.url}: no such folder; expected the data of {path}; "
            f"mount it, or correct it: dvc remote modify {remote.name} url PATH"
        )


def _bytes(count: int) -> str:
    """12345 -> "12.3 kB"."""
    scale = next((u for u in ("GB", "MB", "kB") if count >= _UNITS[u]), "B")
    return f"{count / _UNITS[scale]:.{0 if scale == 'B' else 1}f} {scale}"
