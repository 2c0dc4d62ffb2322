"""What relations between vectors are made of."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x`` with vectors of length 1 along ``dim``; a zero vector stays, and gets the gradient of the identity.

    ``F.normalize`` agrees in value, but multiplies the gradient by 10^12 at a zero vector, such as a dead unit's or the
    difference of two equal images.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length == 0, 1)
