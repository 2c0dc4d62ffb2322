"""SimKD's loss, from arXiv:2203.14001."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, mean


def simkd_loss(projected: Any, f_t: Any) -> Any:
    return mean([(s - t) ** 2 for s, t in zip(flat(projected), flat(f_t), strict=True)])
