"""What there is: methods, models, data sets, options, configs, plans.

python tools/list.py                         an overview
python tools/list.py methods [NAME ...]      what is called so, else what holds all the words: methods relation
python tools/list.py models "timm:resnet*"   of timm or torchvision
python tools/list.py configs cifar100 vrm
python tools/list.py options SOLVER KD       sections of the configuration, or a method file: options my/METHOD.py
python tools/list.py --page docs/methods.md  or docs/options.md, docs/pictures/inside.svg, README.md: write anew

On a terminal, lines are cut to its width; piped, they are whole.
"""

import contextlib
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from mdistiller.dataset import dataset_dict
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import Parser, check_output, user_path
from mdistiller.engine.config.node import CONFIGS
from mdistiller.messages import as_typed, command_line
from mdistiller.models import ModelEntry
from mdistiller.models.any import is_foreign, names_like
from mdistiller.registry import MODEL_FAMILIES, InputError, Registry, UnknownName
from mdistiller.reports.listing import Row, chosen, table
from mdistiller.reports.methods import write_methods_page
from mdistiller.reports.options import option_rows, write_options_page
from mdistiller.reports.readme import write_readme_table
from mdistiller.reports.structure import draw

CHECKOUT = Path(__file__).resolve().parents[2]


def methods() -> list[Row]:
    names: dict[type, list[str]] = {}
    for name, cls in distiller_dict.items():
        names.setdefault(cls, []).append(name)
    rows = []
    for cls, (name, *others) in names.items():
        summary = re.sub(r"(?::\w+:)?`+~?(?:\w+\.)*(.+?)`+", r"\1", (cls.__doc__ or "").strip().split("\n")[0])
        called = f"{name} ({', '.join(others)})" if others else name
        rows.append((called, getattr(cls, "family", "") or "-", summary, getattr(cls, "paper", "") or "-"))
    return [("METHOD", "FAMILY", "SUMMARY", "PAPER"), *sorted(rows)]


def models(*patterns: str) -> list[Row]:
    """Those of the library, or of timm and torchvision by patterns."""
    if patterns:
        return [("MODEL", "PUBLIC WEIGHTS"), *(row for pattern in patterns for row in names_like(pattern))]
    rows = [("MODEL", "FOR", "PARAMETERS", "PUBLIC TEACHER")]
    for family, entries in MODEL_FAMILIES.items():
        for name in entries:
            entry = ModelEntry.of(entries[name])
            teacher = "torchvision" if entry.pretrained else "-"
            with torch.device("meta"):  # shapes without memory
                count = sum(p.numel() for p in entry().parameters())
            rows.append((name, family, f"{count:,}", "download_ckpts" if entry.weights else teacher))
    return rows


def datasets() -> list[Row]:
    rows = [("DATA SET", "CLASSES", "PIXELS", "MODELS", "VIEWS")]
    for name, cls in sorted(dataset_dict.items()):
        size = f"{cls.image_size}x{cls.image_size}"
        count = cls.num_classes if isinstance(cls.num_classes, int) else "its own"  # which the files tell
        rows.append((name, str(count), size, cls.model_family, ", ".join(cls.views)))
    return rows


def configs() -> list[Row]:
    return [("CONFIG",), *_yaml_files(lambda path: path.parent.name != "plans")]


def plans() -> list[Row]:
    return [("PLAN",), *_yaml_files(lambda path: path.parent.name == "plans")]


def _yaml_files(wanted: Callable[[Path], bool]) -> list[tuple[str]]:
    """The library's files below ``configs/`` without bases: ``_base_.yaml``, ``_pairs_/``."""
    found = [path.relative_to(CONFIGS.parent) for path in sorted(CONFIGS.rglob("*.yaml")) if wanted(path)]
    return [(str(path),) for path in found if not any(part.startswith("_") for part in path.parts)]


def options(*sections: str) -> list[Row]:
    """Those of sections; a file of methods stands for the sections of its methods."""
    known, files = set(distiller_dict), [section for section in sections if section.endswith(".py")]
    if files:
        load_config(options=["DISTILLER.PLUGINS", f"[{', '.join(files)}]"])
    for section in sections:
        with contextlib.suppress(UnknownName):
            distiller_dict[section.partition(".")[0]]  # finds a method file that was dropped into the package
    wanted = [section for section in sections if section not in files]
    wanted += [cls.section for name, cls in distiller_dict.items() if files and name not in known and cls.defaults]
    if sections and not wanted:
        raise InputError(f"{', '.join(files)} declares no options (DEFAULTS)")
    rows = [(key, default, meaning, allowed, role) for key, default, allowed, role, meaning in option_rows(wanted)]
    return [("OPTION", "DEFAULT", "MEANING", "ALLOWED", "ROLE"), *rows]


def methods_page(path: Path) -> None:
    measured = CHECKOUT / "docs" / "measurements"
    golden = CHECKOUT / "tests" / "golden"
    write_methods_page(path, measured / "step.json", measured / "memory.json", golden, command_line())


PAGES = Registry(
    "page", {"methods": methods_page, "options": write_options_page, "inside": draw, "README": write_readme_table}
)
LISTS = Registry("list", {rows.__name__: rows for rows in (methods, models, datasets, options, configs, plans)})


def overview(width: int) -> str:
    """Of each list the names and how to see it."""
    folders = Counter("/".join(path.split("/")[:2]) for (path,) in configs()[1:])
    names = {
        "methods": [row[0] for row in methods()[1:]],
        "models": [name for entries in MODEL_FAMILIES.values() for name in entries],
        "datasets": sorted(dataset_dict),
        "options": list(dict.fromkeys(row[0].split(".")[0] for row in options()[1:])),
        "configs": [f"{folder}/ ({count})" for folder, count in folders.items()],
        "plans": [path for (path,) in plans()[1:]],
    }
    lines = []
    for kind, found in names.items():
        lines.append(f"{kind.upper()}: python tools/list.py {kind} [{'SECTION' if kind == 'options' else 'WORD'} ...]")
        text = ", ".join(dict.fromkeys(found))
        lines += [*textwrap.wrap(text, width - 4, initial_indent="    ", subsequent_indent="    "), ""]
    return as_typed("\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("list", __doc__)
    parser.add_argument("what", nargs="*", help=f"{', '.join(LISTS)}; further words select entries", metavar="LIST")
    parser.add_argument(
        "--page",
        type=user_path,
        metavar="FILE",
        help="write a generated page instead: methods.md, options.md, inside.svg, README.md",
    )
    args = parser.parse_args(arguments)
    if args.page:
        if args.what:
            raise InputError(f"--page writes a page and lists nothing; leave out {' '.join(args.what)}")
        check_output(args.page, "--page")
        PAGES[args.page.stem](args.page)
        return
    terminal = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if not args.what:
        print(overview(terminal or 100))
        return
    asked: list[tuple[str, list[str]]] = []
    for word in args.what:
        if word in LISTS or not asked:
            LISTS[word]
            asked.append((word, []))
        else:
            asked[-1][1].append(word)
    for kind, words in asked:
        of_others = kind == "models" and any(map(is_foreign, words))
        rows = LISTS[kind](*words) if kind == "options" or of_others else LISTS[kind]()
        rows = chosen(rows, words, kind) if words and kind != "options" and not of_others else rows
        print(table([tuple(map(as_typed, row)) for row in rows], terminal), end="\n\n")
