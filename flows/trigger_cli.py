"""The commands with which runs start by themselves: `reprise deploy`, `serve` and `hook`.

    reprise hook --help

Not covered: the other commands (flows.__main__), the work (flows.trigger_commands, flows.serve).
"""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Group, Parameter

from flows.command_options import HERE, Json, Place, Target


def register(app: App, group: Group) -> None:
    """Add them to the command line, under a heading of their own."""
    what = "Retrain on git push: a receiver for forges, and a command for hooks and CI."
    hook = App(name="hook", help=what, group=group, sort_key=2)
    app.command(deploy, group=group, sort_key=0)
    app.command(serve, group=group, sort_key=1)
    app.command(hook)  # before its own commands: they take the version from it
    hook.command(hook_serve, name="serve")
    hook.command(hook_push, name="push")
    hook.command(hook_list, name="list")


def deploy(
    *,
    render: Annotated[bool, Parameter(help="Only print the prefect.yaml for stock `prefect deploy`.")] = False,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """Register schedule, parameter form and concurrency limit with Prefect, and start the worker."""
    from flows.trigger_commands import deploy_pipeline

    deploy_pipeline(pipeline=target.pipeline, place=target.place, render_only=render, as_json=json)


def serve(*, target: Target = HERE) -> None:
    """Run what Prefect schedules, resume flows that died, hand over pushes; `up` keeps this as a service."""
    from flows.serve import serve as serve_forever

    serve_forever(target.pipeline, target.place)


def hook_serve(
    *,
    pipeline: Annotated[tuple[str, ...], Parameter(name=["--pipeline", "-p"], help="One or more pipeline.toml.")] = (),
    host: Annotated[str, Parameter(help="Where to listen; a proxy or a tunnel stands before it.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="Pushes are posted to /push there.")] = 14300,
    place: Place = "laptop",
) -> None:
    """Receive pushes of GitHub, GitLab, Gitea and Forgejo, signed with the secret of [push]."""
    from flows.trigger_commands import receive_pushes

    receive_pushes(pipelines=pipeline or ("",), place=place, host=host, port=port)


def hook_push(
    before: Annotated[str, Parameter(help="The commit before the push.")],
    after: Annotated[str, Parameter(help="The commit after it.")],
    ref: Annotated[str, Parameter(help="What was pushed, such as refs/heads/main.")],
    /,
    *,
    wait: Annotated[float, Parameter(help="Seconds to wait for the decision.")] = 15.0,
    target: Target = HERE,
    json: Json = False,
) -> None:
    """One push, as a post-receive hook gets it. Kept and decided; the run starts in Prefect."""
    from flows.trigger_commands import push_from_hook

    push_from_hook(before, after, ref, wait=wait, pipeline=target.pipeline, place=target.place, as_json=json)


def hook_list(*, target: Target = HERE, json: Json = False) -> None:
    """The pushes that came in, and what became of each."""
    from flows.trigger_commands import list_pushes

    list_pushes(pipeline=target.pipeline, place=target.place, as_json=json)
