"""Options: the texts of their checks, and the effects of their roles."""

from __future__ import annotations

import math

import pytest
import torch
from method_cases import weights

from mdistiller.distillers._base import Distiller, register_distiller
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.engine.config.experiment import changed_keys, flatten, same_result
from mdistiller.engine.config.node import ConfigNode
from mdistiller.options import OPTIONS, Option, dead, options_in, options_of, weight
from mdistiller.registry import InputError, Registry, distiller_dict
from mdistiller.reports.options import all_options

ODD = (lambda number: number % 2 == 1, "odd")


@pytest.mark.parametrize(
    ("option", "allowed", "good", "bad"),
    [
        (Option(1.0, above=0), "above 0", [1e-9, 7], [0, -1, math.nan]),
        (Option(1, at_least=1), "at least 1", [1, 2], [0]),
        (Option(1, at_least=0), "at least 0", [0], [-1e-9]),
        (Option(0.0, at_least=0, below=1), "at least 0 and below 1", [0, 0.9], [1, -0.1]),
        (Option(0.5, above=0, at_most=1), "above 0 and at most 1", [1], [0, 1.1]),
        (Option(0.5, at_least=0, at_most=1), "at least 0 and at most 1", [0, 1], [-1, 2]),
        (Option(1, holds=ODD, at_least=1), "odd, at least 1", [1, 3], [2, -1]),
        (Option([1], at_least=0), "at least 0", [[], [0, 5], (1,)], [[0, -1]]),
        (Option("a", one_of=("a", "b")), "a, b", ["b"], ["c", ""]),
        (weight(0.0), "at least 0", [0.0, 3], [-0.5]),
        (Option(-7.0), "", [-1e30, 0], []),
        (dead([1], "says why"), "", [[2]], []),
    ],
    ids=lambda value: value.allowed if isinstance(value, Option) else "",
)
def test_what_is_allowed(option, allowed, good, bad):
    assert option.allowed == allowed
    assert [option.check("A.B", value) for value in good] == good
    for value in bad:
        with pytest.raises(InputError, match=r"A\.B"):
            option.check("A.B", value)


def test_messages_name_key_value_and_what_is_allowed():
    with pytest.raises(InputError, match=r"^A\.B must be above 0, got -2$"):
        Option(1.0, above=0).check("A.B", -2)
    with pytest.raises(InputError, match=r"^A\.B: no choice named 'ro'; closest: row; known: column, row$"):
        Option("row", one_of=("row", "column")).check("A.B", "ro")


def test_a_table_may_grow():
    table = Registry("colour", {"red": 1})
    option = Option("red", one_of=table)
    with pytest.raises(InputError, match="A: no colour named 'blue'"):
        option.check("A", "blue")
    table["blue"] = 2
    assert option.check("A", "blue") == "blue"


def test_plain_values_count():
    found = options_in({"W": weight(2.0), "LOSS": {"CE": 1.0}}, "M.", role="data")
    assert list(found) == ["M.W", "M.LOSS.CE"]
    assert (found["M.W"].role, found["M.LOSS.CE"]) == ("result", Option(1.0, role="data"))


def test_the_tree_holds_the_defaults_of_all_options():
    flat = flatten(CFG)
    for key, option in OPTIONS.items():
        held = flat.get(key, {})  # an empty section has no leaves
        assert held == (list(option.default) if isinstance(option.default, tuple) else option.default)
        assert option.help
    assert not any(isinstance(value, Option) for value in flat.values())
    for key, option in options_of(CFG).items():
        option.check(key, option.default)


def is_taken(key, option, word):
    """Whether ``KEY word`` on a command line passes the option's own checks."""
    node = ConfigNode({"KEY": option.default})
    try:
        node.merge_from_list(["KEY", word])
        option.check(key, node["KEY"])
    except InputError:
        return False
    return True


# Whose value may be below 0: logarithms of a temperature, and the strength of a reversed gradient.
SIGNED = {"DCD.INIT_THETA", "CTKD.DECAY_MAX", "CTKD.DECAY_MIN"}
CHECKED = {
    key: option
    for key, option in all_options().items()
    if option.role != "ignored" and (option.one_of is not None or not isinstance(option.default, str))  # names, paths
}


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ((int, float, bool), ["nothing", "", "nan", "inf", "1e400", "None", "{}", "[]", "[1]", "'1", "1,5", "1 2"]),
        ((int,), ["2.5", "1e30", "0x", "True"]),
        ((bool,), ["2", "-1", "0.5"]),
        ((str,), ["nothing", "", "None", "5", "[]", "-1"]),
        ((list, tuple), ["5", "-1", "{}", "[[1]]", "[-1]", "[None]", "True"]),
    ],
    ids=["numbers", "whole numbers", "switches", "choices", "lists"],
)
def test_nonsense_is_refused_by_the_declaration(kinds, words):
    options = {key: option for key, option in CHECKED.items() if type(option.default) in kinds}
    assert options
    assert [(key, word) for key, option in options.items() for word in words if is_taken(key, option, word)] == []


def test_numbers_are_bounded_below_and_sizes_above():
    """A weight, a rate or a temperature has no upper bound: a loss that is not finite ends the run."""
    numbers = {key: option for key, option in CHECKED.items() if type(option.default) in (int, float)}
    assert {key for key, option in numbers.items() if is_taken(key, option, "-1")} == SIGNED
    widths = [key for key in numbers if key.split(".")[-1] in ("DIM", "FEAT_DIM", "SM_WIDTH", "EPOCHS", "IMAGE_SIZE")]
    assert len(widths) >= 5
    assert [key for key in widths if is_taken(key, numbers[key], "1e9")] == []


@pytest.mark.parametrize("word", ["a\nb", "a\0b", "\x1b[31m", "\udcff", "~nobody_of_that_name/x"])
def test_texts_that_no_name_can_hold(word):
    for key in (key for key, option in all_options().items() if option.default == "" and option.one_of is None):
        with pytest.raises(InputError, match=key):
            CFG.clone().merge_from_list([key, word])


def test_a_users_folder_may_be_written_as_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = load_config(options=["LOG.PREFIX", "~/out", "DISTILLER.TEACHER_CKPT", "~", "DATASET.ROOT", "~/data/~"])
    found = (cfg.LOG.PREFIX, cfg.DISTILLER.TEACHER_CKPT, cfg.DATASET.ROOT)
    assert found == (f"{tmp_path}/out", str(tmp_path), f"{tmp_path}/data/~")


def test_a_tree_that_nobody_checked_is_checked_before_the_method_is_built():
    cfg = CFG.clone()
    cfg.merge_from_list(["DISTILLER.TYPE", "DKD", "DKD.T", "-4"])
    with pytest.raises(InputError, match=r"DKD\.T must be above 0, got -4"):
        build_distiller(cfg, torch.nn.Identity(), torch.nn.Identity())


def merged(**values):
    """``KD__TEMPERATURE=2`` stands for ``KD.TEMPERATURE``."""
    options = {"DISTILLER.TYPE": "KD"} | {key.replace("__", "."): value for key, value in values.items()}
    return load_config(options=[part for item in options.items() for part in item])


@pytest.mark.parametrize(
    ("changed", "may_resume", "same_run"),
    [
        ({"EXPERIMENT__SEED": 1}, False, False),
        ({"DATASET__MIXUP_ALPHA": 0.2}, False, False),  # could once be changed, because a list lacked it
        ({"DATASET__SHAPES__TRAIN_SIZE": 500}, False, False),
        ({"KD__TEMPERATURE": 2}, False, False),
        ({"SOLVER__BATCH_SIZE": 128}, False, False),
        ({"SOLVER__EPOCHS": 300}, True, False),
        ({"SOLVER__AMP": "bf16"}, True, False),
        ({"SOLVER__COMPILE": "all"}, True, True),
        ({"DATASET__NUM_WORKERS": 7}, True, True),
        ({"LOG__PREFIX": "elsewhere"}, True, True),
        ({"DISTILLER__TEACHER_CKPT": "elsewhere"}, True, True),
        ({"VRM__ALPHA": 1}, True, True),  # another method's
    ],
    ids=lambda value: "".join(value) if isinstance(value, dict) else "",
)
def test_what_follows_from_the_role(changed, may_resume, same_run):
    before, now = dict(merged()), merged(**changed)
    fatal, harmless = changed_keys(before, now)
    assert bool(fatal) != may_resume
    assert same_result(before, now) == same_run
    assert len(fatal) + len(harmless) == ("VRM__ALPHA" not in changed)


def test_a_key_that_only_one_side_has_does_not_count():
    now = merged()
    older = flatten(now)
    del older["SOLVER.EMA_DECAY"]
    older["KD.GONE"] = 3
    assert changed_keys(older, now) == ([], [])
    assert same_result(older, now)
    assert not same_result(older, merged(SOLVER__EMA_DECAY=0.9))


def test_keys_without_effect_are_taken_and_named_in_one_line(capsys):
    given = ["DISTILLER.TYPE", "REVIEWKD", "REVIEWKD.SHAPES", "[1, 8]", "REVIEWKD.IN_CHANNELS", "[3]"]
    cfg = load_config(options=given)
    (line,) = capsys.readouterr().out.splitlines()
    assert "REVIEWKD.SHAPES (the student's maps give these sizes), REVIEWKD.IN_CHANNELS (" in line
    assert cfg.REVIEWKD.SHAPES == [1, 8]  # for a fork's file that reads it
    before = load_config(options=["DISTILLER.TYPE", "REVIEWKD", "FITNET.INPUT_SIZE", "[8, 8]"])
    assert capsys.readouterr().out == ""
    fatal, harmless = changed_keys(dict(before), cfg)
    assert not fatal and len(harmless) == 2 and same_result(dict(before), cfg)


def test_weights_of_a_method_of_plain_values():
    """A fork has plain values: weights are found by the ends of their names, or are named."""

    class Fork(Distiller):
        pass

    defaults = {"ALPHA": 1.0, "T": 4.0, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 0.9}}
    register_distiller("FORK", defaults, weights=("ALPHA",))(Fork)
    try:
        assert weights("FORK", 2.0, 3.0) == {"FORK.ALPHA": 3.0, "FORK.LOSS.CE_WEIGHT": 2.0, "FORK.LOSS.KD_WEIGHT": 3.0}
    finally:
        del distiller_dict["FORK"]
