"""By the clock, one at a time, and `down` in the middle: on real servers."""

from __future__ import annotations

import pytest

from tests.flows.triggers.laptop_kit import Project, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_schedule_fires_and_retrains(project: Project) -> None:
    project.change("seed = 7", "seed = 8")  # pushed, and not in the checkout: "origin/main" is fetched
    project.set_schedule('cron = "* * * * *"')
    flow_run = until(
        lambda: next((r["id"] for r in project.runs() if r["state"]["name"] in ("Pending", "Running")), ""),
        100,
        "a scheduled run starts",
    )
    project.set_schedule('cron = "* * * * *"\npaused = true')
    project.wait(flow_run, "Completed")
    document = project.document(flow_run)
    assert (document["cause"], document["git_sha"], document["status"]) == ("schedule", project.head(), "succeeded")
    name = (project.prefect.run(flow_run) or {})["name"]
    assert name == f"{document['run']} {project.head()[:7]} schedule"
    assert [r for r in project.runs() if r["state"]["type"] == "SCHEDULED"] == [], "paused: nothing is to come"


def test_one_retraining_at_a_time_and_the_next_waits_or_is_cancelled(project: Project) -> None:
    long = {"rev": "origin/main", "train": {"epochs": 200, "seed": 50}}
    first = project.start(**long)
    project.wait(first, "Running")
    second = project.start(rev="origin/main", train={"seed": 51})
    project.wait(second, "AwaitingConcurrencySlot", seconds=30)
    project.prefect.set_state(second, "CANCELLED", "Cancelled", "by test")
    project.set_schedule('overlap = "skip"')
    third = project.start(rev="origin/main", train={"seed": 52})
    project.wait(third, "Cancelled", seconds=30)
    project.set_schedule('overlap = "wait"')

    # Cancel in the UI is this state: the trainer saves, and a retry goes on where it was.
    until(lambda: project.trained_steps(first) > 50, 60, "it trains")
    project.prefect.set_state(first, "CANCELLING", "Cancelling", "by test")
    project.wait(first, "Cancelled", seconds=45)
    document = project.document(first)
    (attempt,) = document["attempts"]
    assert (document["status"], attempt["cause"], attempt["steps_lost"]) == ("cancelled", "cancelled", 0)
    assert attempt["to_step"] > 50
    project.prefect.set_state(first, "SCHEDULED", "AwaitingRetry", "by test", force=True)
    again = until(lambda: len(project.document(first)["attempts"]) == 2, 60, "the retry trains")
    assert again and project.document(first)["attempts"][1]["from_step"] == attempt["to_step"]
    assert project.document(first)["run"] == document["run"]
    project.prefect.set_state(first, "CANCELLING", "Cancelling", "by test")
    project.wait(first, "Cancelled", seconds=45)


def test_wrong_parameters_are_refused_by_the_server(project: Project) -> None:
    for wrong in ({"train": {"epochs": 0}}, {"rev": "--all"}, {"train": {"params": {"widht": 1}}}, {"nothing": 1}):
        with pytest.raises(Exception, match=r"answered 409|answered 422"):
            project.start(**wrong)


def test_down_lets_a_running_trainer_save_and_up_resumes_it(project: Project) -> None:
    flow_run = project.start(rev="origin/main", train={"epochs": 200, "seed": 92})
    until(lambda: project.trained_steps(flow_run) > 60, 90, "it trains")
    project.command("down")
    document = project.document(flow_run)
    assert document["status"] == "interrupted"
    assert document["attempts"][-1]["steps_lost"] == 0
    project.command("up")
    until(lambda: len(project.document(flow_run)["attempts"]) == 2, 120, "it goes on")
    assert project.document(flow_run)["attempts"][1]["from_step"] == document["attempts"][0]["to_step"]
    project.prefect.set_state(flow_run, "CANCELLING", "Cancelling", "by test")
    project.wait(flow_run, "Cancelled", seconds=60)
