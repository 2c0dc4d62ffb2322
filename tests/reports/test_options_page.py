"""The listing and the page of all options."""

import pytest
from cli_runner import ROOT, run_tool

from mdistiller.options import OPTIONS
from mdistiller.registry import InputError, distiller_dict
from mdistiller.reports.options import all_options, option_rows, write_options_page


def test_the_page_is_what_its_command_writes(tmp_path):
    """A new or changed option needs it: python tools/list.py --page docs/options.md."""
    write_options_page(tmp_path / "options.md")
    assert (tmp_path / "options.md").read_text() == (ROOT / "docs" / "options.md").read_text()


def test_every_option_says_what_it_means():
    options = all_options()
    assert list(OPTIONS) == [key for key in options if key in OPTIONS]
    assert [key for key, option in options.items() if not option.help] == []
    assert {method.section for method in distiller_dict.values() if method.defaults} < {
        k.split(".")[0] for k in options
    }


def test_some_sections():
    assert [row[0] for row in option_rows(["KD.LOSS", "DATASET.SHAPES"])] == [
        "DATASET.SHAPES.TRAIN_SIZE", "DATASET.SHAPES.TEST_SIZE", "KD.LOSS.CE_WEIGHT", "KD.LOSS.KD_WEIGHT"
    ]  # fmt: skip
    with pytest.raises(InputError, match="no section named 'SOLVR'; closest: SOLVER"):
        option_rows(["SOLVR"])


def test_the_command():
    outcome = run_tool("list", ["options", "DKD"])
    assert outcome.code == 0
    first, second, *_ = outcome.out.splitlines()
    assert first.split() == ["OPTION", "DEFAULT", "MEANING", "ALLOWED", "ROLE"]
    assert second.split()[:2] == ["DKD.CE_WEIGHT", "1.0"]
    assert "no page named 'option'; closest: options" in run_tool("list", ["--page", "docs/option.md"]).err
