"""The parameter form: its schema by a JSON schema validator, and what its answers change."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from flows.form import TrainingForm, defaults_of, form, overrides_of
from flows.settings import PipelineSettings, load_pipeline
from tests.flows.test_settings import GOOD

TEXT = GOOD + '[train.params]\nwidth = 16\nrate = 0.003\nflip = true\nname = "a"\n'


@pytest.fixture
def pipeline() -> PipelineSettings:
    return load_pipeline(TEXT)


@pytest.fixture
def schema(pipeline: PipelineSettings) -> dict[str, Any]:
    made = form(pipeline, place="laptop", revs=["HEAD", "main"])
    jsonschema.Draft202012Validator.check_schema(made)
    return made


def errors(schema: dict[str, Any], answers: dict[str, Any]) -> list[str]:
    return [".".join(map(str, e.path)) for e in jsonschema.Draft202012Validator(schema).iter_errors(answers)]


def test_every_field_has_a_title_a_description_and_a_place(schema: dict[str, Any]) -> None:
    fields = schema["properties"]
    assert [n for n, f in sorted(fields.items(), key=lambda i: i[1]["position"])] == [
        "rev", "train", "overrides", "cause", "pipeline", "place",
    ]  # fmt: skip
    training = schema["definitions"]["TrainingForm"]["properties"]
    for name, field in {**fields, **training}.items():
        assert field["title"] and field["description"].endswith((".", '"')), name


def test_defaults_are_those_of_the_file(schema: dict[str, Any], pipeline: PipelineSettings) -> None:
    training = schema["definitions"]["TrainingForm"]["properties"]
    assert {n: f["default"] for n, f in training.items() if n != "params"} == {
        "epochs": 3, "batch_size": 32, "seed": 0, "precision": "float32", "workers": 1,
    }  # fmt: skip
    params = training["params"]["properties"]
    assert {n: (f["type"], f["default"]) for n, f in params.items()} == {
        "width": ("integer", 16), "rate": ("number", 0.003), "flip": ("boolean", True), "name": ("string", "a"),
    }  # fmt: skip


def test_the_answers_as_they_stand_change_nothing(schema: dict[str, Any], pipeline: PipelineSettings) -> None:
    training = schema["definitions"]["TrainingForm"]["properties"]
    answers = {n: f["default"] for n, f in training.items() if n != "params"}
    answers["params"] = {n: f["default"] for n, f in training["params"]["properties"].items()}
    assert errors(schema, {"rev": "HEAD", "train": answers, "overrides": []}) == []
    assert overrides_of(TrainingForm(**answers), pipeline) == []
    assert overrides_of(None, pipeline) == []


def test_what_is_changed_becomes_an_override(pipeline: PipelineSettings) -> None:
    answers = TrainingForm(epochs=5, params={"rate": 0.1, "width": 16, "name": 'say "hi"', "depth": 2})
    changed = overrides_of(answers, pipeline)
    assert changed == [
        "train.epochs=5", "train.params.rate=0.1", 'train.params.name="say \\"hi\\""', "train.params.depth=2",
    ]  # fmt: skip
    other = load_pipeline(TEXT, overrides=changed).train
    assert (other.epochs, other.params["rate"], other.params["name"]) == (5, 0.1, 'say "hi"')


def test_what_is_left_as_it_stands_is_as_at_the_revision(schema: dict[str, Any], pipeline: PipelineSettings) -> None:
    """Prefect's page sends every field. The form was made of one file, the run is of another revision's."""
    shown = defaults_of(schema)
    assert shown["epochs"] == 3 and shown["params"]["rate"] == 0.003
    left = {**shown, "params": dict(shown["params"])}
    there = load_pipeline(TEXT.replace("epochs = 3", "epochs = 20").replace("width = 16\n", "depth = 5\n"))
    assert overrides_of(TrainingForm(**left), there) != [], "the case that is meant: what stands there is another value"
    assert overrides_of(TrainingForm(**left), there, shown=shown) == []
    left["params"]["rate"] = 0.1
    assert overrides_of(
        TrainingForm(
            **left,
        ),
        there,
        shown=shown,
    ) == ["train.params.rate=0.1"]
    assert overrides_of(TrainingForm(**{**left, "epochs": 4}), there, shown=shown)[0] == "train.epochs=4"


def test_a_form_that_shows_nothing_by_itself() -> None:
    """Registered by stock `prefect deploy`: made of the flow's signature."""
    assert defaults_of({}) == {"params": {}}
    assert defaults_of({"definitions": {"TrainingForm": {"properties": {"epochs": {"default": None}}}}}) == {
        "params": {}
    }


@pytest.mark.parametrize(
    "answers",
    [
        {"train": {"epochs": 0}},
        {"train": {"epochs": "many"}},
        {"train": {"batch_size": -1}},
        {"train": {"precision": "fp8"}},
        {"train": {"epoch": 3}},
        {"train": {"params": {"width": "wide"}}},
        {"train": {"params": {"widht": 3}}},
        {"rev": "--upload-pack=x"},
        {"rev": "a b"},
        {"rev": ""},
        {"nothing": 1},
        {"overrides": ["epochs"]},
        {"overrides": ["pipeline.name=other"]},
        {"overrides": ["schedule.cron=* * * * *"]},
        {"overrides": ["gate.metric=" + "x" * 2000]},
        {"cause": "boredom"},
        {"place": "moon"},
        {"pipeline": "/etc/passwd"},
    ],
)
def test_wrong_answers_are_refused(schema: dict[str, Any], answers: dict[str, Any]) -> None:
    assert errors(schema, answers)


@pytest.mark.parametrize("rev", ["HEAD", "HEAD~1", "main", "origin/main", "v1.2", "a" * 40])
def test_revisions(schema: dict[str, Any], rev: str) -> None:
    assert errors(schema, {"rev": rev}) == []


def test_the_flow_refuses_them_again() -> None:
    for wrong in ({"epochs": 0}, {"precision": "fp8"}, {"epoch": 3}, {"seed": -1}):
        with pytest.raises(ValidationError):
            TrainingForm(**wrong)  # type: ignore[arg-type]


def test_a_pipeline_without_parameters_of_its_own() -> None:
    made = form(load_pipeline(GOOD), place="laptop")
    assert "params" not in made["definitions"]["TrainingForm"]["properties"]
