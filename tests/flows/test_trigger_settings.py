"""Mistakes in [schedule], [push], [deploy] and [notify], each told with what was expected."""

from __future__ import annotations

import pytest

from flows.settings import load_pipeline
from tests.flows.test_settings import GOOD, refused

MISTAKES = {
    "words as cron": ('[schedule]\ncron = "daily"', r'p.toml:13: \[schedule\] cron = "daily": expected five fields'),
    "minute 60": ('[schedule]\ncron = "60 3 * * *"', r"expected five fields .*Bad minute"),
    "six fields": ('[schedule]\ncron = "0 0 3 * * *"', r"expected five fields"),
    "an hour that never is": ('[schedule]\ncron = "0 25 * * *"', r"expected five fields .*Bad hour"),
    "unknown zone": (
        '[schedule]\ncron = "0 3 * * *"\ntimezone = "Europe/Berln"',
        r'p.toml:14: \[schedule\] timezone = "Europe/Berln": .*did you mean "Europe/Berlin"\?',
    ),
    "zone as a path": ('[schedule]\ntimezone = "../../etc/passwd"', r"expected a time zone of the IANA list"),
    "pause of nothing": ("[schedule]\npaused = true", r"\[schedule\] paused = true: expected a cron to pause"),
    "unknown strategy": ('[schedule]\noverlap = "queue"', r"overlap = \"queue\": expected 'wait' or 'skip'"),
    "option as revision": ('[schedule]\nrev = "--all"', r'rev = "--all": expected a branch, a tag or a commit'),
    "repository as URL": ('[push]\nrepository = "https://forge/a/b"', r"expected the full name on the forge"),
    "repository with .git": ('[push]\nrepository = "acme/digits.git"', r'without \.git: "acme/digits"'),
    "repository without owner": ('[push]\nrepository = "digits"', r"expected the full name on the forge"),
    "full ref as branch": ('[push]\nbranches = ["refs/heads/*"]', r"branches\[0\] = .*: expected the name of a branch"),
    "no branch": ("[push]\nbranches = []", r"\[push\] branches = \[\]: expected at least one"),
    "one branch without a list": ('[push]\nbranches = "main"', r"branches = \"main\": expected a list such as"),
    "secret in the file": (
        '[push]\nsecret = "0123456789abcdef"',
        r'secret = "\*\*\*": expected a reference to a secret',
    ),
    "secret by a relative file": ('[push]\nsecret = "file:secret"', r"expected a reference to a secret"),
    "long settle": ('[push]\nsettle = "2m"', r'settle = "2m": expected at most "60s"'),
    "remote as option": ('[push]\nremote = "--upload-pack=x"', r"expected the name of a git remote"),
    "unknown forge": (
        '[push]\nrepository = "a/b"\n[push.status]\nforge = "bitbucket"',
        r"\[push.status\] forge = \"bitbucket\": expected '', 'github', 'gitlab' or 'gitea'",
    ),
    "status of no repository": ('[push.status]\nforge = "github"', r"expected \[push\] repository beside it"),
    "a forge without an address": (
        '[push]\nrepository = "a/b"\n[push.status]\nforge = "gitea"',
        r"\[push.status\] url.*: expected the address of the forge",
    ),
    "a token in the clear": (
        '[push]\nrepository = "a/b"\n[push.status]\nforge = "gitea"\nurl = "http://gitea.example"',
        r"expected https://: a token would cross the net in the clear",
    ),
    "an address that is none": (
        '[push]\nrepository = "a/b"\n[push.status]\nforge = "gitea"\nurl = "gitea.example"',
        r"expected an address such as",
    ),
    "token in the file": (
        '[push]\nrepository = "a/b"\n[push.status]\nforge = "github"\ntoken = "0123456789abcdef"',
        r'token = "\*\*\*": expected a reference to a secret',
    ),
    "hasty approval": ('[deploy]\napproval_within = "5s"', r'expected at least "1m"'),
    "approval as text": ('[deploy]\napproval = "yes"', r"approval = \"yes\": expected true or false"),
    "block without type": ('[notify]\nblock = "team"', r"expected TYPE/NAME of a block in Prefect"),
    "mail to nobody": (
        '[notify]\nblock = "email-server-credentials/ops"',
        r"\[notify\] to.*: expected who gets the mail",
    ),
    "mail to no address": (
        '[notify]\nblock = "email-server-credentials/ops"\nto = ["ada@example.com", "team"]',
        r"expected e-mail addresses such as .*'team' is none",
    ),
    "recipients of a chat": (
        '[notify]\nblock = "slack-webhook/team"\nto = ["ada@example.com"]',
        r"expected block = .email-server-credentials/NAME. beside it",
    ),
    "unknown outcome": ('[notify]\non = ["sucess"]', r"on\[0\] = \"sucess\": expected 'success', 'refusal'"),
    "key of another section": ("[schedule]\napproval = true", r"unknown key; it belongs in \[deploy\]"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str) -> None:
    assert "0123456789abcdef" not in refused(*MISTAKES[case])


def test_defaults() -> None:
    settings = load_pipeline(GOOD)
    assert (settings.schedule.cron, settings.schedule.timezone, settings.schedule.overlap) == ("", "UTC", "wait")
    assert (settings.push.repository, settings.push.branches, settings.push.settle) == ("", ("main",), 3.0)
    assert (settings.deploy.approval, settings.notify.block) == (False, "")


@pytest.mark.parametrize(
    "url", ["https://git.example/api/v3/", "http://127.0.0.1:3000", "http://gitea-http.gitea.svc:3000", "http://gitea"]
)
def test_addresses_of_forges(url: str) -> None:
    text = f'[push]\nrepository = "a/b"\n[push.status]\nforge = "gitea"\nurl = "{url}"\n'
    status = load_pipeline(GOOD + text).push.status
    assert (status.forge, status.url, status.token) == ("gitea", url.rstrip("/"), "${REPRISE_FORGE_TOKEN}")
    assert load_pipeline(GOOD).push.status.forge == "", "off by default"


def test_a_secret_stays_a_reference_and_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """`reprise run` must not want the receiver's secret, nor must it land in a document."""
    monkeypatch.delenv("NO_SUCH_SECRET", raising=False)
    settings = load_pipeline(GOOD + '[push]\nsecret = "${NO_SUCH_SECRET}"\n')
    assert settings.push.secret == "${NO_SUCH_SECRET}"


@pytest.mark.parametrize("cron", ["0 3 * * *", "*/15 * * * 1-5", "0 0 1 1,7 *", "30 4 * * SUN"])
def test_crons(cron: str) -> None:
    assert load_pipeline(GOOD + f'[schedule]\ncron = "{cron}"\ntimezone = "Europe/Berlin"\n').schedule.cron == cron


def test_no_trigger_decides_the_weights() -> None:
    more = '[schedule]\ncron = "0 3 * * *"\n[push]\nrepository = "a/b"\n[deploy]\napproval = true\n'
    assert load_pipeline(GOOD + more).train.deciding() == load_pipeline(GOOD).train.deciding()
