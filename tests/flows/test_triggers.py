"""What `reprise deploy` registers, as Prefect's own models read it, and the prefect.yaml that says the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import DeploymentCreate
from prefect.events.schemas.automations import AutomationCore

from flows.place_settings import PlaceSettings, load_place
from flows.settings import PipelineSettings, load_pipeline
from flows.triggers import AUTOMATION, SILENCE_SECONDS, deployment, register, render
from tests.flows.push_kit import git
from tests.flows.test_settings import GOOD

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = '[schedule]\ncron = "0 3 * * 1-5"\ntimezone = "Europe/Berlin"\nrev = "origin/main"\n'


@pytest.fixture
def place(tmp_path: Path) -> PlaceSettings:
    git(tmp_path, "init", "-q")
    return load_place("laptop", tmp_path)


def pipeline(folder: Path, more: str = "") -> PipelineSettings:
    return load_pipeline(GOOD + more, file=folder / "pipeline.toml")


def test_prefect_reads_it(tmp_path: Path, place: PlaceSettings) -> None:
    made = DeploymentCreate.model_validate(
        {"flow_id": "00000000-0000-0000-0000-000000000000", **deployment(pipeline(tmp_path, SCHEDULE), place)}
    )
    assert made.entrypoint == "flows.retrain.retrain" and made.path is None
    assert made.concurrency_limit == 1
    (schedule,) = made.schedules or []
    assert schedule.active and schedule.parameters == {"rev": "origin/main", "cause": "schedule"}
    # A Quick run has these and not the form's defaults: the same revision.
    assert made.parameters == {"pipeline": str(tmp_path / "pipeline.toml"), "place": "laptop", "rev": "origin/main"}


@pytest.mark.parametrize(
    ("more", "schedules", "strategy"),
    [
        ("", [], "ENQUEUE"),
        (SCHEDULE, [True], "ENQUEUE"),
        (SCHEDULE + "paused = true\n", [False], "ENQUEUE"),
        (SCHEDULE + 'overlap = "skip"\n', [True], "CANCEL_NEW"),
    ],
)
def test_schedule_pause_and_overlap(
    tmp_path: Path, place: PlaceSettings, more: str, schedules: list[bool], strategy: str
) -> None:
    made = deployment(pipeline(tmp_path, more), place)
    assert [s["active"] for s in made["schedules"]] == schedules
    assert made["concurrency_options"] == {"collision_strategy": strategy}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", "on demand, at `HEAD`"),
        (SCHEDULE, "at `origin/main`"),
        ("[deploy]\napproval = true\n", "if the gate accepts it and a person approves."),
    ],
)
def test_the_description_says_when_and_what_it_takes(
    tmp_path: Path, place: PlaceSettings, more: str, said: str
) -> None:
    assert said in deployment(pipeline(tmp_path, more), place)["description"]


def test_the_flow_takes_every_parameter_of_the_form(tmp_path: Path, place: PlaceSettings) -> None:
    """In a process of its own: importing Prefect here would slow every other test file."""
    program = "import inspect; from flows.retrain import retrain; print(*inspect.signature(retrain.fn).parameters)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    fields = deployment(pipeline(tmp_path), place)["parameter_openapi_schema"]["properties"]
    assert done.stdout.split() == sorted(fields, key=lambda name: int(fields[name]["position"]))


def test_a_folder_called_flows_of_the_user_is_not_taken_for_ours(tmp_path: Path, place: PlaceSettings) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    command = deployment(pipeline(tmp_path), place)["job_variables"]["command"]
    assert " -P -m prefect.engine" in command
    argv = [*command.split(" -m ")[0].split(), "-c", "import flows.retrain"]
    assert subprocess.run(argv, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_the_rendered_and_the_shipped_file_say_what_is_registered(tmp_path: Path, place: PlaceSettings) -> None:
    loaded = pipeline(tmp_path, SCHEDULE)
    rendered, made = yaml.safe_load(render(loaded, place)), deployment(loaded, place)
    (one,) = rendered["deployments"]
    for key in ("name", "entrypoint", "parameters", "tags", "description"):
        assert one[key] == made[key]
    assert rendered["pull"] == made["pull_steps"]
    assert one["work_pool"] == {"name": made["work_pool_name"], "job_variables": made["job_variables"]}
    shipped = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())
    (template,) = shipped["deployments"]
    assert set(template) == set(one) and set(template["schedules"][0]) == set(one["schedules"][0])
    assert template["entrypoint"] == one["entrypoint"] and template["concurrency_limit"] == one["concurrency_limit"]
    assert set(template["work_pool"]["job_variables"]) == set(one["work_pool"]["job_variables"])


def test_registering_again_renews_and_prefect_reads_the_automation(
    tmp_path: Path, place: PlaceSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str, Any]] = []
    there: list[dict[str, Any]] = []

    def call(self: object, method: str, path: str, body: Any = None) -> Any:
        calls.append((method, path, body))
        return there if path == "/automations/filter" else {"id": "i1", "name": "n"}

    monkeypatch.setattr("flows.prefect_api.Prefect.call", call)
    assert register(pipeline(tmp_path), place) == "i1"
    body = next(b for m, p, b in calls if (m, p) == ("POST", "/automations/"))
    automation = AutomationCore.model_validate(body)
    assert automation.name == AUTOMATION
    assert automation.trigger.within.total_seconds() == SILENCE_SECONDS == 90  # type: ignore[union-attr]
    there.append({"id": "a1"})
    calls.clear()
    register(pipeline(tmp_path), place)
    assert [(m, p) for m, p, _ in calls if "automations" in p] == [
        ("POST", "/automations/filter"),
        ("PUT", "/automations/a1"),
    ]
