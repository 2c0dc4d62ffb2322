"""The page of all methods."""

import json
import re

import pytest
from cli_runner import ROOT, run_tool
from method_cases import config

from mdistiller.registry import InputError, distiller_dict
from mdistiller.reports.methods import facts, golden_cases, teacher_outputs, write_methods_page

PAGE = ROOT / "docs" / "methods.md"


def rows_of(page):
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {line[0].strip("`"): line[1:] for line in lines}


@pytest.mark.parametrize(
    ("method", "outputs"),
    [("KD", ["logits"]), ("PKT", ["pooled_feat"]), ("SP", ["feats"]), ("DIST_PLUS", ["logits", "feats"])],
)
def test_which_outputs_of_the_teacher_a_method_depends_on(method, outputs):
    assert teacher_outputs(config(method)) == outputs


def test_facts_of_methods_with_and_without_a_teacher():
    assert facts("KD_TWO_VIEWS") == [
        "`KD_TWO_VIEWS`", "Hinton et al., NIPS 2014 workshop, arXiv:1503.02531", "logit", "weak, strong", "logits", "0"
    ]  # fmt: skip
    assert facts("NONE") == ["`NONE`", "-", "-", "one view", "-", "0"]
    assert facts("CTKD")[-1] == "1"  # its temperature


def test_golden_cases_are_counted_by_method():
    assert golden_cases("KD", ROOT / "tests" / "golden") >= 1
    assert golden_cases("NONE", ROOT / "tests" / "golden") == 0


def test_the_page_has_a_row_for_each_method():
    """A new method needs a row: python tools/list.py --page docs/methods.md."""
    assert sorted(rows_of(PAGE.read_text())) == sorted(distiller_dict)


@pytest.mark.slow
def test_the_page_is_what_its_command_writes(tmp_path):
    page = PAGE.read_text()
    assert "`python tools/list.py --page docs/methods.md`" in page
    outcome = run_tool("list", ["--page", tmp_path / "methods.md"])
    assert (outcome.code, outcome.err) == (0, "")
    made_by = re.compile(r"Made by `.*?`")
    assert made_by.sub("", (tmp_path / "methods.md").read_text()) == made_by.sub("", page)


def test_a_measurement_that_is_missing_or_broken_is_named(tmp_path):
    (tmp_path / "step.json").write_text(json.dumps({"rows": []}))
    (tmp_path / "memory.json").write_text("{")
    for memory in ("memory.json", "none.json"):
        with pytest.raises(InputError, match=f"cannot read the measurement .*{memory}.*tools/bench.py"):
            write_methods_page(
                tmp_path / "page.md", tmp_path / "step.json", tmp_path / memory, ROOT / "tests" / "golden", "c"
            )
