"""MixUp: images blended with other images of their batch.

Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. ICLR 2018. arXiv:1710.09412.

As in views, the draws are functions of seed, epoch, image index and name. Other than a view, the result depends on
the batch: an image's partner is one of those it comes with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .views import Draws

ATTEMPTS = 33


class Mixture(NamedTuple):
    """Mixed images and how they came about.

    Args:
        images: ``(B, C, H, W)``.
        partner: ``(B,)`` positions in the batch, a permutation.
        share: ``(B,)`` float32 in 0 .. 1, of the image itself; its partner has the rest.
    """

    images: Tensor
    partner: Tensor
    share: Tensor


def draw_partners(rng: Draws) -> Tensor:
    """``(B,)``: a permutation of the batch's positions that leaves no image with itself, unless it is alone.

    The images are put into a random order, and each is given the next one. Slot 0.
    """
    order = rng.integers(0, 0, 2**31).argsort(stable=True)
    return torch.empty_like(order).scatter_(0, order, order.roll(-1))


def draw_shares(rng: Draws, alpha: float) -> Tensor:
    """``(B,)`` float32 from Beta(alpha, alpha), one for each image; two slots an attempt.

    By Johnk's method: with u, v uniform, ``x = u^(1/alpha)`` and ``y = v^(1/alpha)``, the ratio ``x / (x + y)``
    is Beta distributed given ``x + y <= 1``. Half of the pairs or more meet this, and the first one is taken;
    where none of 33 does, the share is 0.5.

    Args:
        rng: the batch's draws.
        alpha: above 0 and at most 1; small values leave most images nearly alone.

    Raises:
        ValueError: alpha outside that range.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be above 0 and at most 1, got {alpha}")
    share = torch.full_like(rng.state, 0.5, dtype=torch.float64)
    for attempt in reversed(range(ATTEMPTS)):
        # In logarithms: at alpha 0.01 the powers are below the smallest float64 more often than not.
        log_x, log_y = ((rng.uniform(2 * attempt + i).double() + 2.0**-25).log() / alpha for i in range(2))
        log_sum = torch.logaddexp(log_x, log_y)
        share = torch.where(log_sum <= 0, (log_x - log_sum).exp(), share)
    return share.float()


def mixup(images: Tensor, rng: Draws, alpha: float = 1.0) -> Mixture:
    """Each image blended with another one of the batch: ``share * image + (1 - share) * partner``.

    The targets are to be mixed alike, or the losses: ``share * ce(logits, target) + (1 - share) * ce(logits,
    target[partner])``.

    Args:
        images: ``(B, C, H, W)`` floating point, not changed.
        rng: the batch's draws, ``Draws.of_view("mixup", seed, epoch, index)``.
        alpha: see :func:`draw_shares`.
    """
    partner, share = draw_partners(rng), draw_shares(rng.skip(1), alpha)
    weight = share.to(images.dtype)[:, None, None, None]
    return Mixture(weight * images + (1 - weight) * images.index_select(0, partner), partner, share)
