"""Whether a delivery was signed with a secret, over its raw body: the ways of GitHub, Gitea, Forgejo and GitLab.

    X-Hub-Signature-256: sha256=HEX                        GitHub; Gitea and Forgejo send it too
    X-Gitea-Signature, X-Forgejo-Signature, X-Gogs-Signature: HEX
    webhook-signature: v1,BASE64 [v1,BASE64 ...]           GitLab's signing token, over ID.TIMESTAMP.BODY
    X-Gitlab-Token: SECRET                                 GitLab's secret token: proves the sender, not the body

Every signature that is there has to be right; the token counts only where there is none. Compared in constant time.
SHA-1 (X-Hub-Signature) is not looked at. Not covered: copies and replays, however old: the queue knows the push already
(flows.push_queue), so the time that GitLab signs along is not asked for, and a clock that is wrong loses no push.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence

SIGNING_TOKEN = b"whsec_"  # how GitLab's signing token begins; the key is what follows, decoded
_HEX = (b"x-hub-signature-256", b"x-gitea-signature", b"x-forgejo-signature", b"x-gogs-signature")
Headers = Sequence[tuple[bytes, bytes]]


def signing_key(secret: bytes) -> bytes:
    """The key of a signing token, or the secret as it is. Raises ValueError for a token that is not base64."""
    if not secret.startswith(SIGNING_TOKEN):
        return secret
    try:
        return base64.b64decode(secret.removeprefix(SIGNING_TOKEN), validate=True)
    except binascii.Error:
        raise ValueError("what follows whsec_ is not base64") from None


def is_signed(secret: bytes, headers: Headers, raw: bytes) -> bool:
    """Whether whoever sent these headers (names in lower case) with this body knows the secret."""
    digest = hmac.new(secret, raw, hashlib.sha256).hexdigest().encode()
    found = [
        hmac.compare_digest(digest, value.removeprefix(b"sha256="))
        for wanted in _HEX
        for value in _values(headers, wanted)
    ]
    if listed := _values(headers, b"webhook-signature"):
        found.append(_is_in_list(secret, headers, raw, listed))
    if found:
        return all(found)
    tokens = _values(headers, b"x-gitlab-token")
    return bool(tokens) and all([hmac.compare_digest(secret, token) for token in tokens])


def _is_in_list(secret: bytes, headers: Headers, raw: bytes, listed: list[bytes]) -> bool:
    """One signature of several is enough here: while a token is changed, both are sent."""
    identity, when = _values(headers, b"webhook-id"), _values(headers, b"webhook-timestamp")
    if len(listed) != 1 or len(identity) != 1 or len(when) != 1:
        return False
    message = b".".join((identity[0], when[0], raw))
    expected = b"v1," + base64.b64encode(hmac.new(signing_key(secret), message, hashlib.sha256).digest())
    return any([hmac.compare_digest(expected, one) for one in listed[0].split()])


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]
