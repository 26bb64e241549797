"""Signatures over the raw body: published examples, GitLab's signing token, and headers that contradict each other."""

from __future__ import annotations

import base64

import pytest

from flows.push_signature import is_signed, signing_key
from tests.flows.push_kit import SECRET, SIGNING_TOKEN, signed, standard_signature

BODY = b'{"ref": "refs/heads/main"}'


def lower(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]


def test_the_example_of_the_standard_webhooks_specification() -> None:
    """Secret, id, time, body and signature as its reference library prints them."""
    headers = [
        (b"webhook-id", b"msg_p5jXN8AQM9LWM0D4loKWxJek"),
        (b"webhook-timestamp", b"1614265330"),
        (b"webhook-signature", b"v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="),
    ]
    secret = b"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    assert is_signed(secret, headers, b'{"test": 2432232314}')
    assert not is_signed(secret, headers, b'{"test": 2432232315}')


@pytest.mark.parametrize("forge", ["github", "gitea", "forgejo", "gitlab", "gitlab, signed"])
def test_each_forge(forge: str) -> None:
    secret = SIGNING_TOKEN if forge == "gitlab, signed" else SECRET
    headers = lower(signed(BODY, secret, forge=forge))
    assert is_signed(secret, headers, BODY)
    assert not is_signed(b"x" * 32, headers, BODY)
    assert is_signed(secret, headers, BODY + b" ") == (forge == "gitlab"), "only a token says nothing of the body"


SIGNED = signed(BODY, SIGNING_TOKEN, forge="gitlab, signed")
WRONG = "v1," + base64.b64encode(b"0" * 32).decode()
CHANGED = {
    "as it is": ({}, True),
    "the new one beside the old one": ({"webhook-signature": f"{WRONG} {SIGNED['webhook-signature']}"}, True),
    "GitLab's other token, of another secret": ({"X-Gitlab-Token": "other"}, True),
    "wrong": ({"webhook-signature": WRONG}, False),
    "another version": ({"webhook-signature": SIGNED["webhook-signature"].replace("v1,", "v1a,")}, False),
    "no version": ({"webhook-signature": SIGNED["webhook-signature"].removeprefix("v1,")}, False),
    "empty": ({"webhook-signature": ""}, False),
    "another id": ({"webhook-id": "other"}, False),
    "another time": ({"webhook-timestamp": "1795513547"}, False),
    "no id": ({"webhook-id": None}, False),
    "no time": ({"webhook-timestamp": None}, False),
    "the right token beside a wrong signature": (
        {"webhook-signature": WRONG, "X-Gitlab-Token": SIGNING_TOKEN.decode()},
        False,
    ),
    "GitHub's wrong beside it": ({"X-Hub-Signature-256": "sha256=" + "0" * 64}, False),
}


@pytest.mark.parametrize("case", CHANGED)
def test_the_signing_token_of_gitlab(case: str) -> None:
    changes, right = CHANGED[case]
    headers = {k: v for k, v in {**SIGNED, **changes}.items() if v is not None}
    assert is_signed(SIGNING_TOKEN, lower(headers), BODY) == right


@pytest.mark.parametrize("name", ["x-hub-signature-256", "x-gitea-signature", "x-gitlab-token", "webhook-signature"])
@pytest.mark.parametrize("first", [True, False])
def test_twice_the_same_header_with_two_values(name: str, first: bool) -> None:
    forge = {"x-gitea-signature": "gitea", "x-gitlab-token": "gitlab", "webhook-signature": "gitlab, signed"}
    secret = SIGNING_TOKEN if name == "webhook-signature" else SECRET
    headers = lower(signed(BODY, secret, forge=forge.get(name, "github")))
    assert any(n == name.encode() for n, _ in headers)
    wrong = (name.encode(), b"0" * 64)
    assert not is_signed(secret, [wrong, *headers] if first else [*headers, wrong], BODY)


def test_keys() -> None:
    assert (signing_key(SECRET), signing_key(SIGNING_TOKEN)) == (SECRET, SECRET)
    with pytest.raises(ValueError, match="not base64"):
        signing_key(b"whsec_?")
    assert standard_signature(SIGNING_TOKEN, "a", "1", BODY) != standard_signature(SIGNING_TOKEN, "a.1", "", BODY)
