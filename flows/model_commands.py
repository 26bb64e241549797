"""`reprise trace`, `who-uses`, `audit`, `tune-serving`, `verify-resume`: questions about models and what serves them.

Each asks whoever knows (flows.ask, tasks.tune_serving, flows.verify) and shows the answer, which is the same on a
cluster for the first three. Not covered: parsing the command line (flows.__main__).
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from deployments.errors import GiveUp
from flows.ask import ask, audit_question, trace_question
from flows.display import next_commands, say, show_json, table
from flows.laptop_only import laptop_only
from flows.questions import UsesQuestion
from flows.settings import load_pipeline
from flows.start import Order, there, where


def show_trace(order: Order, what: str, *, as_json: bool) -> None:
    """`reprise trace`: version -> run -> attempts -> DVC digest -> commit."""
    found = ask(order, trace_question(order, what), quiet=as_json)
    if as_json:
        show_json(found)
        return
    say(f"{found['model']} version {found['version']}" + (", in service" if found["in_service"] else ""), style="bold")
    rows = [
        ["gate", found["gate"]],
        ["metrics", ", ".join(f"{k} {v:.4g}" for k, v in sorted(found["metrics"].items()))],
        ["run", f"{found['run']} (MLflow run {found['run_id']})"],
        ["attempts", f"{found['attempt_count']}, {found['interruption_count']} interruptions"],
        ["data", found["data_digest"]],
        ["code", found["code_digest"]],
        ["commit", found["git_sha"]],
        ["MLflow", found["model_url"]],
        *([["gap", gap] for gap in found["gaps"]]),
    ]
    for name, value in rows:
        say(f"{name:<10} {value}")
    if attempts := found["attempts"]:
        table(
            ["attempt", "cause", "steps", "reason"],
            [[str(a["number"]), a["cause"], f"{a['from_step']}-{a['reached_step']}", a["reason"]] for a in attempts],
        )
    next_commands(
        f"reprise show {found['run']}{there(order)}", f"reprise who-uses {found['data_digest'][:12]}{there(order)}"
    )


def show_uses(order: Order, digest: str, *, as_json: bool) -> None:
    """`reprise who-uses`: the model versions trained on these data."""
    from tasks.lineage import check_digest

    check_digest(digest)  # before a pod is started for it
    uses = ask(order, UsesQuestion(digest=digest), quiet=as_json)["uses"]
    if as_json:
        show_json(uses)
        return
    if not uses:
        say(f"no model version was trained on data {digest}")
        return
    names = ("model", "version", "aliases", "gate", "run", "commit", "data")
    rows = [
        [
            u["model"],
            u["version"],
            ", ".join(u["aliases"]),
            u["gate"],
            u["run"],
            u["git_sha"][:12],
            u["data_digest"][:12],
        ]
        for u in uses
    ]
    table(names, rows)
    next_commands(f"reprise trace {uses[0]['version']}{there(order)}")


def audit(order: Order, *, repair: bool, as_json: bool) -> None:
    """`reprise audit`: whether alias, endpoint and archive say the same. Raises GiveUp if they do not."""
    found = ask(order, audit_question(order, repair=repair), quiet=as_json)
    name = found["pipeline"]
    if as_json:
        show_json(found)
    else:
        served = f"version {found['version']} ({found['label']})" if found["version"] else "nothing"
        say(f"{name}: {served} in service" + (", repaired" if found["repaired"] else ""))
        if found["findings"]:
            rows = [[f["what"], f["found"], f["expected"]] for f in found["findings"]]
            table(["what", "found", "expected"], rows)
    if not found["clean"]:
        mend = f"reprise audit --repair{there(order)}"
        raise GiveUp(f"{name}: alias, endpoint and archive do not agree; `{mend}` makes them")


def tune(order: Order, *, concurrency: int, seconds: float, as_json: bool) -> None:
    """`reprise tune-serving`: batch size, delay and workers measured on this machine; writes [serve] and a picture."""
    from tasks.tune_serving import TuneRequest, tune_serving

    laptop_only(order, "tune-serving")
    file, place, store = where(order)
    pipeline = load_pipeline(file)
    serving = (store.read(f"endpoints/{pipeline.name}") or {}).get("serving")
    if not serving:
        raise GiveUp(f"{pipeline.name}: nothing is in service to be measured; start with: reprise run")
    out = place.state / "tuning"
    tuned = tune_serving(
        TuneRequest(
            pipeline=pipeline.name,
            mar=serving["mar"],
            heldout=serving["golden"],
            out=str(out),
            concurrency=concurrency,
            seconds=seconds,
            max_p95_seconds=pipeline.check.max_p95,
        )
    )
    if as_json:
        show_json(asdict(tuned))
        return
    rows = [
        [
            str(p.setting.batch_size),
            f"{p.setting.max_batch_delay_ms} ms",
            str(p.setting.workers),
            f"{p.per_second:.0f}/s",
            f"{p.p50_ms:.1f} ms",
            f"{p.p95_ms:.1f} ms",
            f"{p.p99_ms:.1f} ms",
        ]
        for p in tuned.points
    ]
    table(["batch", "delay", "workers", "answers", "p50", "p95", "p99"], rows)
    say(f"best: {tuned.times_batch_one:.1f} times the answers of batch 1, at {concurrency} clients")
    say(Path(tuned.serve_toml).read_text().rstrip())
    say(f"the curve: {tuned.picture}")


def prove_resume(order: Order, *, kills: int, seed: int, as_json: bool) -> None:
    """`reprise verify-resume`: the certificate that interruptions change nothing."""
    from flows.verify import verify_resume

    laptop_only(order, "verify-resume")
    certificate = verify_resume(order, kills=kills, seed=seed, quiet=as_json)
    if as_json:
        show_json(certificate)
        return
    say(
        f"✓ {certificate['kills']} kills in {len(certificate['interrupted'])} trainings: every hash is equal",
        style="green",
    )
    for name, value in certificate["uninterrupted"].items():
        say(f"  {name:<18} {value}")
    say(f"certificate: {certificate['file']}")
    next_commands("reprise run")
