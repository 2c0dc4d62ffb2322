"""The examples in docstrings run, and each loss has one."""

import doctest
import inspect
import pkgutil
import re
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from mdistiller import functional
from mdistiller.distillers import distiller_dict

PACKAGE = "mdistiller.distillers."
METHODS = sorted({cls.__module__ for cls in distiller_dict.values() if cls.__module__.startswith(PACKAGE)})
FUNCTIONAL = [f"{functional.__name__}.{module.name}" for module in pkgutil.iter_modules(functional.__path__)]
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


class ToFourDigits(doctest.OutputChecker):
    """Compares numbers to the last digit that is printed: processors differ in rounding."""

    def check_output(self, want, got, flags):
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (want, got)]
        texts = [" ".join(NUMBER.sub("0", text).split()) for text in (want, got)]
        return texts[0] == texts[1] and numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=2e-4)


def losses_of(module):
    """The public losses that a module defines."""
    functions = vars(sys.modules[module]).items()
    return [
        name for name, function in functions
        if re.fullmatch(r"[^_].*_loss(es)?", name) and inspect.isfunction(function) and function.__module__ == module
    ]  # fmt: skip


@pytest.mark.parametrize("module", [*METHODS, *FUNCTIONAL])
def test_examples_run(module):
    """An example has ``torch``, ``nn`` and the names of its file."""
    names = vars(import_module(module)) | {"torch": torch, "nn": nn}
    tests = doctest.DocTestFinder(exclude_empty=True).find(sys.modules[module], module, globs=names)
    lines = []
    runner = doctest.DocTestRunner(ToFourDigits(), verbose=False)
    for test in tests:
        runner.run(test, out=lines.append)
    assert not runner.failures, "".join(lines)
    shown = {test.name.removeprefix(f"{module}.") for test in tests if test.examples}
    missing = [name for name in losses_of(module) if name not in shown]
    assert not missing, f"give {', '.join(missing)} of {module} an example (>>>) in the docstring"


def test_losses_are_found():
    assert {"kd_loss"} <= set(losses_of(f"{PACKAGE}KD")) and sum(map(len, map(losses_of, METHODS))) >= 25


@pytest.mark.parametrize("got, same", [("tensor(0.12349)", True), ("tensor(0.13)", False), ("(0.1234,)", False)])
def test_numbers_are_compared(got, same):
    assert ToFourDigits().check_output("tensor(0.1234)", got, 0) is same
