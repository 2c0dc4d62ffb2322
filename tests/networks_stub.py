"""Networks that return given tensors, for golden cases of methods."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GivenNet(nn.Module):
    """Returns the given logits and features for any image.

    Args:
        logits: ``(B, K)``.
        features: what the network returns beside them.
        norms: what ``get_bn_before_relu()`` says.
    """

    def __init__(self, logits: Tensor, features: dict[str, Any], norms: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.given = logits, features
        self.norms = nn.ModuleList(norms or [])

    def get_bn_before_relu(self) -> list[nn.Module]:
        return list(self.norms)

    def forward(self, image: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return self.given
