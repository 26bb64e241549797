"""`reprise run --place cluster`: a flow run in the cluster, followed from here until it ends.

    reprise run --place cluster            # Ctrl-C cancels it; --detach leaves it to itself

Here the order is checked (settings, revision, pushed or not), the deployment renewed and the run asked for; the flow
itself is a pod that Prefect's worker starts. What it tells comes back through Prefect (flows.run_mirror), so this
machine needs Prefect's URL and nothing else of the cluster. Not covered: following it (flows.follow), the flow's side
(flows.prefect_start).
"""

from __future__ import annotations

import os
import subprocess
import uuid
from typing import Any

from deployments.errors import ConfigError, GiveUp, PreflightError, TryAgain, Unreachable
from flows.cluster_deployment import register_on_cluster
from flows.cluster_settings import ClusterSettings, load_cluster
from flows.display import say
from flows.follow import Follower
from flows.prefect_api import Prefect
from flows.project import Project
from flows.start import Order, at_revision, pipeline_file


def submit(order: Order, *, detach: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run an order on its cluster; returns the run's document (with `detach` what Prefect knows of the flow run).

    Raises ConfigError, PreflightError (not pushed, no pool), TryAgain (Prefect is away), what the run itself raised, or
    Interrupted.
    """
    file = pipeline_file(order)
    settings = load_cluster(order.place, file.parent)
    if order.interruptions:
        raise ConfigError(f"--interrupt {order.interruptions[0]}: only a laptop plays the spot market; leave it out")
    project, pipeline, sha = at_revision(order, file)
    git = git_url(project, settings, sha)
    prefect = answering(Prefect(url=prefect_url(settings)))
    deployment = register_on_cluster(prefect, pipeline, settings, git=git)
    flow_run = prefect.start(
        deployment,
        parameters={"rev": sha, "overrides": list(order.overrides), "cause": order.cause},
        name=f"{pipeline.name} {sha[:7]} {order.cause}",
        tags=["reprise", pipeline.name],
        idempotency_key=str(uuid.uuid4()),
    )
    page = f"{settings.services.prefect_outside or prefect.url}/runs/flow-run/{flow_run['id']}"
    if not quiet:
        say(f"{pipeline.name} at {sha[:7]} on {settings.file.name}: {page}")
    if detach:
        return {"flow_run": flow_run["id"], "pipeline": pipeline.name, "git_sha": sha, "links": {"prefect": page}}
    document = Follower(prefect=prefect, flow_run=flow_run["id"], settings=settings, quiet=quiet).follow()
    if not document:
        raise TryAgain(f"the run has ended and its document did not come through Prefect: {page}")
    return document


def prefect_url(settings: ClusterSettings) -> str:
    """Prefect as this machine reaches it: [services] prefect_outside, else $PREFECT_API_URL, else as pods do."""
    outside = settings.services.prefect_outside or os.environ.get("PREFECT_API_URL", "").rstrip("/").removesuffix(
        "/api"
    )
    return outside or settings.services.prefect


def answering(prefect: Prefect) -> Prefect:
    """The same, asked once. Raises Unreachable or PreflightError with what this machine needs for it."""
    try:
        prefect.call("POST", "/work_pools/filter", {"limit": 1})
    except TryAgain as error:
        said = str(error).partition("; start it")[0]
        raise Unreachable(
            f"{said}; from outside the cluster: kubectl -n reprise-services port-forward service/prefect 4200, and "
            'prefect_outside = "http://127.0.0.1:4200" of [services] in cluster.toml'
        ) from None
    except GiveUp as error:
        if " answered 401 " not in str(error):
            raise
        raise PreflightError(
            f"Prefect at {prefect.url} wants a password; expected it in PREFECT_API_AUTH_STRING: kubectl -n reprise "
            "get secret prefect-auth -o jsonpath='{.data.auth-string}' | base64 -d"
        ) from None
    return prefect


def git_url(project: Project, settings: ClusterSettings, sha: str) -> str:
    """Where the pod clones from. Raises ConfigError without a remote, PreflightError for a commit that is not there."""
    origin = _git(project, "remote", "get-url", "origin")
    url = settings.project.git or origin
    if not url:
        raise ConfigError(
            f"{project.root}: no remote `origin`, and a pod of the cluster clones the project; add it: "
            "git remote add origin URL && git push, or [project] git in cluster.toml"
        )
    if origin and not _git(project, "for-each-ref", f"--contains={sha}", "refs/remotes/origin", "--count=1"):
        raise PreflightError(
            f"commit {sha[:7]} is on no branch of {origin} that this checkout knows of, so no pod could clone it: "
            "git push (or git fetch, if it is there by now)"
        )
    return url


def _git(project: Project, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=project.root, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
