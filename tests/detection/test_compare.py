"""The table over methods and seeds."""

import json
import runpy

import pytest
from cli_runner import ROOT, run_script
from detectors import TINY

SCRIPT = ROOT / "detection" / "compare.py"


def test_runs_are_made_once_and_shown(tmp_path):
    options = [*TINY, "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
    arguments = ["--methods", "NONE", "--seeds", "0", "1", "--configs", ROOT / "detection/configs/minicoco"]
    done = run_script(SCRIPT, [*arguments, "--output", tmp_path / "runs", *options])
    assert done.code == 0 and "| NONE | 0.0 ± 0.0 |  | 0.0 | 2 |" in done.out, done.err
    again = run_script(SCRIPT, [*arguments, "--output", tmp_path / "runs", *options])
    assert "| NONE | 0.0 ± 0.0 |" in again.out and "Step" not in again.out
    assert json.loads((tmp_path / "runs" / "NONE_1" / "results.json").read_text())["seed"] == 1
    assert "no 'KDD'; closest: KD" in run_script(SCRIPT, ["--methods", "KDD"]).err


def test_gains_are_over_plain_training():
    def result(ap):
        return {"last": {"AP": ap, "AP50": 2 * ap}, "seconds": {"train": 7.0}}

    table = runpy.run_path(str(SCRIPT))["table"]
    text = table({"NONE": [result(10.0), result(12.0)], "KD": [result(16.5), result(17.5)]})
    assert "| NONE | 11.0 ± 1.4 |  | 22.0 | 2 | 7 |" in text
    assert "| KD | 17.0 ± 0.7 | +6.0 | 34.0 | 2 | 7 |" in text
    assert "| KD | 3.0 |  |" in table({"KD": [result(3.0)]})


@pytest.mark.parametrize("arguments", [["--seeds", "x"], ["--methods"]])
def test_wrong_arguments_end_with_code_2(arguments):
    assert run_script(SCRIPT, arguments).code == 2
