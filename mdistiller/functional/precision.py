"""Which precision a loss is computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is float16 or bfloat16; float32 and float64 are left as they are.

    Under ``SOLVER.AMP`` a method runs within autocast, and a bfloat16 logit of 10 is only known to 0.03. Element-wise
    operations and sums keep the type of what they get; a loss with matrix products must also switch autocast off
    around them, which would take them back to half precision.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
