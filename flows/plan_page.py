"""A plan as Markdown, for Prefect's run page. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from flows.plan import Plan


def plan_markdown(plan: Plan, *, changed: Sequence[str] = ()) -> str:
    """A table: step, what happens, why, key. `changed`: what this run has otherwise than pipeline.toml."""
    rows = [
        f"| {s.name} | {'reused' if s.reused else 'runs'} | {s.reason.replace('|', '/')} | `{s.key[:12]}` |"
        for s in plan.steps.values()
    ]
    data = f"`{plan.data.digest[:12]}` ({plan.data.nfiles} files, {_size(plan.data.size)})"
    head = f"**{plan.pipeline.name}** at commit `{plan.git_sha[:12]}`, data {data}, code `{plan.code_digest[:12]}`"
    other = ["", f"Changed for this run: {', '.join(f'`{text}`' for text in changed)}"] if changed else []
    return "\n".join([head, *other, "", "| step | what | why | key |", "|---|---|---|---|", *rows])


def _size(size: int | None) -> str:
    """Bytes for people: 133 kB."""
    number, units = float(size or 0), ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:.3g} {units[0]}"
