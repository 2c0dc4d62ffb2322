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
