"""The commands that a cluster does not have, and what is done there instead: one sentence, exit code 2.

Not covered: the commands themselves, what a cluster's file may say (flows.cluster_settings).
"""

from __future__ import annotations

from flows.place_settings import kind_of, read_place
from flows.start import Order, pipeline_file

INSTEAD = {
    "up": "a cluster's services are Deployments: kubectl apply --server-side -k deployments/k8s/overlays/NAME starts "
    "them, and `reprise doctor --place cluster` says what is missing",
    "down": "a run of a cluster is ended by `reprise cancel --place cluster`, its services by kubectl -n "
    "reprise-services scale deployment --all --replicas=0",
    "serve": "a cluster's flows are started by its Deployment prefect-worker, and those that died resumed by "
    "flow-watch of components/triggers; whether it runs: kubectl -n reprise-services rollout status "
    "deployment/prefect-worker",
    "verify-resume": "it trains on this machine: run it at the same commit with --place laptop; a cluster's gate reads "
    "its certificate.json below trainings/KEY of the state volume's store",
    "tune-serving": "it loads the machine that it runs on: run it with --place laptop on a machine like those that "
    "serve, and commit the [serve] that it prints",
}


def laptop_only(order: Order, command: str) -> None:
    """Nothing on a laptop. Raises ConfigError for an order about a cluster."""
    _, read = read_place(order.place, pipeline_file(order).parent)
    if kind_of(read) == "cluster":
        raise read.refusal(("place", "kind"), f"`reprise {command}` is for a laptop; {INSTEAD[command]}")
