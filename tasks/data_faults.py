"""Why data could not be pulled, in words: which file, which md5 was expected, what the remote has instead.

DVC reports a tampered object as a missing cache file, or not at all, so the remote's objects are read here. Errors of
the network and of access are told apart by their names, because each kind of remote raises its own library's. Not
covered: pulling again (tasks.pull_data).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from deployments.errors import GiveUp, PreflightError, TryAgain, Unreachable
from tasks.data_listing import Wrong

LISTING = "the list of its files"  # stands for a path where the folder's own listing is wrong
_AWAY = (
    "ConnectionError",
    "ConnectError",
    "EndpointConnection",
    "Timeout",
    "ServerDisconnected",
    "gaierror",
    "SlowDown",
)
_DENIED = ("Permission", "Forbidden", "AccessDenied", "Credentials", "Unauthorized", "InvalidAccessKey", "Signature")
_SHOWN = 3  # files named in one message
_LOOKED_AT = 20  # objects read in the remote to explain a failure


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A DVC remote, opened."""

    name: str
    url: str
    odb: Any  # dvc_data's HashFileDB: its objects


def translated(error: Exception, remote: Remote, path: str) -> Exception:
    """DVC's error in our words, as far as its kind tells; any other one is explained by looking at the objects."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    words = " ".join(f"{type(e).__name__} {e}" for e in chain)
    where = f"remote {remote.name!r} at {remote.url}"
    if "LockError" in words:
        return TryAgain(f"{path}: a lock of DVC is held: {error}; wait for the other DVC to end")
    own = next((e for e in chain if isinstance(e, PermissionError) and e.filename), None)
    if own is not None and not str(own.filename).startswith(remote.url):
        return PreflightError(f"{own.filename}: permission denied; give this process the right to read and write it")
    if any(word in words for word in _DENIED):
        return PreflightError(f"{where}: access denied: {error}; give this process the remote's credentials")
    if any(word in words for word in _AWAY) or any(isinstance(e, ConnectionError | TimeoutError) for e in chain):
        return Unreachable(f"{where}: cannot be reached: {error}; check the network and the address")
    if any(isinstance(e, OSError) and e.errno == 28 for e in chain):
        return TryAgain(f"{path}: no space left on the device of the cache or the data; free some and try again")
    return error


def explained(wrong: list[Wrong], failure: Exception | None, remote: Remote, path: str, sha: str) -> Exception:
    """Why the data cannot be had: the files, what was expected, and what the remote has instead."""
    rows: list[str] = []
    tampered = False
    for bad in wrong[:_LOOKED_AT]:
        try:
            found = _md5_in_remote(remote, bad.expected)
        except Exception as error:
            known = translated(error, remote, path)
            if isinstance(known, TryAgain | PreflightError):
                return known
            return TryAgain(f"remote {remote.name!r} at {remote.url}: cannot be read: {error}; check it and try again")
        tampered = tampered or bool(found)
        if found == bad.expected.removesuffix(".dir"):
            continue
        what = f"found md5 {found} (altered)" if found else "found nothing (missing)"
        rows.append(f"{_named(path, bad)}: expected md5 {bad.expected}, {what}")
    if not rows:
        return GiveUp(f"{path}: cannot be checked out although remote {remote.name!r} is sound: {failure}")
    more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    fix = "remove the bad object there and `dvc push` it from a sound copy" if tampered else "`dvc push` it from a copy"
    return GiveUp(
        f"remote {remote.name!r} at {remote.url} does not hold the data of commit {sha[:7]}: "
        f"{'; '.join(rows[:_SHOWN])}{more}; {fix}"
    )


def _named(path: str, bad: Wrong) -> str:
    return f"{path} ({LISTING})" if bad.path == LISTING else path if bad.path == "" else f"{path}/{bad.path}"


def _md5_in_remote(remote: Remote, oid: str) -> str:
    """md5 of what the remote has under an object's name, "" for nothing."""
    place = remote.odb.oid_to_path(oid)
    if not remote.odb.fs.exists(place):
        return ""
    digest = hashlib.md5(usedforsecurity=False)
    with remote.odb.fs.open(place, "rb") as source:
        while block := source.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
