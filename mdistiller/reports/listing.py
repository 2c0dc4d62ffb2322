"""Listings for a terminal: rows of texts, chosen by words, cut to a width."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mdistiller.registry import InputError, suggestion

Row = tuple[str, ...]


def names_in(cell: str) -> list[str]:
    """``"MLKD (KD_ours)"`` names two."""
    return re.findall(r"[^\s(),]+", cell)


def chosen(rows: Sequence[Row], words: Sequence[str], kind: str) -> list[Row]:
    """The head and the rows that are called as one of the words; without any such, those that hold all the words.

    Letter case is ignored.

    Raises:
        InputError: no row fits.
    """
    head, *rows = rows
    wanted = {word.lower() for word in words}
    called = [row for row in rows if wanted & {name.lower() for name in names_in(row[0])}]
    found = called or [row for row in rows if all(word in " ".join(row).lower() for word in wanted)]
    if not found:
        names = [name for row in rows for name in names_in(row[0])]
        raise InputError(f"nothing in the list of {kind} fits {' '.join(words)!r}; {suggestion(words[0], names)}")
    return [head, *found]


def table(rows: Sequence[Row], width: int | None = None) -> str:
    """The rows in columns, each line cut to ``width`` characters, if that is given."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(wide) for cell, wide in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines)
