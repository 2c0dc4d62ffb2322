"""Imports point down, and ``import mdistiller`` needs little."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cli_runner import ROOT

from mdistiller.reports.structure import draw, imports_of, part_of

# Each part of the package and what it may import of it. Parts that stand side by side do not know each other.
NETWORKS_AND_DATA = {"registry", "options", "contract", "functional", "messages"}
BELOW_ENGINE = NETWORKS_AND_DATA | {"distillers", "dataset", "models", "files", "consent"}
MAY_IMPORT = {
    "registry": set(),
    "options": {"registry"},
    "contract": {"registry"},
    "functional": {"registry"},
    "messages": {"functional"},
    "files": {"registry"},
    "forks": {"registry", "messages"},
    "consent": {"registry", "files"},
    "distillers": NETWORKS_AND_DATA | {"models"},
    "dataset": NETWORKS_AND_DATA,
    "models": NETWORKS_AND_DATA,
    "dense": NETWORKS_AND_DATA | {"distillers"},
    "plugins": {"registry", "options", "files", "contract", "messages", "distillers", "forks"},
    "engine": BELOW_ENGINE | {"plugins", "forks"},
    "detection": BELOW_ENGINE | {"engine", "dense"},
    "analysis": BELOW_ENGINE,
    "reports": BELOW_ENGINE | {"engine", "analysis", "plugins"},
    "bench": BELOW_ENGINE | {"engine"},
    "fetch": BELOW_ENGINE | {"engine"},
    "hub": BELOW_ENGINE | {"engine", "fetch"},
    "export": BELOW_ENGINE | {"engine"},
    "commands": BELOW_ENGINE | {"engine", "analysis", "reports", "bench", "export"},
    "__main__": {"commands", "engine", "registry"},
    "tools": {"commands", "engine"},
}
FILES = [
    path
    for folder in ("mdistiller", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path != ROOT / "mdistiller" / "__init__.py"
]


def parts_of(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    return {part_of(name) for name in imports_of(path, ROOT) if name.startswith("mdistiller.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert parts_of(path) - {own, "__version__"} <= MAY_IMPORT[own]


def test_the_picture_of_the_parts_is_up_to_date(tmp_path):
    picture = ROOT / "docs" / "pictures" / "inside.svg"
    draw(tmp_path / "now.svg")
    assert picture.read_text() == (tmp_path / "now.svg").read_text(), "make pages"


@pytest.mark.parametrize("name", ["download.py", "archive.py"])
def test_downloads_and_tars_are_for_any_part(name):
    """A data set may need them, and may not import the engine."""
    assert parts_of(ROOT / "mdistiller" / "fetch" / name) <= {"files", "registry"}


WITHOUT_THE_REST = """
import sys
from importlib.machinery import PathFinder

REST = {"tensorboardX", "tqdm", "wandb", "sklearn", "scipy", "matplotlib", "safetensors", "timm", "pytest"}

class NotInstalled(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in REST else super().find_spec(name, path, target)

sys.meta_path = [NotInstalled if finder is PathFinder else finder for finder in sys.meta_path]
import mdistiller, mdistiller.distillers, mdistiller.models, mdistiller.dataset, mdistiller.engine, mdistiller.reports
from mdistiller.engine.cfg import CFG

CFG.merge_from_list(["DISTILLER.TYPE", "KD", "DATASET.TYPE", "digits", "SOLVER.LR", "1"])
CFG.freeze()
assert (CFG.SOLVER.LR, CFG.is_frozen()) == (1.0, True)
assert not REST & set(sys.modules)
"""


def test_the_package_imports_with_torch_torchvision_numpy_and_yacs():
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_REST], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_configuration_loads_in_a_fresh_process():
    """``load_config`` once knew no data set unless a program had imported the data sets."""
    code = "from mdistiller.engine.cfg import load_config; load_config()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
