"""Which settings of several factors to test together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def each_and_some(count: int, **factors: Sequence[Any]) -> list[dict[str, Any]]:
    """Every setting of every factor once, with the others at their first; then ``count`` random combinations.

    The combinations are the same in every run; none comes twice.
    """
    usual = {name: settings[0] for name, settings in factors.items()}
    cases = [usual | {name: setting} for name, settings in factors.items() for setting in settings]
    draw = random.Random(0)
    cases += [{name: draw.choice(settings) for name, settings in factors.items()} for _ in range(count)]
    return [case for number, case in enumerate(cases) if case not in cases[:number]]


def named(case: dict[str, Any]) -> str:
    """A case's settings, as the name of its test."""
    return "-".join(map(str, case.values()))
