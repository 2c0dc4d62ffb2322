"""Maths shared by the methods: tensors in, tensors out."""

from .pooling import spatial_mean
from .precision import at_least_float32

__all__ = ["at_least_float32", "spatial_mean"]
