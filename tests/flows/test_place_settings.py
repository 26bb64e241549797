"""laptop.toml: the shipped one, a project's own one, what is refused in it; and a cluster where a laptop is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.errors import ConfigError
from flows.place_settings import load_place


def test_shipped_laptop_says_the_defaults(tmp_path: Path) -> None:
    place = load_place("laptop", tmp_path)
    assert (place.kind, place.state) == ("laptop", tmp_path / ".reprise")
    assert place.spot.interruptions == () and place.spot.grace == 10.0
    own = tmp_path / "laptop.toml"
    own.write_text('[place]\nkind = "laptop"\n')
    assert load_place("laptop", tmp_path).model_dump(exclude={"file"}) == place.model_dump(exclude={"file"})


def test_own_file_beside_the_pipeline_wins(tmp_path: Path) -> None:
    (tmp_path / "laptop.toml").write_text(
        '[place]\nkind = "laptop"\nstate = "/var/tmp/x"\n[ports]\nmlflow = 5000\n'
        '[spot]\ninterruptions = ["notice@35%", "kill@70.5%"]\n[resources.train_model]\ncpus = 2\nmemory = "2Gi"\n'
    )
    place = load_place("laptop", tmp_path)
    assert (place.state, place.ports.mlflow, place.file) == (Path("/var/tmp/x"), 5000, tmp_path / "laptop.toml")
    assert [str(i) for i in place.spot.interruptions] == ["notice@35%", "kill@70.5%"]
    assert (place.resources.train_model.memory, place.resources.pull_data.memory) == ("2Gi", "1Gi")
    assert load_place(tmp_path / "laptop.toml", tmp_path) == place


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        ("[ports]\nmlflow = 80", r"laptop.toml:4: \[ports\] mlflow = 80: expected a number of at least 1024"),
        ("[ports]\nmlflow = 70000", r"mlflow = 70000: expected a number of at most 65535"),
        ("[ports]\nmlflow = 14200", r":4: \[ports\] mlflow = 14200: expected a port of its own; prefect has 14200"),
        ('[spot]\ninterruptions = ["notice@35"]', r'interruptions\[0\] = "notice@35": expected "notice@P%"'),
        ('[spot]\ninterruptions = ["kill@101%"]', r"P from 0 to 100"),
        ('[spot]\ninterruptions = "kill@10%"', r"expected a list"),
        ('[resources.train_model]\nmemory = "10GBB"', r'memory = "10GBB": expected a memory size such as "512Mi"'),
        ('[resources.train_model]\nmemory = "0Mi"', r"greater than zero"),
        ("[resources.train_model]\nmemory = 512", r"memory = 512: expected a memory size .*in quotes"),
        ("[resources.train_model]\ncpus = 0", r"cpus = 0: expected a number greater than 0"),
        ("[resources.train]\ncpus = 1", r'\[resources\] train: unknown key; did you mean "train_model"\?'),
    ],
)
def test_mistake(tmp_path: Path, added: str, expected: str) -> None:
    (tmp_path / "laptop.toml").write_text(f'[place]\nkind = "laptop"\n{added}\n')
    with pytest.raises(ConfigError) as caught:
        load_place("laptop", tmp_path)
    assert re.search(expected, str(caught.value)), str(caught.value)


def test_unknown_place(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"place 'laptpo' is not known; did you mean \"laptop\"\?; expected one of: .*laptop"
    ):
        load_place("laptpo", tmp_path)
    with pytest.raises(ConfigError, match="no such file; expected a place file"):
        load_place("x.toml", tmp_path)


def test_both_shipped_places_are_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'did you mean "cluster"\?; expected one of: cluster, laptop, or'):
        load_place("clustr", tmp_path)


def test_a_cluster_is_refused_where_a_laptop_is_needed_with_what_works(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_place("cluster", tmp_path)
    message = str(caught.value)
    assert re.search(r'cluster\.toml:\d+: \[place\] kind = "cluster": this command is for a laptop', message)
    assert all(f"`reprise {name}`" in message for name in ("run", "preflight", "render", "gpu", "doctor"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[place]\nkind = "laptpo"', r'kind = "laptpo": expected "laptop" or "cluster"; did you mean "laptop"\?'),
        ("[place]\nkind = 3", r"kind = 3: expected 'laptop'"),
        ("[place]\n", r"kind: expected this key"),
        ('place = "laptop"', r'place = "laptop": expected a section'),
        ("[ports]\nmlflow = 5000", r"\[place\]: expected this section, with kind"),
    ],
)
def test_a_kind_that_is_none(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "laptop.toml").write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_place("laptop", tmp_path)
    assert re.search(expected, str(caught.value)), str(caught.value)
