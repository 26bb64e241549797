"""What is read of a delivery, whatever is in it: a push, a reason why it is none, or a refusal; never anything else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.push_payload import SCHEMA, Refused, event_of, read_push

SHA = re.compile(r"[0-9a-f]{40}")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
SHAS = st.text("0123456789abcdef", min_size=40, max_size=40) | st.just("0" * 40)
NAMES = st.sampled_from(["acme/digits", "Acme/Digits", "\ud800", "a" * 500])
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "ref": st.sampled_from(["refs/heads/main", "refs/tags/v1", "refs/heads/", ""]) | st.text(),
    "before": SHAS,
    "after": SHAS,
    "deleted": st.booleans(),
    "repository": st.fixed_dictionaries({"full_name": NAMES}),
    "project": st.fixed_dictionaries({"path_with_namespace": NAMES}),
    "pusher": st.fixed_dictionaries({"name": JSON}) | JSON,
    "user_username": JSON,
    "commits": JSON,
}
PAYLOADS = st.fixed_dictionaries({}, optional={name: good | JSON for name, good in GOOD.items()})


def is_valid(payload: dict[str, Any]) -> bool:
    """By the schema that the receiver publishes, written once more by hand."""
    named = [
        holder[key]
        for part, key in (("repository", "full_name"), ("project", "path_with_namespace"))
        if isinstance(holder := payload.get(part), dict) and key in holder
    ]
    return (
        isinstance(payload.get("ref"), str)
        and all(isinstance(payload.get(n), str) and bool(SHA.fullmatch(payload[n])) for n in ("before", "after"))
        and isinstance(payload.get("deleted", False), bool)
        and all(isinstance(payload.get(n, {}), dict) for n in ("repository", "project"))
        and bool(named)
        and all(isinstance(name, str) and name for name in named)
    )


def outcome(raw: bytes) -> int:
    """202 for what is read, the code of a refusal otherwise."""
    try:
        push, why = read_push(raw, "github")
    except Refused as error:
        assert error.reason
        return error.code
    assert (push is None) == bool(why)
    if push:
        assert SHA.fullmatch(push.after) and SHA.fullmatch(push.before) and len(push.pusher) <= 100
        json.dumps(push.__dict__).encode()  # as the queue keeps it
    why.encode()  # as the answer tells it
    return 202


@settings(max_examples=400, deadline=None)
@given(PAYLOADS)
def test_exactly_what_the_published_schema_allows_is_taken(payload: dict[str, Any]) -> None:
    assert outcome(json.dumps(payload).encode()) == (202 if is_valid(payload) else 400)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_are_refused(raw: bytes) -> None:
    assert outcome(raw) == 400


def test_the_schema_is_about_what_is_read() -> None:
    assert set(SCHEMA["properties"]) == {"ref", "before", "after", "deleted", "repository", "project"}
    assert SCHEMA["required"] == ["ref", "before", "after"]


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"x-github-event": "push"}, ("github", "push")),
        ({"x-gitlab-event": "Push Hook"}, ("gitlab", "push hook")),
        ({"x-gitea-event": "push", "x-github-event": "push"}, ("gitea", "push")),
        ({"x-forgejo-event": " PUSH ", "x-gitea-event": "push"}, ("gitea", "push")),
    ],
)
def test_whose_event(headers: dict[str, str], found: tuple[str, str]) -> None:
    assert event_of(headers) == found


def test_no_event() -> None:
    with pytest.raises(Refused, match="no X-GitHub-Event, X-Gitlab-Event or X-Gitea-Event header") as caught:
        event_of({"x-gogs-event": "push"})
    assert caught.value.code == 400
