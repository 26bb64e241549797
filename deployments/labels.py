"""The names that Reprise puts on objects and pods: labels and annotations, and how a text becomes a label's value.

Not covered: who reads them (watches, NetworkPolicies, run-metrics).
"""

from __future__ import annotations

import re

from deployments.workload import Workload

DOMAIN = "reprise.dev"
WORKLOAD_LABEL, KEY_LABEL, ACCOUNT_LABEL = f"{DOMAIN}/workload", f"{DOMAIN}/key", f"{DOMAIN}/account"
REQUEST_ANNOTATION, ENDING_ANNOTATION = f"{DOMAIN}/request", f"{DOMAIN}/ending"
MANAGED = {"app.kubernetes.io/name": "reprise", "app.kubernetes.io/managed-by": "reprise"}
MANAGED_SELECTOR = "app.kubernetes.io/managed-by=reprise"


def labels_of(workload: Workload) -> dict[str, str]:
    """Labels of the object and its pods. Prefect's own flow-run label stays out: its observer would act on it."""
    own = {f"{DOMAIN}/{name}": label_value(value) for name, value in workload.labels.items() if value}
    own |= {ACCOUNT_LABEL: workload.account} if workload.account else {}  # a NetworkPolicy lets these to the API server
    return {**MANAGED, "app.kubernetes.io/component": workload.image, **own, WORKLOAD_LABEL: workload.name}


def label_value(text: str) -> str:
    """The text as a label's value: at most 63 of letters, digits, '-', '_', '.', with a letter or digit at the ends."""
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9]+$", "", re.sub(r"[^-A-Za-z0-9_.]", "-", text)[:63])
