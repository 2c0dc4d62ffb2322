"""Accuracy of a network on a split."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.registry import InputError

from .batch import to_batch
from .forwards.compile import uncompiled
from .forwards.precision import Precision
from .processes import distributed


@dataclass(frozen=True)
class Evaluation:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, number of images.

    With fewer than five classes, top-5 is 100 by definition.
    """

    top1: float
    top5: float
    loss: float
    count: int


def hits_at(output: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    """For each k, ``(B,)`` booleans: is the target among the k highest of ``output`` ``(B, K)``?"""
    widest = min(max(topk), output.shape[1])
    found = output.topk(widest, dim=1).indices == target[:, None]
    return [found[:, :k].any(dim=1) for k in topk]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    precision: Precision | None = None,
    on_batch: Callable[[], None] | None = None,
) -> Evaluation:
    """Run ``model`` over ``loader`` in eval mode; its mode is restored.

    Where several processes take the loader's batches in turn, each gets the result over all images. Every batch is
    the same as in one process.

    Args:
        model: a distiller, or a network that returns ``(logits, features)`` or logits.
        loader: batches with ``image`` and ``target``, as dictionaries or tuples.
        precision: device and number format; by default float32 where the model's parameters lie.
        on_batch: called after each batch, equally often in all processes; may raise to end the evaluation.

    Raises:
        InputError: the loader yields nothing.
    """
    precision = precision or Precision(device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    partial, count = [], 0
    for item in loader:
        batch = to_batch(item, precision)
        with precision.autocast(), uncompiled():
            logits = _logits(model, batch["image"]).float()
        top1, top5 = hits_at(logits, batch["target"], (1, 5))
        loss = F.cross_entropy(logits, batch["target"], reduction="sum")
        partial.append(torch.stack([top1.sum().float(), top5.sum().float(), loss]))  # read once, at the end
        count += len(batch["target"])
        if on_batch is not None:
            on_batch()
    model.train(was_training)
    sums = torch.stack(partial).double().sum(dim=0) if partial else torch.zeros(3).double().to(precision.device)
    processes = getattr(loader, "share", (0, 1))[1]
    if processes > 1:
        if on_batch is not None and len(partial) * processes < len(loader):  # others have a batch more
            on_batch()
        *sums, count = distributed.total(torch.cat([sums, sums.new_tensor([count])])).tolist()
    else:
        sums = sums.tolist()
    if not count:
        raise InputError("nothing to evaluate on: the split is empty")
    return Evaluation(100 * sums[0] / count, 100 * sums[1] / count, sums[2] / count, int(count))


@torch.no_grad()
def collect_logits(
    model: nn.Module, loader: Iterable[Any], precision: Precision | None = None
) -> tuple[Tensor, Tensor]:
    """What ``model`` says of all images: logits ``(N, K)`` in float32 and targets ``(N,)``, on the CPU.

    Arguments are those of :func:`evaluate`.
    """
    precision = precision or Precision(device=next(model.parameters()).device)
    was_training = model.training
    model.eval()
    found = []
    for item in loader:
        batch = to_batch(item, precision)
        with precision.autocast():
            logits = _logits(model, batch["image"])
        found.append((logits.float().cpu(), batch["target"].cpu()))
    model.train(was_training)
    if not found:
        raise InputError("nothing to evaluate on: the split is empty")
    logits, targets = (torch.cat(part) for part in zip(*found, strict=True))
    return logits, targets


def _logits(model: nn.Module, image: Tensor) -> Tensor:
    inner = getattr(model, "module", model)
    output = model(image=image) if hasattr(inner, "forward_test") else model(image)
    return output[0] if isinstance(output, tuple) else output
