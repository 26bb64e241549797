"""Environment references and secrets in settings: "${NAME}" is filled in, a secret written out is refused.

A settings file is committed, so a secret has to stay in the environment of the process, or in a file of the machine.
`expand` and `is_literal_secret` look at plain parsed TOML, `secret` looks a reference up. Not covered: secrets whose
form nobody published (a password under an innocent key).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deployments.errors import ConfigError
from flows.toml_lines import KeyPath

_REFERENCE = re.compile(r"\$\{([^}]*)\}?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_WORDS = frozenset(
    {"token", "secret", "password", "passwd", "passphrase", "apikey", "credential", "credentials"}
)
_SECRET_KEYS = ("api_key", "access_key", "private_key", "secret_key", "auth_key")
_VOCABULARY = frozenset({"pad", "eos", "bos", "unk", "sep", "cls", "mask"})  # pad_token is a word of language models
_SECRET_VALUES = re.compile(
    r"(?:AKIA|ASIA)[0-9A-Z]{16}"  # AWS
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\."  # a JSON web token
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|://[^/\s:@]+:[^/\s:@${]+@"  # a password inside a URL
)


def is_literal_secret(path: KeyPath, value: Any) -> bool:
    """Whether a value that stands in a file is a secret: by the key's name, or by the value's look."""
    if not isinstance(value, str) or not value:
        return False
    if _SECRET_VALUES.search(value):
        return True
    key = next((str(p) for p in reversed(path) if isinstance(p, str)), "").lower().replace("-", "_")
    words = key.split("_")
    named = any(w in _SECRET_WORDS for w in words) or any(k in key for k in _SECRET_KEYS)
    if not named or _VOCABULARY & set(words):
        return False
    whole = _REFERENCE.fullmatch(value)
    return not (whole and value.endswith("}"))


def expand(value: str, environment: Mapping[str, str]) -> str:
    """Fill in each ${NAME}. Raises ValueError naming a variable that is not set or a reference that is none."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if not match[0].endswith("}") or not _NAME.fullmatch(name):
            raise ValueError("expected an environment reference written ${NAME}: letters, digits and _ in braces")
        if name not in environment:
            raise ValueError(f"expected the environment variable {name} to be set; set it: export {name}=...")
        return environment[name]

    return _REFERENCE.sub(fill, value)


def secret(reference: str, *, what: str, least: int = 1) -> bytes:
    """The secret that "${NAME}" or "file:/path" refers to, without surrounding blanks. `what` is how messages call it.

    Raises ConfigError for one that is not there, cannot be read, or has fewer than `least` bytes. Never tells it.
    """
    if reference.startswith("file:"):
        path = Path(reference.removeprefix("file:"))
        try:
            found = path.read_bytes().strip()
        except OSError as error:
            raise ConfigError(f"{what} = {reference!r}: cannot be read ({error.strerror}); expected a file") from None
    else:
        name = reference[2:-1]
        value = os.environ.get(name)
        if value is None:
            raise ConfigError(
                f"{what} = {reference!r}: the environment variable {name} is not set; "
                f'make one: export {name}="$(openssl rand -hex 32)"'
            )
        found = os.fsencode(value).strip()
    if len(found) < least:
        raise ConfigError(
            f"{what} = {reference!r}: the secret has {len(found)} bytes; expected at least {least}, because whoever "
            "guesses it can start runs; make one: openssl rand -hex 32"
        )
    return found
