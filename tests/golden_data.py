"""Reference numbers, and the deterministic weights they were computed with.

The folder is ``tests/golden``, or what ``MDISTILLER_GOLDEN_DIR`` names.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn


def golden_dir() -> Path:
    """The folder of the reference numbers."""
    return Path(os.environ.get("MDISTILLER_GOLDEN_DIR") or Path(__file__).parent / "golden")


def golden_json(name: str) -> Any:
    """The content of one JSON file of :func:`golden_dir`."""
    return json.loads((golden_dir() / name).read_text())


def filled_value(key: str, shape: tuple[int, ...] | torch.Size, scale: float = 1.0) -> Tensor:
    """The value of one state-dict entry: noise seeded by its key, sized by its kind.

    Matrices and kernels: He-sized times ``scale``. Vectors: around 1 for ``weight``, above 1 for
    ``running_var``, around 0 for the rest.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    noise = torch.randn(tuple(shape), generator=generator)
    if len(shape) >= 2:
        return noise * scale * math.sqrt(2 / noise[0].numel())
    kind = key.rpartition(".")[2]
    if kind == "weight":
        return 1 + 0.1 * noise
    if kind == "running_var":
        return 1 + 0.1 * noise.abs()
    return 0.1 * noise


@torch.no_grad()
def fill_state(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """Set every floating-point entry of the state dict by :func:`filled_value`; integers stay."""
    for key, entry in module.state_dict().items():
        if entry.is_floating_point():
            entry.copy_(filled_value(key, entry.shape, scale))
    return module


def golden_images(batch: int, size: int) -> Tensor:
    """``(batch, 3, size, size)``: the input of the reference runs."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def loss_cases(*methods: str) -> list[Any]:
    """The cases of ``losses/losses.json`` as pytest parameters, named by what they are."""
    cases = golden_json("losses/losses.json")
    return [
        pytest.param(case, id=f"{case['method']}-{case['case']}")
        for method in methods
        for case in cases
        if case["method"] == method
    ]


def case_tensors(case: dict[str, Any], kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arrays of a case by name: ``kind`` is ``in``, ``out``, ``grad`` or ``after``; floats in ``dtype``."""
    prefix = f"{case['case']}/{kind}/"
    with np.load(golden_dir() / "losses" / f"{case['method']}.npz") as arrays:
        found = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def assert_golden_gradients(case: dict[str, Any], given: dict[str, Tensor], rel: float = 1e-6) -> None:
    """Compare ``.grad`` of the given tensors with all gradients of the case, relative to the largest entry."""
    for name, expected in case_tensors(case, "grad").items():
        assert (given[name].grad - expected).abs().max() <= rel * expected.abs().max(), name
