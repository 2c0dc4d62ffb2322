"""Turns a loader's item into the named tensors of a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .forwards.precision import Precision

# mdistiller's loaders yield tuples: (image, target), (image, target, index), (..., contrastive_index).
TUPLE_FIELDS = ("image", "target", "index", "contrastive_index")


def to_batch(item: Mapping[str, Tensor] | Sequence[Any], precision: Precision) -> dict[str, Tensor]:
    """Name the parts of a loader's item and move them to the device.

    Args:
        item: a dictionary of tensors, or a tuple in mdistiller's order. The tuple's first entry may be a pair
            ``(image_weak, image_strong)``.
        precision: device and memory layout.

    Returns:
        Images in float32; other tensors keep their type.
    """
    fields = dict(item) if isinstance(item, Mapping) else _name_tuple(item)
    placed = {}
    for name, value in fields.items():
        value = value if isinstance(value, Tensor) else torch.as_tensor(value)
        if name.startswith("image"):
            value = value.float()
        placed[name] = precision.place_tensor(value)
    return placed


def _name_tuple(item: Sequence[Any]) -> dict[str, Any]:
    if not 2 <= len(item) <= len(TUPLE_FIELDS):
        raise ValueError(f"a batch holds {len(item)} parts; expected {TUPLE_FIELDS[:2]} to {TUPLE_FIELDS}")
    fields = dict(zip(TUPLE_FIELDS, item, strict=False))
    if isinstance(fields["image"], (tuple, list)):
        fields["image_weak"], fields["image_strong"] = fields.pop("image")
    return fields


def images_of(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """Every view in the batch, each ``(B, C, H, W)``."""
    return [value for name, value in batch.items() if name.startswith("image")]
