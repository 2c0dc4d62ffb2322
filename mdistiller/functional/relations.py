"""Building blocks of relations between vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """``x / ||x||`` along ``dim``. A zero vector stays zero and has the gradient of the identity.

    ``F.normalize`` has the same value, but multiplies the gradient of a zero vector by 10^12. Zero vectors occur: a
    dead unit, or the difference of two equal images.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length == 0, 1)
