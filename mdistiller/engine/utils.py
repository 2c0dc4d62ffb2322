"""Small functions that the engine and mdistiller's users share."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller.messages import log_msg
from mdistiller.registry import InputError

from .folder.checkpoint import load_checkpoint, save_checkpoint
from .solver import learning_rate
from .task import Classification, hits_at

__all__ = [
    "AverageMeter",
    "accuracy",
    "adjust_learning_rate",
    "cores",
    "load_checkpoint",
    "log_msg",
    "processor_name",
    "pyplot",
    "save_checkpoint",
    "validate",
]


class AverageMeter:
    """Last value and running mean of its updates. Tensors stay on their device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float | Tensor, n: int = 1) -> None:
        """Add ``val``, the mean of ``n`` values."""
        self.val = val
        self.sum = self.sum + val * n
        self.count += n
        self.avg = self.sum / self.count


@torch.no_grad()
def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """Share of targets among the k highest scores, in percent.

    Args:
        output: ``(B, K)`` scores.
        target: ``(B,)`` class numbers.
        topk: the k's; one above K counts as K.

    Returns:
        One ``(1,)`` tensor for each k.
    """
    return [100.0 * hits.float().mean(dim=0, keepdim=True) for hits in hits_at(output, target, topk)]


def validate(val_loader, distiller) -> tuple[float, float, float]:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy of the student, in mdistiller's order."""
    return tuple(Classification().evaluate(distiller, val_loader).values.values())


def adjust_learning_rate(epoch: int, cfg: Any, optimizer: torch.optim.Optimizer) -> float:
    """Set and return the learning rate at the start of ``epoch`` (from 1), for the user's own loops."""
    rate = learning_rate(cfg.SOLVER, epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    return rate


def cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """The CPU's name, if the system has it, and its instructions for half precision."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return f"{name} ({', '.join(flags)})" if flags else name


def pyplot(what: str) -> Any:
    """``matplotlib.pyplot`` for files, without windows.

    Args:
        what: the picture, for the message: ``"the learning curves"``.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"{what} need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
