"""The commands of ``docs/export.md``: from images in folders to an ONNX student."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from cli_runner import ROOT, run_tool
from PIL import Image
from sklearn.datasets import load_digits

pytest.importorskip("timm")
onnxruntime = pytest.importorskip("onnxruntime")

NAMES = ["zero", "one", "two"]


def write_digits(folder: Path, count: int = 25) -> None:
    """The first images of three digits as PNG files."""
    digits = load_digits()
    for label, name in enumerate(NAMES):
        (folder / name).mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == label][:count]):
            picture = Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32))
            picture.save(folder / name / f"{number}.png")


def test_the_three_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "photos")
    page = (ROOT / "docs" / "export.md").read_text()
    lines = re.search(r"```bash\n(.*?)```", page, re.DOTALL)[1].replace("\\\n", " ").splitlines()
    added = re.search(r"add `(.*?)` to both trainings", page)[1]
    commands = [shlex.split(line) for line in lines if line.startswith("python tools/")]
    assert [Path(script).stem for _, script, *_ in commands] == ["train", "train", "export"]
    for _, script, *arguments in commands:
        more = shlex.split(f"{added} DATASET.NUM_WORKERS 0 SOLVER.DEVICE cpu") if "train" in script else []
        outcome = run_tool(Path(script).stem, [*arguments, *more])
        assert (outcome.code, outcome.err) == (0, "")
    out = tmp_path / "output" / "folder" / "student" / "export"
    results = json.loads((out.parent / "results.json").read_text())
    record = json.loads((out / "export.json").read_text())
    assert {facts["test"]["top1"] for name, facts in record["files"].items() if "test" in facts} == {
        results["last"]["top1"]
    }
    session = onnxruntime.InferenceSession(out / "student.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == sorted(NAMES)
    card = (out / "card.md").read_text()
    assert "with the teacher timm:resnet10t" in card or "distilled from timm:resnet10t" in card
    assert "0. one\n1. two\n2. zero" in card

    (tmp_path / "photos").rename(tmp_path / "elsewhere")  # the run knows its classes
    outcome = run_tool("export", [out.parent])
    assert outcome.code == 2 and "cannot be scored without the run's images" in outcome.err
    quick = ["--formats", "safetensors"]
    assert run_tool("export", [out.parent, *quick, "--no-score"]).code == 0
    moved = run_tool("export", [out.parent, *quick, "--set", "DATASET.FOLDER.TRAIN", tmp_path / "elsewhere"])
    assert (moved.code, moved.err) == (0, "")
