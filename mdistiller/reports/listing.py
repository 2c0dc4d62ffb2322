"""Listings for a terminal: rows of texts, filtered by words and cut to a width."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mdistiller.registry import InputError, suggestion

Row = tuple[str, ...]


def names_in(cell: str) -> list[str]:
    """The names in a cell, two for ``"MLKD (KD_ours)"``."""
    return re.findall(r"[^\s(),]+", cell)


def chosen(rows: Sequence[Row], words: Sequence[str], kind: str) -> list[Row]:
    """The head and the rows whose name is one of the words; if there is none, the rows that contain all words.

    Letter case is ignored.

    Raises:
        InputError: no row matches.
    """
    head, *rows = rows
    lower = {word.lower() for word in words}
    named = [row for row in rows if lower & {name.lower() for name in names_in(row[0])}]
    matches = named or [row for row in rows if all(word in " ".join(row).lower() for word in lower)]
    if not matches:
        names = [name for row in rows for name in names_in(row[0])]
        raise InputError(f"nothing in the list of {kind} matches {' '.join(words)!r}; {suggestion(words[0], names)}")
    return [head, *matches]


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """The rows in columns; each line is cut to ``width`` characters, ``None``: not cut."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines)
