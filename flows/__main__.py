"""The `reprise` command: what can be asked for, and how it ends.

    reprise --help

Each command imports what it needs when it runs. Exit codes: 0 fine, 1 run failed, 2 usage or config, 3 preflight,
4 gate refused, 130 interrupted. Not covered: the work (the modules that the commands import).
"""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from deployments.errors import StepError

app = App(
    name="reprise",
    help="Retraining that survives its own interruptions: DVC, spot training, MLflow, TorchServe, in one Prefect flow.",
    version="0.1.0",
    help_format="plaintext",
)

Pipeline = Annotated[
    str, Parameter(name=["--pipeline", "-p"], help="The pipeline.toml; default: here, above, or demo/.")
]
Place = Annotated[str, Parameter(help="Where to run: laptop, cluster, or a .toml file.")]
ClusterName = Annotated[str, Parameter(name="--place", help="Which cluster: cluster, or a .toml file.")]
Snapshot = Annotated[str, Parameter(help="A cluster's state from this file, not from the cluster.")]
Json = Annotated[bool, Parameter(name="--json", negative="", help="For machines.")]
Rev = Annotated[str, Parameter(help="Git revision to train at: code, data pointer and parameters.")]
Set = Annotated[tuple[str, ...], Parameter(name="--set", negative="", help="Change a setting: train.epochs=3")]


@app.command
def demo(
    *,
    folder: Annotated[str, Parameter(help="Where the project is made.")] = "demo",
    example: Annotated[str, Parameter(help="digits or tumours.")] = "digits",
    json: Json = False,
) -> None:
    """Make a project and run the whole chain through two spot interruptions."""
    from flows.commands import run_demo

    run_demo(folder=folder, example=example, as_json=json)


@app.command
def up(*, pipeline: Pipeline = "", place: Place = "laptop") -> None:
    """Start Prefect, MLflow and TorchServe on loopback, if they do not run."""
    from flows.commands import start_services

    start_services(pipeline=pipeline, place=place)


@app.command
def down(*, pipeline: Pipeline = "", place: Place = "laptop") -> None:
    """Stop the services and whatever a run left behind. Data stays."""
    from flows.commands import stop_services

    stop_services(pipeline=pipeline, place=place)


@app.command
def run(
    *,
    pipeline: Pipeline = "",
    rev: Rev = "HEAD",
    set: Set = (),
    place: Place = "laptop",
    interrupt: Annotated[
        tuple[str, ...], Parameter(negative="", help="Play the spot market: notice@35%, kill@70%, kill@20s")
    ] = (),
    detach: Annotated[bool, Parameter(negative="", help="On a cluster: ask for the run and leave it there.")] = False,
    json: Json = False,
) -> None:
    """Run the pipeline; every step that is already done for these inputs is reused."""
    from flows.commands import run_pipeline
    from flows.start import Order

    order = Order(pipeline=pipeline, rev=rev, overrides=set, place=place, interruptions=interrupt)
    run_pipeline(order, as_json=json, detach=detach)


@app.command
def plan(
    *, pipeline: Pipeline = "", rev: Rev = "HEAD", set: Set = (), place: Place = "laptop", json: Json = False
) -> None:
    """What would run, what is reused, and why. Nothing is started."""
    from flows.commands import show_plan
    from flows.start import Order

    show_plan(Order(pipeline=pipeline, rev=rev, overrides=set, place=place), as_json=json)


@app.command
def runs(*, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """All runs of this project."""
    from flows.inspect_runs import list_runs
    from flows.start import Order

    list_runs(Order(pipeline=pipeline, place=place), as_json=json)


@app.command
def show(run: str = "", /, *, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """One run (default: the newest): steps, attempts, results, links."""
    from flows.inspect_runs import show_run
    from flows.start import Order

    show_run(Order(pipeline=pipeline, place=place), run, as_json=json)


@app.command
def logs(
    run: str = "",
    /,
    *,
    step: Annotated[str, Parameter(help="Only this step's.")] = "",
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="", help="Until it ends.")] = False,
    pipeline: Pipeline = "",
    place: Place = "laptop",
) -> None:
    """The logs of a run's steps."""
    from flows.inspect_runs import show_logs
    from flows.start import Order

    show_logs(Order(pipeline=pipeline, place=place), run, step=step, follow=follow)


@app.command
def resume(run: str = "", /, *, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """Go on with a run that was interrupted, cancelled or failed, where it was."""
    from flows.commands import resume_run
    from flows.start import Order

    resume_run(Order(pipeline=pipeline, place=place), run, as_json=json)


@app.command
def cancel(run: str = "", /, *, pipeline: Pipeline = "", place: Place = "laptop") -> None:
    """Stop a run; its training leaves a checkpoint that `resume` goes on from."""
    from flows.commands import cancel_and_tell
    from flows.start import Order

    cancel_and_tell(Order(pipeline=pipeline, place=place), run)


@app.command
def rollback(
    *,
    to: Annotated[str, Parameter(help="Model version; default: the one that served before.")] = "",
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """Put an earlier model version back in service."""
    from flows.commands import roll_back
    from flows.start import Order

    roll_back(Order(pipeline=pipeline, place=place, cause="rollback"), to, as_json=json)


@app.command(name="verify-resume")
def verify_resume(
    *,
    kills: Annotated[int, Parameter(help="How many, at random moments.")] = 10,
    seed: Annotated[int, Parameter(help="Of the kills.")] = 0,
    pipeline: Pipeline = "",
    rev: Rev = "HEAD",
    set: Set = (),
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """Prove that interruptions change nothing: the certificate that a gate may require."""
    from flows.model_commands import prove_resume
    from flows.start import Order

    order = Order(pipeline=pipeline, rev=rev, overrides=set, place=place)
    prove_resume(order, kills=kills, seed=seed, as_json=json)


@app.command
def trace(what: str = "", /, *, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """From a model version, alias or endpoint (default: what is in service) to its run, attempts, data and commit."""
    from flows.model_commands import show_trace
    from flows.start import Order

    show_trace(Order(pipeline=pipeline, place=place), what, as_json=json)


@app.command(name="who-uses")
def who_uses(digest: str, /, *, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """The model versions that were trained on these data (a DVC digest or its first digits)."""
    from flows.model_commands import show_uses
    from flows.start import Order

    show_uses(Order(pipeline=pipeline, place=place), digest, as_json=json)


@app.command
def audit(
    *,
    repair: Annotated[bool, Parameter(negative="", help="Make them agree.")] = False,
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """Whether alias, endpoint and archive say the same."""
    from flows.model_commands import audit as audit_endpoint
    from flows.start import Order

    audit_endpoint(Order(pipeline=pipeline, place=place), repair=repair, as_json=json)


@app.command(name="tune-serving")
def tune_serving(
    *,
    concurrency: Annotated[int, Parameter(help="Clients at once.")] = 16,
    seconds: Annotated[float, Parameter(help="Load per setting.")] = 5.0,
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """Measure batch size, delay and workers for the model in service; writes [serve] and its curve."""
    from flows.model_commands import tune
    from flows.start import Order

    tune(Order(pipeline=pipeline, place=place), concurrency=concurrency, seconds=seconds, as_json=json)


@app.command
def doctor(*, snapshot: Snapshot = "", pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """What is missing here, or on a cluster, and the command that mends it."""
    from flows.cluster_commands import examine_place
    from flows.start import Order

    examine_place(Order(pipeline=pipeline, place=place), snapshot=snapshot, as_json=json)


@app.command
def preflight(
    *,
    snapshot: Snapshot = "",
    save: Annotated[str, Parameter(help="Keep what was seen in this file.")] = "",
    pipeline: Pipeline = "",
    rev: Rev = "HEAD",
    set: Set = (),
    place: ClusterName = "cluster",
    json: Json = False,
) -> None:
    """Whether a run would work on the cluster, row by row; nothing is created."""
    from flows.cluster_commands import show_cluster_preflight
    from flows.start import Order

    order = Order(pipeline=pipeline, rev=rev, overrides=set, place=place)
    show_cluster_preflight(order, snapshot=snapshot, save=save, as_json=json)


@app.command
def render(
    *,
    step: Annotated[str, Parameter(help="Only this step's objects.")] = "",
    server: Annotated[
        bool, Parameter(negative="", help="Ask the API server whether it would take them; nothing is created.")
    ] = False,
    pipeline: Pipeline = "",
    rev: Rev = "HEAD",
    set: Set = (),
    place: ClusterName = "cluster",
    json: Json = False,
) -> None:
    """Print the Kubernetes objects that a run would create, for kubectl."""
    from flows.cluster_commands import show_render
    from flows.start import Order

    order = Order(pipeline=pipeline, rev=rev, overrides=set, place=place)
    show_render(order, step=step, server=server, as_json=json)


@app.command
def gpu(
    *,
    prometheus: Annotated[str, Parameter(help="Its URL; default: PROMETHEUS_URL.")] = "",
    minutes: Annotated[float, Parameter(help="How far back.")] = 60.0,
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """How well runs use their GPUs, and the likely reason where they do not."""
    from flows.cluster_commands import show_gpu_use
    from flows.start import Order

    show_gpu_use(Order(pipeline=pipeline, place=place), prometheus=prometheus, minutes=minutes, as_json=json)


@app.command
def deploy(
    *,
    render: Annotated[
        bool, Parameter(negative="", help="Only print the prefect.yaml for stock `prefect deploy`.")
    ] = False,
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """Register schedule, parameter form and concurrency limit with Prefect, and start the worker."""
    from flows.trigger_commands import deploy_pipeline

    deploy_pipeline(pipeline=pipeline, place=place, render_only=render, as_json=json)


@app.command
def serve(*, pipeline: Pipeline = "", place: Place = "laptop") -> None:
    """Run what Prefect schedules, resume flows that died, hand over pushes; `up` keeps this as a service."""
    from flows.serve import serve as serve_forever

    serve_forever(pipeline, place)


hook = App(name="hook", help="Retrain on git push: a receiver for forges, and a command for hooks and CI.")
app.command(hook)


@hook.command(name="serve")
def hook_serve(
    *,
    pipeline: Annotated[
        tuple[str, ...], Parameter(name=["--pipeline", "-p"], negative="", help="One or more pipeline.toml.")
    ] = (),
    host: Annotated[str, Parameter(help="Where to listen; a proxy or a tunnel stands before it.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="POST /push")] = 14300,
    place: Place = "laptop",
) -> None:
    """Receive pushes of GitHub, GitLab, Gitea and Forgejo, signed with the secret of [push]."""
    from flows.trigger_commands import receive_pushes

    receive_pushes(pipelines=pipeline or ("",), place=place, host=host, port=port)


@hook.command(name="push")
def hook_push(
    before: str,
    after: str,
    ref: str,
    /,
    *,
    wait: Annotated[float, Parameter(help="Seconds to wait for the decision.")] = 15.0,
    pipeline: Pipeline = "",
    place: Place = "laptop",
    json: Json = False,
) -> None:
    """One push, as a post-receive hook gets it: OLD NEW REF. Kept and decided; the run starts in Prefect."""
    from flows.trigger_commands import push_from_hook

    push_from_hook(before, after, ref, wait=wait, pipeline=pipeline, place=place, as_json=json)


@hook.command(name="list")
def hook_list(*, pipeline: Pipeline = "", place: Place = "laptop", json: Json = False) -> None:
    """The pushes that came in, and what became of each."""
    from flows.trigger_commands import list_pushes

    list_pushes(pipeline=pipeline, place=place, as_json=json)


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
