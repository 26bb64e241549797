"""The parameters of a run as people fill them in: types with titles and bounds, and the form made of them.

`retrain`'s signature uses the types, so Prefect checks every run against them; `form` is the same as a JSON schema for
one pipeline: the fields carry the values of its pipeline.toml as defaults, and [train.params] become fields of their
own. What a person leaves as it is changes nothing. Not covered: registering the form (flows.triggers).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.settings import PipelineSettings

Cause = Literal["form", "schedule", "push", "command"]
Rev = Annotated[
    str,
    Field(
        title="Git revision",
        description="Branch, tag or commit to train at: its code, data pointer and parameters. "
        '"origin/main" is fetched first.',
        min_length=1,
        max_length=200,
        pattern=r"^[A-Za-z0-9_][^\s:?*\[\\]*$",
    ),
]
# A run is of its pipeline: [pipeline] is none of its settings, nor is when it starts ([schedule], [push]).
Setting = Annotated[
    str, Field(pattern=r"^(data|model|train|gate|serve|check|deploy|notify)(\.[A-Za-z0-9_-]+)+=.*$", max_length=2000)
]
Overrides = Annotated[
    list[Setting],
    Field(
        title="Other settings",
        description='Any other key of pipeline.toml for this run, one a line, such as "gate.minimum=0.9".',
        max_length=50,
    ),
]


class TrainingForm(BaseModel):
    """[train] for one run; what is not given is as in pipeline.toml."""

    model_config = ConfigDict(extra="forbid", title="Training")

    epochs: Annotated[
        int | None, Field(title="Epochs", description="Passes over the training data.", ge=1, le=100_000)
    ] = None
    batch_size: Annotated[
        int | None, Field(title="Batch size", description="Samples a step, over all workers.", ge=1, le=1_000_000)
    ] = None
    seed: Annotated[
        int | None, Field(title="Seed", description="Another seed is another training.", ge=0, le=2**31 - 1)
    ] = None
    precision: Annotated[
        Literal["float32", "bfloat16"] | None,
        Field(title="Precision", description="Of the numbers while training."),
    ] = None
    workers: Annotated[
        int | None, Field(title="Workers", description="Processes of torchrun; one a GPU.", ge=1, le=4096)
    ] = None
    params: Annotated[
        dict[str, bool | int | float | str],
        Field(title="The model's own", description="[train.params], read by the model's code."),
    ] = Field(default_factory=dict)


def defaults_of(schema: dict[str, Any]) -> dict[str, Any]:
    """What a registered form showed in [train] before anybody wrote in it; {} for a form without defaults."""
    training = (schema.get("definitions") or {}).get("TrainingForm") or {}
    fields = dict(training.get("properties") or {})
    params = fields.pop("params", {}).get("properties") or {}
    return {**_defaults(fields), "params": _defaults(params)}


def _defaults(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: field["default"] for name, field in fields.items() if field.get("default") is not None}


def overrides_of(
    train: TrainingForm | None, pipeline: PipelineSettings, *, shown: dict[str, Any] | None = None
) -> list[str]:
    """The fields that say something else than pipeline.toml, as "train.epochs=3".

    `shown` (`defaults_of`) is what the form said by itself. Prefect's page sends that too, and it is of the file that
    the form was made of, not of the one at another revision.
    """
    if train is None:
        return []
    shown = shown or {}
    given = train.model_dump(exclude_none=True)
    params = _written(given.pop("params", {}), shown.get("params", {}))
    given = _written(given, shown)
    changed = [f"train.{k}={_toml(v)}" for k, v in given.items() if getattr(pipeline.train, k) != v]
    return changed + [
        f"train.params.{k}={_toml(v)}"
        for k, v in params.items()
        if k not in pipeline.train.params or pipeline.train.params[k] != v
    ]


def _written(given: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in shown or value != shown[name]}


def _toml(value: object) -> str:
    """A scalar as TOML; JSON writes these four kinds alike."""
    return json.dumps(value)


def form(pipeline: PipelineSettings, *, place: str, revs: Sequence[str] = ()) -> dict[str, Any]:
    """The JSON schema of a deployment's parameters. `revs` are offered as examples of the revision."""
    training = TrainingForm.model_json_schema()
    for name, field in training["properties"].items():
        if name != "params":
            field |= {**field.pop("anyOf")[0], "default": getattr(pipeline.train, name)}
    params = pipeline.train.params
    if params:
        training["properties"]["params"] = {
            "type": "object",
            "title": "The model's own parameters",
            "description": "[train.params], read by the model's code.",
            "properties": {name: {**_typed(value), "title": name, "default": value} for name, value in params.items()},
            "additionalProperties": False,
        }
    else:
        del training["properties"]["params"]
    for at, field in enumerate(training["properties"].values()):
        field["position"] = at
    fields: dict[str, dict[str, Any]] = {
        "rev": {**_schema(Rev), "default": pipeline.schedule.rev, **({"examples": list(revs)} if revs else {})},
        "train": {
            "title": "Training",
            "description": "What is left as it stands is as in pipeline.toml at the revision; change what this run "
            "should have otherwise.",
            "allOf": [{"$ref": "#/definitions/TrainingForm"}],
        },
        "overrides": {**_schema(Overrides), "default": []},
        "cause": {
            "title": "Cause",
            "description": "Why this run is started; it becomes part of its name.",
            "type": "string",
            "enum": ["form", "schedule", "push", "command"],
            "default": "form",
        },
        "pipeline": {
            "title": "Pipeline file",
            "description": "Set by the deployment.",
            "type": "string",
            "enum": [str(pipeline.file)],
            "default": str(pipeline.file),
        },
        "place": {
            "title": "Place",
            "description": "Where it runs; set by the deployment.",
            "type": "string",
            "enum": [place],
            "default": place,
        },
    }
    return {
        "title": "Parameters",
        "type": "object",
        "properties": {name: {**field, "position": at} for at, (name, field) in enumerate(fields.items())},
        "required": [],
        "additionalProperties": False,
        "definitions": {"TrainingForm": training},
    }


def _schema(kind: Any) -> dict[str, Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind).json_schema()


def _typed(value: Any) -> dict[str, Any]:
    """The JSON type of a parameter as it stands in pipeline.toml; a whole number stays one."""
    if isinstance(value, bool):
        return {"type": "boolean"}
    if isinstance(value, int):
        return {"type": "integer"}
    return {"type": "number"} if isinstance(value, float) else {"type": "string"}
