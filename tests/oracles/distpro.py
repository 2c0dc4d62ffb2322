"""DistPro's weights and loss, loop by loop, from arXiv:2204.05547 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import softmax
from .reviewkd import hcl_loss


def path_weights(alpha: Any, biased: bool) -> list[Any]:
    """(P,): the training's are biased, the search's are not."""
    return [len(alpha) * w for w in softmax([*alpha, 1.0])[:-1]] if biased else softmax(alpha)


def distpro_loss(maps_s: Any, maps_t: Any, alpha: Any, biased: bool) -> Any:
    """A map (B, C, H, W) of both networks for each path."""
    weights = path_weights(alpha, biased)
    return sum(w * hcl_loss([s], [t]) for w, s, t in zip(weights, maps_s, maps_t, strict=True))
