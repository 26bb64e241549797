"""The `reprise` command: what can be asked for, and how it ends.

    reprise --help

Each command imports what it needs when it runs. Exit codes: 0 fine, 1 failed, 2 usage or config, 3 preflight,
4 gate refused, 130 interrupted. Not covered: the work (the modules that the commands import), the options that
commands share (flows.command_options), the commands of triggers (flows.trigger_cli).
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__":  # before the other imports: the first process of a pod hears only what it has a handler for
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))

import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from deployments.errors import StepError
from flows.command_options import HEAD, HERE, ON_CLUSTER, ClusterWork, Json, RunId, Snapshot, Target, Work, shown
from flows.trigger_cli import register

app = App(
    name="reprise",
    help="Retraining that survives its own interruptions: DVC, spot training, MLflow, TorchServe, in one Prefect flow.",
    help_epilogue="Exit codes: 0 fine, 1 failed, 2 usage or config, 3 preflight (this place cannot run it), "
    "4 gate refused, 130 interrupted.",
    version="0.1.0",
    help_format="plaintext",
    default_parameter=Parameter(negative="", show_default=shown),  # no --no-json, no --empty-set
)
THIS_MACHINE, RUNS, MODELS, CLUSTER, BY_THEMSELVES, OPTIONS = (
    Group(title, sort_key=place)
    for place, title in enumerate(
        ("This machine", "Runs", "Models and what serves them", "A cluster", "Runs that start by themselves", "Options")
    )
)


@app.command(group=THIS_MACHINE, sort_key=0)
def demo(
    *,
    folder: Annotated[str, Parameter(help="Where the project is made.")] = "demo",
    example: Annotated[str, Parameter(help="digits or tumours.")] = "digits",
    json: Json = False,
) -> None:
    """Make a project and run the whole chain through two spot interruptions."""
    from flows.commands import run_demo

    run_demo(folder=folder, example=example, as_json=json)


@app.command(group=THIS_MACHINE, sort_key=2)
def up(*, target: Target = HERE) -> None:
    """Start Prefect, MLflow and TorchServe on loopback, if they do not run."""
    from flows.commands import start_services

    start_services(pipeline=target.pipeline, place=target.place)


@app.command(group=THIS_MACHINE, sort_key=3)
def down(*, target: Target = HERE) -> None:
    """Stop the services and whatever a run left behind. Data stays."""
    from flows.commands import stop_services

    stop_services(pipeline=target.pipeline, place=target.place)


@app.command(group=RUNS, sort_key=4)
def run(
    *,
    work: Work = HEAD,
    interrupt: Annotated[tuple[str, ...], Parameter(help="Play the spot market: notice@35%, kill@70%, kill@20s")] = (),
    detach: Annotated[bool, Parameter(help="On a cluster: ask for the run and leave it there.")] = False,
    json: Json = False,
) -> None:
    """Run the pipeline; every step that is already done for these inputs is reused."""
    from flows.commands import run_pipeline

    run_pipeline(work.order(interruptions=interrupt), as_json=json, detach=detach)


@app.command(group=RUNS, sort_key=5)
def plan(*, work: Work = HEAD, json: Json = False) -> None:
    """What would run, what is reused, and why. Nothing is started."""
    from flows.commands import show_plan

    show_plan(work.order(), as_json=json)


@app.command(group=RUNS, sort_key=6)
def runs(*, target: Target = HERE, json: Json = False) -> None:
    """All runs of this project."""
    from flows.inspect_runs import list_runs

    list_runs(target.order(), as_json=json)


@app.command(group=RUNS, sort_key=7)
def show(run: RunId = "", /, *, target: Target = HERE, json: Json = False) -> None:
    """One run (default: the newest): steps, attempts, results, links."""
    from flows.inspect_runs import show_run

    show_run(target.order(), run, as_json=json)


@app.command(group=RUNS, sort_key=8)
def logs(
    run: str = "",
    /,
    *,
    step: Annotated[str, Parameter(help="Only this step's.")] = "",
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], help="Until it ends.")] = False,
    target: Target = HERE,
) -> None:
    """The logs of a run's steps."""
    from flows.inspect_runs import show_logs

    show_logs(target.order(), run, step=step, follow=follow)


@app.command(group=RUNS, sort_key=9)
def resume(run: RunId = "", /, *, target: Target = HERE, json: Json = False) -> None:
    """Go on with a run that was interrupted, cancelled or failed, where it was."""
    from flows.commands import resume_run

    resume_run(target.order(), run, as_json=json)


@app.command(group=RUNS, sort_key=10)
def cancel(run: RunId = "", /, *, target: Target = HERE) -> None:
    """Stop a run; its training leaves a checkpoint that `resume` goes on from."""
    from flows.commands import cancel_and_tell

    cancel_and_tell(target.order(), run)


@app.command(group=MODELS, sort_key=11)
def rollback(
    *,
    to: Annotated[str, Parameter(help="Model version; default: the one that served before.")] = "",
    target: Target = HERE,
    json: Json = False,
) -> None:
    """Put an earlier model version back in service."""
    from flows.commands import roll_back

    roll_back(target.order(cause="rollback"), to, as_json=json)


@app.command(name="verify-resume", group=MODELS, sort_key=16)
def verify_resume(
    *,
    kills: Annotated[int, Parameter(help="How many, at random moments.")] = 10,
    seed: Annotated[int, Parameter(help="Decides the moments.")] = 0,
    work: Work = HEAD,
    json: Json = False,
) -> None:
    """Prove that interruptions change nothing: the certificate that a gate may require."""
    from flows.model_commands import prove_resume

    prove_resume(work.order(), kills=kills, seed=seed, as_json=json)


@app.command(group=MODELS, sort_key=13)
def trace(
    what: Annotated[str, Parameter(help="Version, alias or label; default: what is in service.")] = "",
    /,
    *,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """From a model version, alias or endpoint to its run, attempts, data and commit."""
    from flows.model_commands import show_trace

    show_trace(target.order(), what, as_json=json)


@app.command(name="who-uses", group=MODELS, sort_key=14)
def who_uses(
    digest: Annotated[str, Parameter(help="A DVC digest, or its first digits.")],
    /,
    *,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """The model versions that were trained on these data."""
    from flows.model_commands import show_uses

    show_uses(target.order(), digest, as_json=json)


@app.command(group=MODELS, sort_key=12)
def audit(
    *, repair: Annotated[bool, Parameter(help="Make them agree.")] = False, target: Target = HERE, json: Json = False
) -> None:
    """Whether alias, endpoint and archive say the same."""
    from flows.model_commands import audit as audit_endpoint

    audit_endpoint(target.order(), repair=repair, as_json=json)


@app.command(name="tune-serving", group=MODELS, sort_key=15)
def tune_serving(
    *,
    concurrency: Annotated[int, Parameter(help="Clients at once.")] = 16,
    seconds: Annotated[float, Parameter(help="Load per setting.")] = 5.0,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """Measure batch size, delay and workers for the model in service; writes [serve] and its curve."""
    from flows.model_commands import tune

    tune(target.order(), concurrency=concurrency, seconds=seconds, as_json=json)


@app.command(group=THIS_MACHINE, sort_key=1)
def doctor(*, snapshot: Snapshot = "", target: Target = HERE, json: Json = False) -> None:
    """What is missing here, or on a cluster, and the command that mends it."""
    from flows.cluster_commands import examine_place

    examine_place(target.order(), snapshot=snapshot, as_json=json)


@app.command(group=CLUSTER, sort_key=17)
def preflight(
    *,
    snapshot: Snapshot = "",
    save: Annotated[str, Parameter(help="Keep what was seen in this file.")] = "",
    work: ClusterWork = ON_CLUSTER,
    json: Json = False,
) -> None:
    """Whether a run would work on the cluster, row by row; nothing is created."""
    from flows.cluster_commands import show_cluster_preflight

    show_cluster_preflight(work.order(), snapshot=snapshot, save=save, as_json=json)


@app.command(group=CLUSTER, sort_key=18)
def render(
    *,
    step: Annotated[str, Parameter(help="Only this step's objects.")] = "",
    server: Annotated[
        bool, Parameter(help="Ask the API server whether it would take them; nothing is created.")
    ] = False,
    work: ClusterWork = ON_CLUSTER,
    json: Json = False,
) -> None:
    """Print the Kubernetes objects that a run would create, for kubectl."""
    from flows.cluster_commands import show_render

    show_render(work.order(), step=step, server=server, as_json=json)


@app.command(group=CLUSTER, sort_key=19)
def gpu(
    *,
    prometheus: Annotated[str, Parameter(help="Its URL; default: PROMETHEUS_URL.")] = "",
    minutes: Annotated[float, Parameter(help="How far back.")] = 60.0,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """How well runs use their GPUs, and the likely reason where they do not."""
    from flows.cluster_commands import show_gpu_use

    show_gpu_use(target.order(), prometheus=prometheus, minutes=minutes, as_json=json)


register(app, BY_THEMSELVES)
app["--help"].group = app["--version"].group = OPTIONS


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; never a traceback for a user's mistake."""
    try:
        app(arguments, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except StepError as error:
        from flows.display import complain

        complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


if __name__ == "__main__":
    main()
