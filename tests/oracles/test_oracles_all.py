"""Every method has its formula written out and tests of its own; and the helpers that compare with it do compare."""

import inspect
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mdistiller.distillers import distiller_dict

from .cases import each_and_some
from .compare import assert_agree
from .complex_step import absolute, constant, differentiate, exp

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = "mdistiller.distillers."
HELPERS = {"__init__", "cases", "compare", "complex_step", "stubs", Path(__file__).stem}
METHOD_FILES = sorted({cls.__module__ for cls in distiller_dict.values() if cls.__module__.startswith(PACKAGE)})


def has_a_loss(module: str) -> bool:
    """Whether a method's file holds a loss, rather than putting together those of other files."""
    functions = vars(sys.modules[module]).items()
    return any("loss" in name and inspect.isfunction(f) and f.__module__ == module for name, f in functions)


def name_of(module: str) -> str:
    return module.removeprefix(PACKAGE).lower()


@pytest.mark.parametrize("module", [module for module in METHOD_FILES if has_a_loss(module)], ids=name_of)
def test_each_loss_is_written_out_and_tested(module):
    """CONTRIBUTING, "Its own tests", shows both files."""
    oracle, test = TESTS / "oracles" / f"{name_of(module)}.py", TESTS / "distillers" / f"test_{name_of(module)}.py"
    assert oracle.exists(), f"write the formula of {module} out in {oracle.relative_to(TESTS.parent)}"
    assert test.exists(), f"test {module} in {test.relative_to(TESTS.parent)}"
    text = test.read_text()
    used = f"from oracles import {name_of(module)} " in text or f"from oracles.{name_of(module)} " in text
    assert used, f"{test.name} does not compare with {oracle.name}"


def test_each_oracle_is_of_a_method():
    oracles = {path.stem for path in Path(__file__).parent.glob("*.py")} - HELPERS
    assert oracles <= {name_of(module) for module in METHOD_FILES}
    assert len(oracles) >= 19


# The helpers


def quadratic(x, y):
    return sum(a * a * b for a, b in zip(x, y, strict=True))


def test_derivatives_are_exact():
    value, (by_x, by_y) = differentiate(quadratic, [1.0, 3.0], [2.0, 1e-9], wrt=(0, 1))
    assert value == 2.0 + 9e-9
    assert by_x.tolist() == pytest.approx([4.0, 6e-9], rel=1e-15) and by_y.tolist() == [1.0, 9.0]
    found = differentiate(lambda x: {"exp": exp(x), "size": absolute(x), "constant": constant(x) * x}, -2.0)
    assert found["exp"] == (np.exp(-2.0), [np.exp(-2.0)])
    assert found["size"] == (2.0, [-1.0]) and found["constant"] == (4.0, [-2.0])


def test_a_wrong_value_or_gradient_is_noticed():
    x, y = [0.5, -1.5], [2.0, 1.0]
    assert_agree(lambda x, y: (x * x * y).sum(), quadratic, x, y, wrt=(0, 1))
    for wrong in (
        lambda x, y: (x * x * y).sum() * (1 + 1e-9),
        lambda x, y: (x * x * y.detach()).sum(),
        lambda x, y: {"a name": (x * x * y).sum()},
        lambda x, y: torch.where(x > 9, torch.nan, x * x * y).sum() if x.dtype == torch.float64 else x.sum(),
    ):
        with pytest.raises(AssertionError):
            assert_agree(wrong, quadratic, x, y, wrt=(0, 1))


def test_cases_have_each_setting_and_some_combinations():
    cases = each_and_some(5, size=[1, 2, 3], kind=["a", "b"], flag=[False, True])
    assert cases[:5] == [
        {"size": 1, "kind": "a", "flag": False}, {"size": 2, "kind": "a", "flag": False},
        {"size": 3, "kind": "a", "flag": False}, {"size": 1, "kind": "b", "flag": False},
        {"size": 1, "kind": "a", "flag": True},
    ]  # fmt: skip
    assert 5 < len(cases) <= 10
    assert all(cases.count(case) == 1 for case in cases)
