"""A plan as Markdown, for Prefect's run page. Pure."""

from __future__ import annotations

from flows.plan import Plan


def plan_markdown(plan: Plan) -> str:
    """A table: step, what happens, why, key."""
    rows = [
        f"| {s.name} | {'reused' if s.reused else 'runs'} | {s.reason.replace('|', '/')} | `{s.key[:12]}` |"
        for s in plan.steps.values()
    ]
    data = f"{plan.data.digest[:12]} ({plan.data.nfiles} files, {plan.data.size} bytes)"
    head = f"**{plan.pipeline.name}** at commit `{plan.git_sha[:12]}`, data `{data}`, code `{plan.code_digest[:12]}`"
    return "\n".join([head, "", "| step | | why | key |", "|---|---|---|---|", *rows])
