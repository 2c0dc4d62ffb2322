"""FitNet's loss, loop by loop: arXiv:1412.6550, Eq. 3, as a mean over all elements."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean


def hint_loss(f_s: Any, f_t: Any) -> Any:
    """Maps of one shape, the student's behind the regressor."""
    return mean([(s - t) ** 2 for s, t in zip(flat(f_s), flat(f_t), strict=True)])
