"""Transformations of logits that several methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32


def zs_norm(logits: Tensor) -> Tensor:
    """``(z - mean(z)) / (std(z) + 1e-7)`` of each sample, over its classes. The deviation is unbiased.

    LSKD calls this logit standardisation (Sun et al., arXiv:2403.01427), VRM calls it ZSNorm. Gradient flows through
    mean and deviation. A sample whose logits are all equal, for example those of a classifier with zero weights,
    becomes zeros without gradient. By the formula its gradient would be 1e7 times the incoming one. Half precision
    becomes float32.

    Args:
        logits: ``(B, K)``, K at least 2. With K = 2 only the order of the two classes remains.

    Returns:
        ``(B, K)`` in float32 or better.

    Example:
        >>> zs_norm(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
        tensor([[-1.0000,  0.0000,  1.0000],
                [ 0.0000,  0.0000,  0.0000]])
    """
    logits = at_least_float32(logits)
    deviation = logits.std(1, keepdim=True)
    standardised = (logits - logits.mean(1, keepdim=True)) / (deviation + 1e-7)
    return torch.where(deviation > 0, standardised, 0.0)


def without_target(logits: Tensor, target: Tensor) -> Tensor:
    """``(B, K - 1)``: the logits without the target's.

    Args:
        logits: ``(B, K)``; gradient flows.
        target: ``(B,)`` class numbers.
    """
    place = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, place + (place >= target[:, None]))
