"""Maths shared by the methods: tensors in, tensors out."""

from .logits import zs_norm
from .maps import channel_mean_square, gradient_in_layout, pool_to_common, spatial_mean
from .precision import at_least_float32
from .relations import unit

__all__ = [
    "at_least_float32",
    "channel_mean_square",
    "gradient_in_layout",
    "pool_to_common",
    "spatial_mean",
    "unit",
    "zs_norm",
]
