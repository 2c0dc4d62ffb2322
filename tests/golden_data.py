"""Reference numbers, and the deterministic weights they were computed with.

The folder is ``tests/golden``, or what ``MDISTILLER_GOLDEN_DIR`` names.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

OWN = Path(__file__).parent / "golden"


def golden_dir() -> Path:
    """The folder of the reference numbers."""
    return Path(os.environ.get("MDISTILLER_GOLDEN_DIR") or OWN)


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


@functools.cache
def drawn_alike() -> bool:
    """Whether torch draws the same weights and images on this CPU as on the reference's, to the last digit.

    It does where it has AVX2; other instructions round the logarithm and the cosine of a normal draw otherwise.
    """
    return zlib.crc32(golden_images(1, 32).numpy().tobytes()) == 0x96859387


@torch.no_grad()
def move_last_digit(module: nn.Module) -> nn.Module:
    """Move every floating-point entry of the state dict at random, by no more than float32's last digit."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps
    for entry in module.state_dict().values():
        if entry.is_floating_point():
            entry.mul_(1 + eps * (2 * torch.rand(entry.shape, generator=generator, dtype=entry.dtype) - 1))
    return module


def change(moved: Tensor, output: Tensor) -> float:
    """The change of a network's output after a change of its weights, relative to the output's size."""
    return ((moved - output).norm() / output.norm()).item()


def all_loss_cases() -> list[dict[str, Any]]:
    """The cases of ``losses/losses.json`` and, if there is one, of ``losses_more/losses_more.json``.

    ``"folder"`` names the folder of a case's arrays.
    """
    found = []
    for folder in ("losses", "losses_more"):
        if folder == "losses" or (golden_dir() / folder).exists():
            found += [{**case, "folder": folder} for case in golden_json(f"{folder}/{folder}.json")]
    return found


def loss_cases(*methods: str) -> list[Any]:
    """The cases of some methods as pytest parameters with names."""
    cases = all_loss_cases()
    return [
        pytest.param(case, id=f"{case['method']}-{case['case']}")
        for method in methods
        for case in cases
        if case["method"] == method
    ]


def case_tensors(case: dict[str, Any], kind: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The arrays of a case by name: ``kind`` is ``in``, ``out``, ``grad`` or ``after``; floats in ``dtype``."""
    prefix = f"{case['case']}/{kind}/"
    with np.load(golden_dir() / case["folder"] / f"{case['method']}.npz") as arrays:
        found = {key.removeprefix(prefix): torch.from_numpy(arrays[key]) for key in arrays if key.startswith(prefix)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def case_leaves(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The inputs of a case by name. Those with a gradient in the case require one."""
    given = case_tensors(case, "in", dtype)
    for name in case["gradients"]:
        given[name].requires_grad_()
    return given


def load_case(module: nn.Module, given: dict[str, Tensor], prefix: str = "param.") -> nn.Module:
    """Put a case's state into a module.

    The module's parameters, which get the gradients, replace those in ``given``.

    Args:
        module: in training mode afterwards, in the type of the case.
        given: of :func:`case_leaves`.
        prefix: of the module's keys in the case.
    """
    module.to(next(value for value in given.values() if value.is_floating_point()).dtype)
    state = {key: given[prefix + key].detach() for key in module.state_dict() if prefix + key in given}
    module.load_state_dict(module.state_dict() | state)
    given |= {prefix + name: parameter for name, parameter in module.named_parameters()}
    return module.train()


def assert_golden(case: dict[str, Any], given: dict[str, Tensor], loss: Tensor) -> None:
    """Value and gradients of a loss of ``given`` equal the case's within the precision of the loss."""
    loss.backward()
    exact = loss.dtype == torch.float64
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7 if exact else 1e-4)
    if exact:
        assert_golden_gradients(case, given)


def listed(given: dict[str, Tensor], prefix: str) -> list[Tensor]:
    """The tensors whose names are ``prefix`` and a number, in the order of the numbers."""
    numbers = sorted(int(name.removeprefix(prefix)) for name in given if re.fullmatch(rf"{prefix}\d+", name))
    return [given[f"{prefix}{number}"] for number in numbers]


def rounding(dtype: torch.dtype, size: float = 1.0) -> float:
    """The largest rounding error of a sum in ``dtype`` whose terms, of this size, cancel to 0."""
    return 64 * torch.finfo(dtype).eps * size


def assert_golden_gradients(
    case: dict[str, Any], given: dict[str, Tensor], rel: float = 1e-6, size: float = 0.0
) -> None:
    """Compare ``.grad`` of the given tensors with all gradients of the case, relative to the largest entry of each.

    A gradient that is 0 but for rounding, such as that of a bias in front of a batch norm, has no digits to compare:
    an error as large as the rounding of terms of the given ``size`` or of the case's largest gradient is allowed too.
    Where the reference is not a number, ours must be one.
    """
    expected = case_tensors(case, "grad")
    largest = max([size, *(gradient.nan_to_num().abs().max().item() for gradient in expected.values())])
    for name, gradient in expected.items():
        found = given[name].grad
        assert found.isfinite().all(), name
        error = (found - gradient).nan_to_num().abs().max().item()
        assert error <= rel * gradient.nan_to_num().abs().max().item() + rounding(found.dtype, largest), name
