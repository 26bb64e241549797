"""Flows of a cluster that died without a word are found and resumed once: `python -m flows.cluster_zombies`.

A flow's Job replaces its pod, so most deaths mend themselves. What is left are those whose Job is gone or has given up:
Prefect, its worker or the automation marks them Crashed, or nobody does, and nobody starts them again. This looks every
few seconds, as `reprise serve` does on a laptop, with the same judgement (flows.zombies); a flow whose Job still may
start a pod is left alone. It runs as one pod beside the state volume, whose locks say who lives
(deployments/k8s/components/triggers/watch.yaml). Not covered: trainers (a flow that goes on adopts those).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import argparse
import threading
from collections.abc import Callable

from deployments.job_status import end_of
from deployments.kube_api import KubeApi
from deployments.kube_connect import connect
from flows.display import say
from flows.prefect_api import Prefect
from flows.zombies import sweep
from tasks.records import Store

SECONDS = 5.0
FLOW_RUN = "prefect.io/flow-run-id"  # the label that Prefect's worker gives to a flow's Job


def job_goes_on(api: KubeApi, namespace: str, flow_run: str) -> bool:
    """Whether a Job of the flow run is there that has not ended: it runs a pod, or starts another."""
    found = api.get(f"/apis/batch/v1/namespaces/{namespace}/jobs", labelSelector=f"{FLOW_RUN}={flow_run}")
    return any(end_of(job) is None and "deletionTimestamp" not in job["metadata"] for job in found["items"])


def watch(
    prefect: Prefect,
    store: Store,
    api: KubeApi,
    *,
    pool: str,
    namespace: str,
    stopped: Callable[[float], bool],
    tell: Callable[[str], None] = say,
) -> None:
    """Look until `stopped(seconds)`, which is also the wait between looks, says so. Survives whatever goes wrong."""
    told = ""
    while not stopped(SECONDS):
        try:
            with store.lock("zombies"):  # of two watches one looks: each resumption is counted
                for line in sweep(prefect, store, pool=pool, looked_after=lambda run: job_goes_on(api, namespace, run)):
                    tell(line)
            told = ""
        except Exception as error:  # a bad look must not end the watch
            if str(error) != told:
                told = str(error)
                tell(f"looking for dead flows: {told}")


def main() -> None:
    """Until SIGTERM; a look that has begun is finished."""
    parser = argparse.ArgumentParser(description="Finds flows of a cluster that died, and resumes them once.")
    parser.add_argument("--store", required=True, help="the store's folder on the state volume")
    parser.add_argument("--prefect", required=True, help="its API's URL; password in PREFECT_API_AUTH_STRING")
    parser.add_argument("--pool", default="reprise", help="the work pool whose flows have that store")
    parser.add_argument("--namespace", default="reprise", help="where their Jobs are")
    told = parser.parse_args()
    ending = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ending.set())
    prefect = Prefect(url=told.prefect.rstrip("/").removesuffix("/api"))
    say(f"watching over flows of pool {told.pool}")
    store = Store(root=told.store)
    watch(prefect, store, connect(), pool=told.pool, namespace=told.namespace, stopped=ending.wait)


if __name__ == "__main__":
    main()
