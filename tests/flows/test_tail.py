"""Whole lines, each once, from where the file stood when following began."""

from __future__ import annotations

import time
from pathlib import Path

from flows.tail import following


def test_lines_appended_while_following_come_once_and_whole(tmp_path: Path) -> None:
    path, seen = tmp_path / "progress.jsonl", list[str]()
    path.write_text("old\n")
    with following(path, seen.append), path.open("a") as out:
        for part in ("a\nb", "c\n", "half"):
            out.write(part)
            out.flush()
            time.sleep(0.15)
    assert seen == ["a", "bc"]


def test_a_file_that_comes_later_is_followed_from_its_beginning(tmp_path: Path) -> None:
    path, seen = tmp_path / "progress.jsonl", list[str]()
    with following(path, seen.append):
        time.sleep(0.12)
        path.write_text("first\n")
    assert seen == ["first"]
