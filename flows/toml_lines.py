"""Where each key of a TOML text stands, because tomllib gives values without positions and an error needs its line.

`key_lines(text)` expects a text that tomllib accepts. It walks headers, keys and values (strings of all four kinds,
arrays, inline tables, comments) and notes the line of every key. Not covered: broken TOML (tomllib tells its line).
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field

KeyPath = tuple[str | int, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]}\s#][^,\]}\n#]*")


def key_lines(text: str) -> dict[KeyPath, int]:
    """Line (from 1) of each table header, key and array element, by its path: ("train", "params", "width") -> 14."""
    return _Scanner(text).scan()


@dataclass
class _Scanner:
    text: str
    at: int = 0
    table: KeyPath = ()
    lines: dict[KeyPath, int] = field(default_factory=dict)
    tables: dict[KeyPath, int] = field(default_factory=dict)  # how many elements an array of tables has so far

    def scan(self) -> dict[KeyPath, int]:
        while self._skip(newlines=True):
            if self._take("[["):
                self._header(array=True)
            elif self._take("["):
                self._header(array=False)
            else:
                self._pair(self.table)
        return self.lines

    def _note(self, path: KeyPath, at: int) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, at) + 1)

    def _take(self, literal: str) -> bool:
        if self.text.startswith(literal, self.at):
            self.at += len(literal)
            return True
        return False

    def _skip(self, *, newlines: bool) -> bool:
        """Past blanks and comments; whether anything is left."""
        pattern = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*" if newlines else r"[ \t]*")
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at
        return self.at < len(self.text)

    def _header(self, *, array: bool) -> None:
        began = self.at
        parts = self._key()
        self._take("]]" if array else "]")
        path: KeyPath = ()
        for number, part in enumerate(parts):
            path = (*path, part)
            last = number == len(parts) - 1
            if array and last:
                self.tables[path] = self.tables.get(path, -1) + 1
            self._note(path, began)
            if path in self.tables:
                path = (*path, self.tables[path])
                self._note(path, began)
        self.table = path

    def _key(self) -> tuple[str, ...]:
        parts: list[str] = []
        while True:
            self._skip(newlines=False)
            if self.text[self.at] in "\"'":
                began = self.at
                self._string()
                parts.append(tomllib.loads(f"key = {self.text[began : self.at]}")["key"])
            else:
                found = _BARE.match(self.text, self.at)
                if found is None:  # not reached for a text that tomllib accepts; never loop on one that it refuses
                    raise ValueError(f"no key at offset {self.at}")
                parts.append(found[0])
                self.at = found.end()
            self._skip(newlines=False)
            if not self._take("."):
                return tuple(parts)

    def _pair(self, table: KeyPath) -> None:
        began = self.at
        path = table
        for part in self._key():
            path = (*path, part)
            self._note(path, began)
        self._take("=")
        self._skip(newlines=False)
        self._value(path)

    def _value(self, path: KeyPath) -> None:
        if self.text[self.at] in "\"'":
            self._string()
        elif self._take("["):
            self._array(path)
        elif self._take("{"):
            while self._skip(newlines=True) and not self._take("}"):
                self._pair(path)
                self._skip(newlines=True)
                self._take(",")
        else:
            found = _SCALAR.match(self.text, self.at)
            self.at = found.end() if found else self.at + 1

    def _array(self, path: KeyPath) -> None:
        index = 0
        while self._skip(newlines=True) and not self._take("]"):
            self._note((*path, index), self.at)
            self._value((*path, index))
            index += 1
            self._skip(newlines=True)
            self._take(",")

    def _string(self) -> None:
        quote = self.text[self.at]
        triple = self.text.startswith(quote * 3, self.at)
        self.at += 3 if triple else 1
        while self.at < len(self.text):
            if quote == '"' and self.text[self.at] == "\\":
                self.at += 2
            elif self._take(quote * 3 if triple else quote):
                while triple and self._take(quote):  # a multi-line string may end in up to two quotes of its own
                    pass
                return
            else:
                self.at += 1
