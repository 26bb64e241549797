"""Would the API server take these objects? Asked of itself, by a dry run of their creation: nothing is stored.

    dry_run(connect(), [job, training, ...])      # a row an object: OK or FAIL, with the server's own words

Unknown and duplicate fields are refused too (strict validation), as are objects that admission refuses. Not covered:
pods that a Job's controller makes later (quota, Pod Security: preflight.py), whether there is a place for them.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from deployments.errors import GiveUp, PreflightError
from deployments.kube_api import ApiStatus, KubeApi
from deployments.preflight_findings import Finding
from deployments.snapshot_take import PATIENCE, server_version

QUERY = {"dryRun": "All", "fieldValidation": "Strict"}


def dry_run(api: KubeApi, objects: Iterable[dict[str, Any]]) -> Iterator[Finding]:
    """One row for each object. Raises Unreachable for an API server that is away, PreflightError if it refuses us."""
    server_version(api, PATIENCE)
    plurals: dict[str, dict[str, str]] = {}
    for item in objects:
        version, kind, metadata = item["apiVersion"], item["kind"], item["metadata"]
        group = version.rpartition("/")[0]
        if version not in plurals:
            plurals[version] = _plurals(api, version)
        what = f"{kind} {metadata['name']}"
        if kind not in plurals[version]:
            yield Finding(
                what=what,
                verdict="FAIL",
                found=f"{kind} of {version} is not defined on this cluster",
                fix=f"install what defines it; kubectl api-resources --api-group={group} shows what is there",
            )
            continue
        namespace = urllib.parse.quote(metadata["namespace"])
        path = f"{_root(version)}/namespaces/{namespace}/{plurals[version][kind]}"
        try:
            api.request("POST", path, query=QUERY, body=item, patience=PATIENCE)
        except (ApiStatus, GiveUp, PreflightError) as error:
            if getattr(error, "code", 0) == 409:  # told after everything else was well
                yield Finding(
                    what=what, verdict="OK", found="the API server takes it; there is one of this name already"
                )
                continue
            said = error.message if isinstance(error, ApiStatus) else str(error)
            yield Finding(what=what, verdict="FAIL", found=" ".join(said.split()), fix=_fix(error, namespace))
        else:
            yield Finding(what=what, verdict="OK", found="the API server takes it as it is")


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _plurals(api: KubeApi, version: str) -> dict[str, str]:
    """Kind -> plural, by discovery; {} for a group that is not there."""
    try:
        found = api.request("GET", _root(version), patience=PATIENCE).get("resources") or ()
    except (ApiStatus, PreflightError):
        return {}
    return {r["kind"]: r["name"] for r in found if "/" not in r["name"]}


def _fix(error: Exception, namespace: str) -> str:
    if isinstance(error, PreflightError):
        return "see what it says; `reprise preflight` lists all rights that are missing"
    if getattr(error, "code", 0) == 404:
        return f"make namespace {namespace}: kubectl apply -k of your overlay (deployments/k8s/README.md)"
    return "correct cluster.toml, or what the API server or an admission controller of this cluster forbids"
