"""The precision of a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is float16 or bfloat16. float32 and float64 stay as they are.

    With ``SOLVER.AMP`` a method runs under autocast, and a bfloat16 logit of 10 has an error of 0.03. Element-wise
    operations and sums keep the type of their input. Matrix products do not: autocast computes them in half precision.
    A loss with matrix products must also switch autocast off.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
