"""Maths shared by the methods: tensors in, tensors out."""

from .gather import gathered_rows
from .logits import zs_norm
from .precision import at_least_float32

__all__ = ["at_least_float32", "gathered_rows", "zs_norm"]
