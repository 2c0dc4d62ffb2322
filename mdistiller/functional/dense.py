"""Losses on feature maps and boxes that detection and segmentation share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.registry import InputError

from .precision import at_least_float32
from .shapes import require_one_shape


def cwd_loss(map_s: Tensor, map_t: Tensor, tau: float = 1.0) -> Tensor:
    """``tau^2 / (B D) * sum over images and channels of KL(softmax(f_t / tau) || softmax(f_s / tau))``.

    The softmax runs over the positions of a channel. Shu et al., Channel-wise Knowledge Distillation for Dense
    Prediction, ICCV 2021, arXiv:2011.13256, Eq. 4.

    Args:
        map_s: ``(B, D, H, W)``; gradient flows.
        map_t: the teacher's, of the same shape; constant.
        tau: temperature above 0.

    Returns:
        Scalar ``()`` in float32 or better; 0 for maps that differ by a constant in each channel.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> cwd_loss(torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.0, 2.0]]]]))
        tensor(0.3278)
    """
    require_one_shape("cwd_loss", map_s, map_t)
    s, t = (at_least_float32(f).flatten(2).flatten(0, 1) / tau for f in (map_s, map_t.detach()))
    return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="sum", log_target=True) * (tau**2 / len(s))


def pkd_loss(map_s: Tensor, map_t: Tensor) -> Tensor:
    """``1/2 * mean((x_s - x_t)^2)`` of the maps ``x``, standardised for each channel over images and positions.

    The loss is one minus Pearson's correlation of the channels, up to the unbiased deviation and the 1e-6 that is added
    to it. Cao et al., PKD, NeurIPS 2022, arXiv:2207.02039, Eq. 4 and 5.

    Args:
        map_s: ``(B, D, H, W)``; gradient flows.
        map_t: the teacher's, of the same shape; constant.

    Returns:
        Scalar ``()`` in float32 or better. Channels of one position give 0, without gradient.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> f = torch.tensor([[[[0.0, 1.0, 2.0]]]])
        >>> pkd_loss(f, -f)
        tensor(1.3333)
    """
    require_one_shape("pkd_loss", map_s, map_t)
    s, t = (at_least_float32(f).movedim(1, 0).flatten(1) for f in (map_s, map_t.detach()))
    if s.shape[1] < 2:
        return 0 * s.sum()
    s, t = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6) for x in (s, t))
    return F.mse_loss(s, t) / 2


def fgfi_masks(
    anchors: Sequence[Tensor], sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor], threshold: float = 0.5
) -> list[Tensor]:
    """Positions near the objects: some anchor's IoU with a box is above ``threshold`` times the box's best IoU.

    The best IoU is over the anchors of all levels. Wang et al., Distilling Object Detectors with Fine-grained Feature
    Imitation, CVPR 2019, arXiv:1906.03609, Sec. 3.1.

    Args:
        anchors: for each level ``(H W A, 4)`` corners ``x1 y1 x2 y2`` in pixels, positions row by row, the A anchors of
            a position side by side.
        sizes: ``(H, W)`` of each level.
        boxes: for each image ``(G, 4)`` true boxes; G may be 0.
        threshold: share of the best IoU.

    Returns:
        For each level ``(B, H, W)`` booleans.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
        >>> fgfi_masks([anchors], [(1, 3)], [torch.tensor([[0.0, 0.0, 3.0, 2.0]])])
        [tensor([[[ True, False, False]]])]
    """
    counts, near = [len(a) for a in anchors], []
    every = torch.cat(list(anchors))
    for own in boxes:
        overlap = _iou(own.to(every.dtype), every)  # (G, anchors of all levels)
        best = overlap.amax(1, keepdim=True) if len(own) else overlap.new_zeros(0, 1)
        near.append(((overlap > threshold * best) & (best > 0)).any(0).split(counts))
    of_levels = zip(*near, strict=True)
    return [
        torch.stack([mask.view(*size, -1).any(2) for mask in level])
        for level, size in zip(of_levels, sizes, strict=True)
    ]


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """``(N, M)`` intersection over union of boxes ``(N, 4)`` and ``(M, 4)``."""
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(a[:, None, :2], b[None, :, :2])
    both = sides.clamp(min=0).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    return both / (areas[0][:, None] + areas[1][None] - both)


def fgfi_loss(maps_s: Sequence[Tensor], maps_t: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """``sum over levels, masked positions and channels of (f_s - f_t)^2, over 2 N``; N masked positions in all.

    Args:
        maps_s: ``(B, D, H, W)`` for each level; gradient flows.
        maps_t: of the same shapes; constant.
        masks: ``(B, H, W)`` for each level, see :func:`fgfi_masks`.

    Returns:
        Scalar ``()`` in float32 or better; 0 for empty masks.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> one = torch.ones(1, 3, 1, 2)
        >>> fgfi_loss([one], [0 * one], [torch.tensor([[[True, False]]])])
        tensor(1.5000)
    """
    total = 0.0
    for f_s, f_t, mask in zip(maps_s, maps_t, masks, strict=True):
        require_one_shape("fgfi_loss", f_s, f_t)
        square = (at_least_float32(f_s) - at_least_float32(f_t.detach())).square().sum(1)
        total = total + torch.where(mask, square, 0.0).sum()
    return total / (2 * sum(mask.sum() for mask in masks).clamp(min=1))


def fkd_attention(maps: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Where a map is large: ``H W softmax(mean over D of |f| / tau)``, and likewise ``D softmax`` over channels.

    Zhang and Ma, Improve Object Detection with Feature-based Knowledge Distillation, ICLR 2021, Eq. 1 and 2.

    Args:
        maps: ``(B, D, H, W)``; constant.
        tau: temperature above 0.

    Returns:
        ``(B, 1, H, W)`` and ``(B, D, 1, 1)``, each of mean 1.

    Example:
        >>> spatial, channel = fkd_attention(torch.tensor([[[[0.0, 1.0]]]]), 0.5)
        >>> spatial.flatten(), channel.flatten()
        (tensor([0.2384, 1.7616]), tensor([1.]))
    """
    size = at_least_float32(maps.detach()).abs()
    spatial = (size.mean(1).flatten(1) / tau).softmax(1) * size[0, 0].numel()
    channel = (size.mean((2, 3)) / tau).softmax(1) * size.shape[1]
    return spatial.view(len(maps), 1, *maps.shape[2:]), channel[:, :, None, None]


def masked_distance(f_s: Tensor, f_t: Tensor, mask: Tensor | float = 1.0) -> Tensor:
    """``sqrt(sum of mask * (f_s - f_t)^2)`` over all entries of a batch. Equal maps give 0, without gradient.

    Args:
        f_s: any shape; gradient flows.
        f_t: the same shape; constant.
        mask: 0 or more; broadcasts to that shape.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> masked_distance(torch.tensor([3.0, 4.0]), torch.zeros(2))
        tensor(5.)
    """
    if f_s.shape != f_t.shape:
        raise InputError(f"masked_distance takes two tensors of one shape, got {tuple(f_s.shape)}, {tuple(f_t.shape)}")
    return ((at_least_float32(f_s) - at_least_float32(f_t.detach())) * torch.as_tensor(mask).sqrt()).norm()
