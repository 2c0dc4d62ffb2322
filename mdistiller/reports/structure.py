"""The parts of the library and their imports, read from the code; drawn for ``docs/inside.md``."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

PACKAGE = "mdistiller"
ROOT = Path(__file__).resolve().parents[2]
BOX, GAP, ROW, MARGIN = (132, 40), 14, 76, 20  # pixels: width and height of a box, between boxes, between rows, around
COLOURS = ("#e8f0fe", "#1a56db")  # of a box, of its outline


def imports_of(path: Path, root: Path) -> set[str]:
    """The dotted names of all imports in a file, also within functions; relative imports are made absolute.

    Args:
        path: a Python file.
        root: the checkout that holds the package.
    """
    package = list(path.relative_to(root).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            names += [".".join([*start, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return set(names)


def part_of(name: str) -> str:
    """The part of a dotted name: ``mdistiller.dataset.views`` is in ``dataset``, ``tools.train`` in ``tools``."""
    first, *rest = name.split(".")
    return rest[0] if first == PACKAGE and rest else first


def parts(root: Path) -> dict[str, set[str]]:
    """Each part, and the parts that it imports."""
    graph: dict[str, set[str]] = {}
    for top in (PACKAGE, "tools"):
        for path in sorted((root / top).rglob("*.py")):
            part = part_of(".".join(path.relative_to(root).with_suffix("").parts))
            if part not in ("__init__", "__main__"):
                names = {part_of(name) for name in imports_of(path, root) if name.startswith(f"{PACKAGE}.")}
                graph.setdefault(part, set()).update(names - {part, "__version__"})
    return graph


def levels(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The parts by rows, the lowest row last. A part is as low as possible, but above all parts that it imports."""
    height: dict[str, int] = {}

    def place(part: str) -> int:
        if part not in height:
            height[part] = 1 + max((place(below) for below in graph[part] if below in graph), default=-1)
        return height[part]

    for part in graph:
        place(part)
    return [sorted(p for p in graph if height[p] == row) for row in range(max(height.values()), -1, -1)]


def without_detours(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The graph without arrows that a chain of other arrows implies."""

    def reach(part: str) -> set[str]:
        return graph[part].union(*(reach(below) for below in graph[part]))

    return {part: {b for b in below if not any(b in reach(o) for o in below - {b})} for part, below in graph.items()}


def draw(path: Path) -> None:
    """Write the picture: one box for each part, an arrow to each part that it imports, chains of arrows left out.

    Args:
        path: the SVG file.
    """
    graph = parts(ROOT)
    rows = levels(graph)
    width = max(len(row) for row in rows) * (BOX[0] + GAP) - GAP + 2 * MARGIN
    places = {}
    for number, row in enumerate(rows):
        start = (width - len(row) * (BOX[0] + GAP) + GAP) / 2
        places |= {part: (start + i * (BOX[0] + GAP), MARGIN + number * ROW) for i, part in enumerate(row)}
    height = 2 * MARGIN + (len(rows) - 1) * ROW + BOX[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
    ]
    for part, below in without_detours(graph).items():
        for other in sorted(below):
            (x, y), (u, v) = places[part], places[other]
            lines.append(
                f'<line x1="{x + BOX[0] / 2:g}" y1="{y + BOX[1]:g}" x2="{u + BOX[0] / 2:g}" y2="{v:g}" '
                'stroke="#667" marker-end="url(#tip)"/>'
            )
    for part, (x, y) in places.items():
        box = f'x="{x:g}" y="{y:g}" width="{BOX[0]}" height="{BOX[1]}" rx="6"'
        middle = f'x="{x + BOX[0] / 2:g}" y="{y + BOX[1] / 2 + 5:g}" text-anchor="middle"'
        lines.append(f'<rect {box} fill="{COLOURS[0]}" stroke="{COLOURS[1]}"/>')
        lines.append(f'<text {middle} font-size="15">{escape(part)}</text>')
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")
