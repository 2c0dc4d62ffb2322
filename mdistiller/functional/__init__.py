"""Maths shared by the methods: tensors in, tensors out."""

from .logits import zs_norm
from .precision import at_least_float32

__all__ = ["at_least_float32", "zs_norm"]
