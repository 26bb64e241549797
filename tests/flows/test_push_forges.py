"""One status in three dialects, over real HTTP: what is sent, and what each answer means."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

import flows.push_forges
from deployments.errors import GiveUp
from flows.push_forges import DESCRIPTION, WORDS, Away, Barred, Repository, Status, shortened
from tests.flows.forge_kit import STATES, TOKEN, FakeForge

SHA = "a" * 40
DONE = Status(word="success", description="Retrained: data changed", target_url="https://prefect.example/runs/1")


@pytest.fixture(params=["github", "gitlab", "gitea"])
def forge(request: pytest.FixtureRequest) -> Iterator[FakeForge]:
    with FakeForge(request.param) as fake:
        yield fake


def repository(forge: FakeForge, *, token: str = TOKEN, name: str = "acme/digits", url: str = "") -> Repository:
    return Repository(forge=forge.kind, url=url or forge.url, name=name, token=token, context="reprise/digits")  # type: ignore[arg-type]


def test_a_status_as_the_forge_documents_it(forge: FakeForge) -> None:
    repository(forge, url=f"{forge.url}/").post(SHA, DONE)
    assert forge.said == [
        {
            "state": "success",
            "description": "Retrained: data changed",
            "target_url": "https://prefect.example/runs/1",
            "context": "reprise/digits",
            "sha": SHA,
        }
    ]


def test_each_word_is_one_of_the_forge(forge: FakeForge) -> None:
    for n, word in enumerate(WORDS[forge.kind]):
        repository(forge).post(f"{n}" * 40, Status(word=word, description="x"))
    assert {s["state"] for s in forge.said} <= STATES[forge.kind]
    assert "target_url" not in forge.said[0]


def test_a_group_within_a_group() -> None:
    with FakeForge("gitlab") as forge:
        forge.repository = "acme/vision/digits"
        repository(forge, name="acme/vision/digits").post(SHA, DONE)
        assert len(forge.said) == 1


def test_the_same_again_is_no_error(forge: FakeForge) -> None:
    """The answer was lost: GitLab refuses the same transition, the others keep both."""
    for _ in range(2):
        repository(forge).post(SHA, Status(word="running", description="Retraining: data changed"))
    assert forge.asked == 2


def test_a_long_reason_fits(forge: FakeForge) -> None:
    repository(forge).post(SHA, Status(word="failure", description="Refused:\n" + "é" * 500))
    assert len(forge.said[0]["description"]) == DESCRIPTION and forge.said[0]["description"].endswith("…")
    assert shortened("a\n b") == "a b"


@pytest.mark.parametrize(
    ("code", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7.0),
        (403, {"Retry-After": "60"}, 60.0),
        (403, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": "{soon}"}, 30.0),
        (503, {}, 0.0),
        (500, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0.0),
        (502, {"Retry-After": "999999"}, 3600.0),
        (408, {}, 0.0),
    ],
)
def test_trouble_that_passes(forge: FakeForge, code: int, headers: dict[str, str], seconds: float) -> None:
    forge.trouble = [(code, {k: v.format(soon=int(time.time()) + 30) for k, v in headers.items()})]
    with pytest.raises(Away, match=f"answered {code} for acme/digits") as caught:
        repository(forge).post(SHA, DONE)
    assert caught.value.seconds == pytest.approx(seconds, abs=2)
    repository(forge).post(SHA, DONE)
    assert len(forge.said) == 1


@pytest.mark.parametrize("code", [401, 403, 404])
def test_what_a_person_has_to_change(forge: FakeForge, code: int) -> None:
    forge.trouble = [(code, {})]
    rights = {"github": "Commit statuses: write", "gitlab": "scope api", "gitea": "write:repository"}[forge.kind]
    with pytest.raises(Barred, match=f"answered {code} .*{rights}") as caught:
        repository(forge).post(SHA, DONE)
    assert TOKEN not in str(caught.value)


def test_a_wrong_token_and_a_wrong_name(forge: FakeForge) -> None:
    with pytest.raises(Barred, match="401"):
        repository(forge, token="other").post(SHA, DONE)
    with pytest.raises(Barred, match="404"):
        repository(forge, name="acme/other").post(SHA, DONE)
    assert forge.said == []


@pytest.mark.parametrize("code", [400, 422])
def test_what_the_forge_will_never_take(forge: FakeForge, code: int) -> None:
    forge.trouble = [(code, {})]
    with pytest.raises(GiveUp, match=f"answered {code} for acme/digits: .*no"):
        repository(forge).post(SHA, DONE)


@pytest.mark.parametrize("code", [301, 302, 307, 308])
def test_a_redirect_does_not_get_the_token(forge: FakeForge, code: int) -> None:
    with FakeForge(forge.kind) as elsewhere:
        forge.trouble = [(code, {"Location": f"{elsewhere.url}/x"})]
        with pytest.raises(Barred, match="moved to"):
            repository(forge).post(SHA, DONE)
        assert elsewhere.asked == 0


def test_a_forge_that_is_away_or_slow(forge: FakeForge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows.push_forges, "TIMEOUT_SECONDS", 0.2)
    forge.trouble = [0.6]
    with pytest.raises(Away, match=r"does not answer: .*timed out"):
        repository(forge).post(SHA, DONE)
    forge.stop()
    with pytest.raises(Away, match=r"does not answer: .*refused"):
        repository(forge).post(SHA, DONE)
