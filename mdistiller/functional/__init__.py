"""Maths shared by the methods: tensors in, tensors out."""

from .logits import without_target, zs_norm
from .maps import channel_mean_square, gradient_in_layout, pool_to_common, same_size, spatial_mean
from .precision import at_least_float32
from .relations import unit
from .shapes import require_one_shape, require_same_images, require_same_width

__all__ = [
    "at_least_float32",
    "channel_mean_square",
    "gradient_in_layout",
    "pool_to_common",
    "require_one_shape",
    "require_same_images",
    "require_same_width",
    "same_size",
    "spatial_mean",
    "unit",
    "without_target",
    "zs_norm",
]
