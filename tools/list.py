"""What there is: methods, models, data sets, options, configs.

python tools/list.py [methods|models|datasets|configs|plans ...]
python tools/list.py options [SOLVER KD ...]
python tools/list.py --page docs/methods.md
python tools/list.py --page docs/options.md
python tools/list.py --page docs/pictures/inside.svg
python tools/list.py --page README.md
"""

import argparse
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mdistiller.dataset import dataset_dict
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cli import check_output, command
from mdistiller.models import ModelEntry
from mdistiller.registry import MODEL_FAMILIES, Registry
from mdistiller.reports.methods import write_methods_page
from mdistiller.reports.options import COLUMNS, option_rows, write_options_page
from mdistiller.reports.readme import write_readme_table
from mdistiller.reports.structure import draw

ROOT = Path(__file__).resolve().parents[1]


def methods() -> list[tuple[str, ...]]:
    rows = [("METHOD", "FAMILY", "PAPER", "SUMMARY")]
    for name, cls in sorted(distiller_dict.items()):
        summary = re.sub(r"(?::\w+:)?`+~?(?:\w+\.)*(.+?)`+", r"\1", (cls.__doc__ or "").strip().split("\n")[0])
        rows.append((name, getattr(cls, "family", "") or "-", getattr(cls, "paper", "") or "-", summary))
    return rows


def models() -> list[tuple[str, ...]]:
    rows = [("MODEL", "FOR", "PARAMETERS", "PUBLIC TEACHER")]
    for family, table in MODEL_FAMILIES.items():
        for name in table:
            entry = ModelEntry.of(table[name])
            teacher = "torchvision" if entry.pretrained else "-"
            with torch.device("meta"):  # shapes without memory
                count = sum(p.numel() for p in entry().parameters())
            rows.append((name, family, f"{count:,}", "download_ckpts" if entry.weights else teacher))
    return rows


def datasets() -> list[tuple[str, ...]]:
    rows = [("DATA SET", "CLASSES", "PIXELS", "MODELS", "VIEWS")]
    for name, cls in sorted(dataset_dict.items()):
        size = f"{cls.image_size}x{cls.image_size}"
        count = cls.num_classes if isinstance(cls.num_classes, int) else "its own"  # which the files tell
        rows.append((name, str(count), size, cls.model_family, ", ".join(cls.views)))
    return rows


def configs() -> list[tuple[str, ...]]:
    return [("CONFIG",), *_yaml_files(lambda path: path.parent.name != "plans")]


def plans() -> list[tuple[str, ...]]:
    return [("PLAN",), *_yaml_files(lambda path: path.parent.name == "plans")]


def _yaml_files(wanted: Callable[[Path], bool]) -> list[tuple[str]]:
    """Files below ``configs/``, as seen from the checkout, without bases: ``_base_.yaml``, ``_pairs_/``."""
    found = [path.relative_to(ROOT) for path in sorted((ROOT / "configs").rglob("*.yaml")) if wanted(path)]
    return [(str(path),) for path in found if not any(part.startswith("_") for part in path.parts)]


def options(*sections: str) -> list[tuple[str, ...]]:
    return [tuple(name.upper() for name in COLUMNS), *option_rows(sections)]


def methods_page(path: Path) -> None:
    measured, command = ROOT / "docs" / "measurements", shlex.join(["python", *sys.argv])
    write_methods_page(path, measured / "step.json", measured / "memory.json", ROOT / "tests" / "golden", command)


PAGES = Registry(
    "page", {"methods": methods_page, "options": write_options_page, "inside": draw, "README": write_readme_table}
)
LISTS = (methods, models, datasets, options, configs, plans)
SECTIONS = Registry("section", {rows.__name__: rows for rows in LISTS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="default: all", metavar="SECTION")
    parser.add_argument(
        "--page",
        type=Path,
        metavar="FILE",
        help="instead: write what is made from the code: methods.md, options.md, inside.svg, README.md",
    )
    args = parser.parse_args()
    if args.page:
        check_output(args.page, "--page")
        PAGES[args.page.stem](args.page)
        return
    some = args.what[:1] == ["options"]  # what follows are sections of the configuration
    for rows in [options(*args.what[1:])] if some else [SECTIONS[name]() for name in args.what or SECTIONS]:
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print()


if __name__ == "__main__":
    command(main)
