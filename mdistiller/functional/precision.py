"""Which precision a loss is computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 where it is float16 or bfloat16; float32 and float64 are left as they are.

    Networks run under autocast, losses don't: a bfloat16 logit of 10 is only known to 0.03.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
