"""The README's file tree, made from what each file says of itself, so that it cannot grow untrue.

    .venv/bin/python tests/readme_tree.py           # rewrite the tree in README.md
    .venv/bin/python tests/readme_tree.py --check   # exit code 1 if it is not up to date

A Python file's line is the first line of its docstring; other files are named with their folder. Not covered: tests.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->\n"
PACKAGES = {
    "flows": "in which order; the only package that imports Prefect",
    "tasks": "what each step does; imports neither Prefect nor Kubernetes",
    "training": "what runs on the GPUs; torch and nothing of ours above it",
    "deployments": "where things run; knows nothing of the three above",
}
WIDTH = 28


def lines() -> Iterator[str]:
    """The tree, a line per file."""
    for package, what in PACKAGES.items():
        yield f"{package + '/':<{WIDTH}}{what}"
        for path in sorted((ROOT / package).glob("*.py")):
            if path.stem != "__init__":
                yield f"  {path.name:<{WIDTH - 2}}{first_line(path)}"
        for folder in sorted(p for p in (ROOT / package).iterdir() if p.is_dir() and p.name != "__pycache__"):
            names = sorted(p.name for p in folder.iterdir() if p.name != "__pycache__")
            yield f"  {folder.name + '/':<{WIDTH - 2}}{', '.join(names)}"
        others = sorted(p.name for p in (ROOT / package).iterdir() if p.is_file() and p.suffix != ".py")
        if others:
            yield f"  {', '.join(others)}"
    yield f"{'tests/':<{WIDTH}}mirrors the packages; test_laptop.py is the laptop end to end; bench_*.py benchmarks"


def first_line(path: Path) -> str:
    """What the file says of itself, in one line."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0].rstrip(".")


def main() -> int:
    """Rewrite or check."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + "```\n" + "\n".join(lines()) + "\n```\n" + END + after
    if "--check" in sys.argv:
        return int(wanted != text)
    readme.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
