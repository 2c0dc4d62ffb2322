"""All options of the configuration as a listing and as a page, read from their declarations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.options import OPTIONS, Option, options_of_dataset, options_of_method
from mdistiller.registry import InputError, dataset_dict, distiller_dict, suggestion

COLUMNS = ("option", "default", "allowed", "role", "meaning")
INTRODUCTION = """# The options

Made by `python tools/list.py --page docs/options.md` from the code; do not edit by hand. `python tools/list.py options
SECTION` prints one section.

A value stands in a YAML file or follows its key on the command line. The role says what a value decides:

- result: the learning, and data: the images and batches. Both roles decide whether two runs of a plan are equal. A
  run cannot be resumed with another value, unless the role says "may change". A method's stage before training is
  computed again if a value of the role data differs.
- speed: the way of computing; results are equal up to rounding. place: folders, files and logs.
- ignored: a key of mdistiller that configs may hold, and that this library does not read.
"""


def all_options() -> dict[str, Option]:
    """The options of the library, of all data sets and of all methods, by dotted key."""
    options = dict(OPTIONS)
    for dataset in dataset_dict.values():
        options |= options_of_dataset(dataset)
    for method in distiller_dict.values():
        for key, option in options_of_method(method).items():
            options.setdefault(key, option)
    sections = list(dict.fromkeys(key.split(".")[0] for key in OPTIONS))

    def place(key: str) -> tuple[int, str]:
        """The library's sections in the order of their declarations, then the methods' sections by name."""
        section = key.split(".")[0]
        return (sections.index(section), "") if section in sections else (len(sections), section)

    return {key: options[key] for key in sorted(options, key=place)}


def option_rows(sections: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """A row of :data:`COLUMNS` for each option.

    Args:
        sections: first parts of keys, ``SOLVER`` for example; empty: all options.

    Raises:
        InputError: there is no such section.
    """
    options = all_options()
    known = dict.fromkeys(key.rpartition(".")[0] for key in options)
    for section in sections:
        if not any(f"{name}.".startswith(f"{section}.") for name in known):
            raise InputError(f"no section named {section!r}; {suggestion(section, known)}")
    return [
        (key, _shown(option.default), option.allowed or "-", _role(option), option.help or "-")
        for key, option in options.items()
        if not sections or any(key.startswith(f"{section}.") for section in sections)
    ]


def write_options_page(path: Path) -> None:
    """Write the page, with a table for each section."""
    methods: dict[str, list[str]] = {}
    for name, method in sorted(distiller_dict.items()):
        methods.setdefault(method.section, []).append(f"`{name}`")
    lines, section = [INTRODUCTION], ""
    for key, *cells in option_rows():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            users = f"Read by {', '.join(methods[section])}.\n\n" if section in methods else ""
            heads = "| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|"
            lines.append(f"\n## {section}\n\n{users}{heads}")
        default, *rest = (cell.replace("|", "\\|") for cell in cells)
        lines.append("| " + " | ".join([f"`{key}`", f"`{default}`", *rest]) + " |")
    path.write_text("\n".join(lines) + "\n")


def _shown(value: Any) -> str:
    """A default as a user would type it."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, dict):
        return str(dict(value))
    return str(list(value) if isinstance(value, tuple) else value)


def _role(option: Option) -> str:
    return f"{option.role}; may change" if option.resumable else option.role
