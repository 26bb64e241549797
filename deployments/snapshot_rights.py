"""A live cluster is asked what one may do there: one question for all rules of the namespace, else right by right.

Rules do not tell how wide their binding is, so rights of the whole cluster are asked for one by one.
Not covered: which rights are needed and what is said of them (preflight_access.py).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from deployments.errors import GiveUp, PreflightError, StepError, Unreachable
from deployments.kube_api import ApiStatus
from deployments.preflight_access import RIGHTS, Right

if TYPE_CHECKING:
    from deployments.snapshot_take import Reader

Json = dict[str, Any]
REVIEWS = "/apis/authorization.k8s.io/v1"


def ask_rights(api: Reader, namespace: str, *, patience: float) -> tuple[list[Json], str]:
    """Each right with whether one has it, and why some could not be asked for ("" if all could).

    `patience`: seconds that the API server may be away. Raises Unreachable.
    """
    review = {"kind": "SelfSubjectRulesReview", "spec": {"namespace": namespace}}
    status: Json = {"incomplete": True}
    with contextlib.suppress(ApiStatus, PreflightError, GiveUp):
        status = _ask(api, "selfsubjectrulesreviews", review, patience) or status
    found: list[Json] = []
    unreadable = ""
    for right in RIGHTS:
        try:
            if right.cluster_wide or status.get("incomplete"):
                answer = _may(api, namespace, right, patience)
            else:
                covered = any(_covers(rule, right) for rule in status.get("resourceRules") or ())
                answer = {"allowed": covered, "reason": ""}
        except Unreachable:
            raise
        except (StepError, ApiStatus) as error:
            unreadable = str(error)
            continue
        found.append({"group": right.group, "resource": right.full, "verb": right.verb, **answer})
    return found, unreadable


def _may(api: Reader, namespace: str, right: Right, patience: float) -> Json:
    attributes = {"group": right.group, "resource": right.resource, "verb": right.verb}
    if right.subresource:
        attributes["subresource"] = right.subresource
    if not right.cluster_wide:
        attributes["namespace"] = namespace
    review = {"kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": attributes}}
    status = _ask(api, "selfsubjectaccessreviews", review, patience)
    return {"allowed": bool(status.get("allowed")), "reason": str(status.get("reason") or "")}


def _ask(api: Reader, plural: str, review: Json, patience: float) -> Json:
    body = {"apiVersion": "authorization.k8s.io/v1", **review}
    return api.request("POST", f"{REVIEWS}/{plural}", body=body, patience=patience).get("status") or {}


def _covers(rule: Json, right: Right) -> bool:
    """Whether a rule allows it; one that names single objects does not."""
    if rule.get("resourceNames"):
        return False
    resources = rule.get("resources") or ()
    anywhere = bool(right.subresource) and f"*/{right.subresource}" in resources
    named = right.full in resources or "*" in resources or anywhere
    return named and all(
        "*" in (rule.get(key) or ()) or value in (rule.get(key) or ())
        for key, value in (("apiGroups", right.group), ("verbs", right.verb))
    )
