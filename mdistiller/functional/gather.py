"""Tensors of all processes of a run, where there are several."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gathered_rows(x: Tensor) -> Tensor:
    """The rows of all processes' ``x`` ``(B, ...)``, in the order of their ranks; the same on each. No gradient flows.

    B may differ between processes. With one process, ``x`` itself, detached.
    """
    count = num_processes()
    x = x.detach()
    if count == 1:
        return x
    sizes = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(x)], device=x.device))
    sizes = [int(size) for size in sizes]
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
