"""`reprise demo`: a real project made here, trained through two spot interruptions, and put into service.

    reprise demo                    # digits in ./demo, one interruption with notice and one without
    reprise demo --example tumours  # a table instead of images

The project is an ordinary one (git, DVC with a local remote, pipeline.toml, one Python module); what happens to it
afterwards is `reprise run` like anywhere else.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from flows.display import say
from flows.execute import execute
from flows.start import Order

INTERRUPTIONS = ("notice@35%", "kill@70%")


def demo(*, folder: str, example: str, quiet: bool) -> dict[str, Any]:
    """Make the project if it is not there, run its pipeline through both interruptions; returns the run's document."""
    from flows.example import create_project

    project = Path(folder).absolute()
    if not (project / "pipeline.toml").exists():
        say(f"making a project in {project}: git, DVC with a local remote, data, pipeline.toml", style="dim")
    create_project(example, project)
    document = execute(Order(pipeline=str(project / "pipeline.toml"), interruptions=INTERRUPTIONS), quiet=quiet)
    return document


def curl_line(project: Path, document: dict[str, Any], heldout: Path) -> str:
    """A command to paste that asks the endpoint about one held-out sample, which is written beside the project."""
    with heldout.open() as lines:
        first = json.loads(next(iter(lines)))
    sample = project / ".reprise" / f"sample{Path(first['name']).suffix or '.txt'}"
    sample.write_bytes(base64.b64decode(first["body_b64"]))
    shown = sample.relative_to(Path.cwd()) if sample.is_relative_to(Path.cwd()) else sample
    return f"curl -T {shown} {document['endpoint']}"
