"""Networks whose outputs are given, so that a method's losses can be computed from them by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Outputs(nn.Module):
    """Returns ``logits`` and the feature maps ``feats`` whatever it is shown; ``pooled_feat`` is the last map's mean.

    It holds a convolution and a classifier that nothing passes through, for methods that are told to train them.
    ``give`` replaces what it returns by other tensors of the same widths.
    """

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, widths[-1], 1)
        self.fc = nn.Linear(widths[-1], classes)
        self.widths = list(widths)
        self.give(torch.zeros(1, classes), [torch.zeros(1, width, 1, 1) for width in widths])

    def give(self, logits: Tensor, feats: Sequence[Tensor]) -> None:
        self.logits, self.feats = logits, list(feats)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        logits, *feats = (output.clone() for output in (self.logits, *self.feats))  # no gradient under no_grad
        return logits, {"feats": feats, "pooled_feat": F.adaptive_avg_pool2d(feats[-1], 1).flatten(1)}
