"""What the terminal shows: tables and progress on a terminal, plain lines elsewhere, JSON when asked.

Colour and tables come from rich, which is imported only when a terminal is there to see them; NO_COLOR is honoured by
rich. Not covered: what is shown (the commands).
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.report_words import duration

SIGNS = {"done": "✓", "reused": "↺", "running": "▸", "failed": "✗", "pending": "·", "cancelled": "■"}


def on_terminal() -> bool:
    """Whether a person watches standard output."""
    return sys.stdout.isatty()


def say(text: str = "", *, style: str = "") -> None:
    """A line for a person."""
    if on_terminal() and style:
        from rich.console import Console
        from rich.text import Text

        Console(highlight=False).print(Text(text, style=style), soft_wrap=True)
    else:
        print(text, flush=True)


def moving(text: str) -> None:
    """On a terminal, the one line that changes in place; empty text takes it away. Elsewhere nothing."""
    if on_terminal():
        sys.stdout.write(f"\r\x1b[2K{text[: max(20, shutil.get_terminal_size().columns - 1)]}")
        sys.stdout.flush()


def complain(text: str) -> None:
    """An error, to standard error."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, highlight=False).print(Text("error: ", style="bold red") + Text(text), soft_wrap=True)
    else:
        print(f"error: {text}", file=sys.stderr, flush=True)


def show_json(document: Any) -> None:
    """The machine's reading of a command."""
    print(json.dumps(document, indent=1, sort_keys=True, default=str))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table: drawn on a terminal, tab-separated elsewhere."""
    if not on_terminal():
        for row in [columns, *rows]:
            print("\t".join(row), flush=True)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*columns, title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(highlight=False).print(drawn)


def next_commands(*commands: str) -> None:
    """The last lines of a command: what one would type next, with the command as it can be typed here."""
    if commands:
        say()
        name = command_name()
        for command in commands:
            say(f"  {name}{command.removeprefix('reprise')}", style="dim")


def command_name() -> str:
    """`reprise` where the shell finds this installation by that name, otherwise its path from here."""
    ours = Path(sys.executable).with_name("reprise")
    found = shutil.which("reprise")
    if (found and Path(found).resolve() == ours.resolve()) or not ours.exists():
        return "reprise"
    return str(ours.relative_to(Path.cwd())) if ours.is_relative_to(Path.cwd()) else str(ours)


def seconds(value: float | None) -> str:
    """A length of time as the report says it; nothing for None."""
    return "" if value is None else duration(value)


def ago(moment: float | None) -> str:
    """A point in time for a person."""
    return f"{seconds(max(0.0, time.time() - moment))} ago" if moment else ""


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
