"""Roles and accounts: nothing is granted that is not named, and the accounts with a token are known."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.deployments.k8s_kit import (
    NAMESPACES,
    TOKENS,
    WORKLOADS,
    Json,
    of_kind,
    raw,
)


def rules(objects: tuple[Json, ...]) -> Iterator[tuple[str, Json]]:
    """Every rule of every Role and ClusterRole."""
    for role in of_kind(objects, "Role", "ClusterRole"):
        for rule in role["rules"]:
            yield f"{role['kind']}/{role['metadata']['name']}", rule


def test_no_right_is_wider_than_its_name() -> None:
    for name, rule in rules(raw("spot")):
        words = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "*" not in words, name
        assert not {"secrets", "pods/exec", "serviceaccounts/token"} & set(rule["resources"]), name
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"]), name
        if name.startswith("ClusterRole"):
            assert set(rule["verbs"]) <= {"get", "list", "watch"}, name


def granted(objects: tuple[Json, ...], account: str, *, cluster: bool) -> set[tuple[str, str, str]]:
    """(group, resource, verb) of an account, by the bindings in these objects."""
    found: set[tuple[str, str, str]] = set()
    for binding in of_kind(objects, "ClusterRoleBinding" if cluster else "RoleBinding"):
        if any(s["kind"] == "ServiceAccount" and s["name"] == account for s in binding["subjects"]):
            ref = binding["roleRef"]
            (role,) = [r for r in of_kind(objects, ref["kind"]) if r["metadata"]["name"] == ref["name"]]
            for rule in role["rules"]:
                found |= {(g, r, v) for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}
    return found


def test_the_flow_has_what_the_runner_asks_for() -> None:
    access = pytest.importorskip("deployments.preflight_access")
    objects = raw("kind")
    for right in access.RIGHTS:
        have = granted(objects, "reprise-flow", cluster=right.cluster_wide)
        assert (right.group, right.full, right.verb) in have, f"{right.verb} {right.full}"


def test_the_flow_makes_no_pods_and_the_worker_reads_no_secrets() -> None:
    flow = granted(raw("kind"), "reprise-flow", cluster=False)
    assert {v for g, r, v in flow if (g, r) == ("", "pods")} == {"get", "list", "watch", "delete"}
    worker = granted(raw("kind"), "prefect-worker", cluster=False)
    assert {r for _, r, _ in worker} == {"jobs", "pods", "pods/log"}
    assert granted(raw("kind"), "prefect-worker", cluster=True) == set()


def test_the_deploying_step_changes_what_is_served_and_nothing_else() -> None:
    have = granted(raw("kind"), "reprise-deploy", cluster=False)
    changed = {(g, r) for g, r, v in have if v not in ("get", "list")}
    assert changed == {("apps", "deployments"), ("", "services"), ("policy", "poddisruptionbudgets")}
    flow = granted(raw("kind"), "reprise-flow", cluster=False)
    assert {v for _, r, v in flow if r == "deployments"} == {"get", "list"}
    assert granted(raw("kind"), "reprise-serve", cluster=False) == granted(raw("kind"), "reprise-step", cluster=False)
    assert granted(raw("kind"), "reprise-serve", cluster=False) == set()


def test_the_watch_over_flows_asks_for_jobs_and_nothing_else() -> None:
    assert granted(raw("spot"), "flow-watch", cluster=False) == {("batch", "jobs", "list")}
    assert granted(raw("spot"), "flow-watch", cluster=True) == set()


def test_only_these_accounts_have_a_token() -> None:
    accounts = of_kind(raw("spot"), "ServiceAccount")
    assert {a["metadata"]["name"] for a in accounts if a.get("automountServiceAccountToken", True)} == TOKENS
    named = {(a["metadata"]["namespace"], a["metadata"]["name"]) for a in accounts}
    assert {(n, "default") for n in NAMESPACES} <= named, "whoever forgets to name an account gets one without a token"
    for item in of_kind(raw("spot"), *WORKLOADS):
        spec = item["spec"]["template"]["spec"]
        assert (item["metadata"]["namespace"], spec["serviceAccountName"]) in named
        assert spec["automountServiceAccountToken"] == (spec["serviceAccountName"] in TOKENS), item["metadata"]["name"]
