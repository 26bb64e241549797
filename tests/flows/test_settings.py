"""Each mistake that a person can make in pipeline.toml: file, line, section, key, value, what was expected."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from deployments.errors import ConfigError, PreflightError
from flows.settings import find_pipeline, load_pipeline, slug

GOOD = """\
[pipeline]
name = "digits"

[data]
path = "data/digits"

[model]
module = "digits.py"

[train]
epochs = 3
"""


def refusal(text: str, *overrides: str) -> str:
    """The message about a text named p.toml."""
    with pytest.raises(ConfigError) as caught:
        load_pipeline(text, source_name="p.toml", overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def refused(added: str, expected: str) -> str:
    """The message about what is added to GOOD: one line that names the file and matches."""
    message = refusal(GOOD + added + "\n")
    assert re.search(expected, message), message
    assert message.startswith("p.toml:") and "\n" not in message, message
    return message


def test_defaults_and_units() -> None:
    settings = load_pipeline(GOOD + '[train.checkpoint]\nmin_interval = "250ms"\nmax_interval = "1h30m"\n')
    assert (settings.name, settings.train.epochs, settings.data.heldout) == ("digits", 3, "heldout")
    assert (settings.train.checkpoint.min_interval, settings.train.checkpoint.max_interval) == (0.25, 5400.0)
    assert (settings.serve.response_timeout, settings.train.deadline) == (30.0, 86400.0)


def test_frozen() -> None:
    settings = load_pipeline(GOOD)
    with pytest.raises(ValidationError, match="frozen"):
        settings.train.epochs = 4


def test_from_a_file_and_from_a_revision(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.toml"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    assert load_pipeline(file).folder == tmp_path
    assert load_pipeline(GOOD, source_name="pipeline.toml@3f2a9c1", file=file) == load_pipeline(file)


MISTAKES = {  # what is added to GOOD begins in line 12
    "unknown key": ("epoch = 4", r'p.toml:12: \[train\] epoch = 4: unknown key; did you mean "epochs"\?; expected one'),
    "key of another section": ("minimum = 1.0", r"\[train\] minimum = 1.0: unknown key; it belongs in \[gate\]"),
    "unknown section": ("[chek]", r'p.toml:12: \[chek\]: unknown section; did you mean "check"\?'),
    "value instead of section": ("checkpoint = 3", r"\[train\] checkpoint = 3: expected a section of keys and values"),
    "text for number": ('seed = "3"', r'p.toml:12: \[train\] seed = "3": expected a whole number, without quotes'),
    "fraction for count": ("seed = 1.5", r"\[train\] seed = 1.5: expected a whole number"),
    "true for number": ("seed = true", r"\[train\] seed = true: expected a whole number"),
    "number for true": ("compile = 1", r"\[train\] compile = 1: expected true or false"),
    "number for text": ("[gate]\nmetric = 3", r"p.toml:13: \[gate\] metric = 3: expected text in quotes"),
    "zero count": ("batch_size = 0", r"\[train\] batch_size = 0: expected a number of at least 1"),
    "negative count": ("workers = -2", r"\[train\] workers = -2: expected a number of at least 1"),
    "negative budget": ("errors = -1", r"\[train\] errors = -1: expected a number of at least 0"),
    "min > max": (
        '[train.checkpoint]\nmin_interval = "10m"\nmax_interval = "1m"',
        r'p.toml:14: \[train.checkpoint\] max_interval = "1m": expected at least min_interval, 600 s',
    ),
    "shards < workers": ("workers = 4\nshards = 2", r"\[train\] shards = 2: expected 0 .* or at least workers, 4"),
    "NaN threshold": ("[gate]\nminimum = nan", r"p.toml:13: \[gate\] minimum = nan: expected a finite number"),
    "infinite threshold": ("[gate]\ntolerance = inf", r"\[gate\] tolerance = inf: expected a finite number"),
    "share above one": ("[check]\nmin_agreement = 1.5", r"min_agreement = 1.5: expected a number of at most 1"),
    "bad duration": ('deadline = "30 mins"', r'\[train\] deadline = "30 mins": expected a duration such as "5s"'),
    "negative duration": ('deadline = "-5s"', r'deadline = "-5s": expected a duration such as'),
    "duration without unit": ("deadline = 30", r"\[train\] deadline = 30: expected a duration .*, in quotes"),
    "zero deadline": ('deadline = "0s"', r"expected a deadline above zero"),
    "zero mtbf": ('[train.checkpoint]\nmtbf = "0s"', r"expected a time between interruptions above zero"),
    "timeout below a second": ('[serve]\nresponse_timeout = "10ms"', r"expected at least 1s: TorchServe counts"),
    "unknown choice": ('precision = "fp16"', r"precision = \"fp16\": expected 'float32' or 'bfloat16'"),
    "one checkpoint": ("[train.checkpoint]\nkeep = 1", r"keep = 1: expected a number of at least 2"),
    "bad metric": ('[gate]\nmetric = "a b"', r"metric = \"a b\": expected the name of a metric"),
    "date as parameter": (
        "[train.params]\nd = 2020-01-01",
        r"p.toml:13: \[train.params\] d = 2020-01-01: expected text",
    ),
    "NaN parameter": ("[train.params]\nlr = nan", r"\[train.params\] lr = nan: expected a finite number"),
    "list as parameter": (
        "[train.params]\nsizes = [1, 2]",
        r"\[train.params\] sizes = \[1, 2\]: expected text, a number",
    ),
    "env not set": (
        '[gate]\nmetric = "${NO_SUCH}"',
        r'metric = "\$\{NO_SUCH\}": expected the environment variable NO_',
    ),
    "env for a number": ('seed = "${HOME}"', r'seed = "\$\{HOME\}": .* an environment reference is always text'),
    "broken reference": ('[gate]\nmetric = "${a-b}"', r"expected an environment reference written \$\{NAME\}"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake(case: str) -> None:
    assert "Traceback" not in refused(*MISTAKES[case])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("[pipeline]", "", r'p.toml:2: name = "digits": unknown key; it belongs in \[pipeline\]'),
        ('name = "digits"\n', "", r"p.toml:1: \[pipeline\] name: expected this key; add: name = \.\.\."),
        ('[model]\nmodule = "digits.py"\n', "", r"p.toml:1: \[model\]: expected this section, with module; add it"),
        ('"digits.py"', '"digits.txt"', r'p.toml:8: \[model\] module = "digits.txt": expected .* "digits.py"'),
        ('"digits.py"', '"../digits.py"', r"\[model\] module = .* without '\.\.'"),
        ('"data/digits"', '"/data"', r'p.toml:5: \[data\] path = "/data": expected a path relative to the folder'),
        ('"data/digits"', '"--all"', r'\[data\] path = "--all": expected a path relative'),
        (
            '"digits.py"',
            '"digits.py"\nfiles = ["a.py", "/b.py"]',
            r'p.toml:9: \[model\] files\[1\] = "/b.py": expected',
        ),
        ('"digits.py"', '"digits.py"\nfiles = "a.py"', r"\[model\] files = \"a.py\": expected a list"),
    ],
)
def test_mistake_in_what_is_required(before: str, after: str, expected: str) -> None:
    assert re.search(expected, refusal(GOOD.replace(before, after)))


@pytest.mark.parametrize(
    "name",
    ["Digits", "a/b", "a:b", "-digits", "digits-", "9lives", "", "a" * 41, "ziffern_ä", "a.b", "a b", "--help", "a\n"],
)
def test_name_that_not_all_three_take(name: str) -> None:
    message = refusal(GOOD.replace('"digits"', f'"{name}"'.replace("\n", "\\n"), 1))
    assert "p.toml:2: [pipeline] name = " in message and "MLflow" in message
    offered = re.search(r'write: name = "([^"]*)"', message)
    assert offered is not None
    assert load_pipeline(GOOD.replace('"digits"', f'"{offered[1]}"', 1)).name == offered[1]


@pytest.mark.parametrize("name", ["a", "digits", "a" * 40, "a-1", "x9"])
def test_name_that_all_take(name: str) -> None:
    assert load_pipeline(GOOD.replace('"digits"', f'"{name}"', 1)).name == name
    assert slug(name) == name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("api_token", "hunter2"),
        ("password", "${HALF}x"),
        ("AWS-Secret", "hunter2"),
        ("private_key", "hunter2"),
        ("note", "AKIAIOSFODNN7EXAMPLE"),
        ("note", "ghp_" + "a1B2" * 9),
        ("url", "https://me:sesame@host/x"),
        ("note", "-----BEGIN RSA PRIVATE KEY-----"),
    ],
)
def test_literal_secret_is_refused_and_not_repeated(key: str, value: str) -> None:
    message = refusal(GOOD + f'[train.params]\n"{key}" = "{value}"\n')
    assert message.startswith(f'p.toml:13: [train.params] {key} = "***": expected no secret')
    assert value not in message and "${" in message


def test_secret_under_an_unknown_key_is_not_repeated() -> None:
    message = refusal(GOOD + 'token = "hunter2"\n')
    assert "hunter2" not in message and "***" in message


def test_secret_by_reference_and_words_that_only_look_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    text = (
        GOOD
        + '[train.params]\napi_token = "${MY_TOKEN}"\npad_token = "<pad>"\nmax_tokens = 5\nbase = "x/${MY_TOKEN}"\n'
    )
    params = load_pipeline(text).train.params
    assert params == {"api_token": "s3cret", "pad_token": "<pad>", "max_tokens": 5, "base": "x/s3cret"}


def test_the_value_of_an_environment_variable_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_METRIC", "s 3cret")
    message = refusal(GOOD + '[gate]\nmetric = "${MY_METRIC}"\n')
    assert "3cret" not in message and '"${MY_METRIC}"' in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"^p.toml:1: the file is empty; expected at least:\n\[pipeline\]"),
        ("  \n\n", r"the file is empty"),
        ("# nothing\n", r"nothing but comments"),
        ("name: digits\n", r"p.toml:1: 'name: digits': expected TOML.*; TOML writes key = value"),
        ("[pipeline]\nname = digits\n", r'p.toml:2: .*put it in quotes: name = "digits"'),
        ("[train]\nepochs =\n", r"p.toml:2: .*give the key a value"),
        ("[train]\ncompile = True\n", r"p.toml:2: .*write compile = true"),
        ("[train]\nepochs = 1\nepochs = 2\n", r"p.toml:3: .*the key stands twice; keep one"),
        ("[train]\na = 1\n[train]\n", r"p.toml:3: .*the section stands twice; keep one"),
        ('[train]\na = "x\nb = 1\n', r"p.toml:2: .*close what was opened"),
        ("[train\n", r"p.toml:1: .*close what was opened"),
        ("\t- a\n", r"p.toml:1: .*expected TOML"),
        ("api_token = hunter2\n", r"^(?!.*hunter2)p.toml:1: "),
        ("password: hunter2\n", r"^(?!.*hunter2)p.toml:1: "),
        ('api_token = "hunter2\n', r"^(?!.*hunter2)p.toml:1: "),
    ],
)
def test_broken_text(text: str, expected: str) -> None:
    assert re.search(expected, refusal(text), re.DOTALL)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; expected a pipeline file"):
        load_pipeline(tmp_path / "pipeline.toml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_pipeline(tmp_path)
    (tmp_path / "p.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="byte 8 is not UTF-8"):
        load_pipeline(tmp_path / "p.toml")


def test_all_mistakes_at_once_in_the_order_of_the_file() -> None:
    text = GOOD.replace('"digits"', '"Digits"', 1) + 'seed = -1\ndeadlin = "1h"\n[gate]\nminimum = nan\n'
    rows = refusal(text, "train.workers=0").split("\n")
    assert [row.split(":")[1] if row.startswith("p.toml") else row[:6] for row in rows] == [
        "--set ",
        "2",
        "12",
        "13",
        "15",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.epochs=abc", r'--set train.epochs = "abc": expected a whole number, without quotes'),
        ("train.epoch=3", r'--set train.epoch = 3: unknown key; did you mean "epochs"\?'),
        ("epochs=3", r"--set epochs=3: expected section.key=value"),
        ("train.epochs", r"expected section.key=value"),
        ("train.epochs.x=1", r"expected a section, and epochs is a value"),
        ("--train.epochs=1", r"expected section.key=value|unknown"),
        ("train.params.token=hunter2", r'token = "\*\*\*": expected no secret'),
    ],
)
def test_bad_override(override: str, expected: str) -> None:
    assert re.search(expected, refusal(GOOD, override))


def test_overrides_win_in_order_and_need_no_quotes() -> None:
    overrides = ["train.epochs=7", "train.params.rate=1e-3", "gate.metric=f1", "train.epochs=8", "serve.soak=2s"]
    settings = load_pipeline(GOOD, overrides=overrides)
    assert (settings.train.epochs, settings.train.params, settings.gate.metric) == (8, {"rate": 1e-3}, "f1")
    assert settings.serve.soak == 2.0


def test_what_decides_the_weights() -> None:
    settings = load_pipeline(GOOD)
    same = ["train.deadline=1h", "train.errors=9", "train.interruptions=1", "train.checkpoint.keep=5"]
    assert load_pipeline(GOOD, overrides=same).train.deciding() == settings.train.deciding()
    for other in (
        "train.seed=1",
        "train.batch_size=64",
        "train.params.width=3",
        "train.workers=2",
        "train.compile=true",
    ):
        assert load_pipeline(GOOD, overrides=[other]).train.deciding() != settings.train.deciding(), other
    fixed = [load_pipeline(GOOD, overrides=["train.shards=4", f"train.workers={n}"]).train.deciding() for n in (1, 2)]
    assert fixed[0] == fixed[1]


def test_find_pipeline_beside_above_or_in_the_demo(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"reprise demo.*--pipeline FILE"):
        find_pipeline(deep)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "pipeline.toml").touch()
    assert find_pipeline(tmp_path) == tmp_path / "demo" / "pipeline.toml"
    (tmp_path / "pipeline.toml").touch()
    assert find_pipeline(deep) == find_pipeline(tmp_path) == tmp_path / "pipeline.toml"


def test_find_pipeline_stays_in_its_repository(tmp_path: Path) -> None:
    (tmp_path / "pipeline.toml").touch()
    inner = tmp_path / "other"
    (inner / ".git").mkdir(parents=True)
    with pytest.raises(ConfigError, match="not found"):
        find_pipeline(inner)


def test_import_stays_cheap() -> None:
    program = "import sys, flows.settings; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert "pydantic" in loaded
    assert not {"prefect", "torch", "dvc", "mlflow", "yaml", "numpy", "pydantic_settings"} & set(loaded)


def test_later_errors_lead_back_to_their_key() -> None:
    settings = load_pipeline(GOOD, source_name="p.toml@3f2a9c1", overrides=["model.module=other.py"])
    with pytest.raises(PreflightError, match=r"^no remote$"), settings.blaming("data", "path"):
        raise PreflightError("no remote")
    with pytest.raises(ConfigError) as caught, settings.blaming("data", "path"):
        raise ConfigError("DVC does not track it")
    assert str(caught.value) == 'p.toml@3f2a9c1:5: [data] path = "data/digits": DVC does not track it'
    with (
        pytest.raises(ConfigError, match=r'^--set model.module = "other.py": no such file'),
        settings.blaming("model", "module"),
    ):
        raise ConfigError("no such file")
    with (
        pytest.raises(ConfigError, match=r"^p.toml@3f2a9c1:4: \[data\] train: empty"),
        settings.blaming("data", "train"),
    ):
        raise ConfigError("empty")
