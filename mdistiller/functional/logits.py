"""What several methods do to logits before they compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import at_least_float32


def zs_norm(logits: Tensor) -> Tensor:
    """Each sample's logits with mean 0 and standard deviation 1 over the classes.

    LSKD's logit standardisation (Sun et al., arXiv:2403.01427), VRM's ZSNorm: unbiased deviation, 1e-7 added to it.
    Gradient flows through mean and deviation. A sample whose logits are all equal, as those of a classifier that starts
    at zero, becomes zeros without a gradient; the formula would give it 1e7 times what comes in. Half precision is
    taken to float32 first.

    Args:
        logits: ``(B, K)``, K at least 2. With K = 2 nothing is left of a sample but which class is ahead.

    Returns:
        ``(B, K)``.
    """
    logits = at_least_float32(logits)
    deviation = logits.std(1, keepdim=True)
    standardised = (logits - logits.mean(1, keepdim=True)) / (deviation + 1e-7)
    return torch.where(deviation > 0, standardised, 0.0)
