"""MixUp, CutMix and label smoothing: what makes shares of classes out of class numbers.

Zhang, Cisse, Dauphin, Lopez-Paz. mixup: Beyond Empirical Risk Minimization. ICLR 2018. arXiv:1710.09412.
Yun et al. CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features. ICCV 2019.
arXiv:1905.04899.

As in views, the draws are functions of seed, epoch, image index and name. Other than a view, the result depends on
the batch: an image's partner is one of those it comes with, of its own process where several train.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mdistiller.functional.mixing import beta_shares, share_quantiles

from .views import Draws


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
    """``(B,)`` float32 from Beta(alpha, alpha), one for each image. Slot 0.

    Args:
        rng: the batch's draws.
        alpha: above 0; small values leave most images nearly alone.
    """
    return beta_shares(rng.uniform(0), _quantiles(alpha, rng.state.device), alpha)


def mixup(images: Tensor, rng: Draws, alpha: float = 1.0) -> Mixture:
    """Each image blended with another one of the batch: ``share * image + (1 - share) * partner``.

    The targets are to be mixed alike, or the losses: ``share * ce(logits, target) + (1 - share) * ce(logits,
    target[partner])``.

    Args:
        images: ``(B, C, H, W)`` floating point, not changed.
        rng: the batch's draws, ``Draws.of_view("mixup", seed, epoch, index)``; slots 0 and 1.
        alpha: see :func:`draw_shares`.
    """
    partner, share = draw_partners(rng), draw_shares(rng.skip(1), alpha)
    return Mixture(_blended(images, partner, share), partner, share)


def cutmix(images: Tensor, rng: Draws, alpha: float = 1.0) -> Mixture:
    """Each image with a rectangle of another one of the batch, in the same place.

    The rectangle has the image's proportions and, but for rounding, ``1 - share`` of its area, with the share from
    Beta(alpha, alpha); its centre is uniform, and what lies outside is cut off. The share returned is what is left.

    Args:
        images: ``(B, C, H, W)``, not changed.
        rng: the batch's draws; slots 0 to 3.
        alpha: see :func:`draw_shares`.
    """
    partner = draw_partners(rng)
    inside, share = _rectangles(images, rng.skip(1), alpha)
    return Mixture(torch.where(inside[:, None], images.index_select(0, partner), images), partner, share)


class LabelMixing:
    """Turns a batch's class numbers ``(B,)`` into shares ``(B, K)`` that sum to 1, and mixes its images accordingly.

    With both alphas, each image is mixed by MixUp or by CutMix, evenly. All views of an image have one partner, one
    share and one rectangle.

    Args:
        num_classes: K.
        mixup: alpha of MixUp; 0: none.
        cutmix: alpha of CutMix; 0: none.
        smoothing: share of a label that is spread over all classes evenly.
        seed: of the draws.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, smoothing: float, seed: int) -> None:
        self.num_classes, self.seed = num_classes, seed
        self.mixup, self.cutmix, self.smoothing = mixup, cutmix, smoothing

    @property
    def needs_partners(self) -> bool:
        """Whether an image depends on others, rather than only its label being smoothed."""
        return bool(self.mixup or self.cutmix)

    def partners(self, epoch: int, index: Tensor) -> Tensor:
        """``(B,)`` int64: for each image of a batch, the place in the batch of the one that is mixed in."""
        return draw_partners(Draws.of_view("mixing", self.seed, epoch, index))

    def __call__(
        self, batch: dict[str, Tensor], epoch: int, index: Tensor, partner: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The batch mixed.

        Args:
            batch: ``image...`` in floating point and ``target``.
            epoch: from 1.
            index: ``(B,)``, which draws an image has.
            partner: ``(B,)``; where not given, :meth:`partners`.
        """
        target = F.one_hot(batch["target"], self.num_classes).float()
        target = (1 - self.smoothing) * target + self.smoothing / self.num_classes
        if not self.needs_partners:
            return {**batch, "target": target}
        rng = Draws.of_view("mixing", self.seed, epoch, index)
        partner, cut = self.partners(epoch, index) if partner is None else partner, self._cut(rng.skip(1))
        fields = [name for name in batch if name.startswith("image")]
        inside, left = _rectangles(batch[fields[0]], rng.skip(2), self.cutmix) if self.cutmix else (None, None)
        share = draw_shares(rng.skip(2), self.mixup) if self.mixup else left
        mixed = {}
        for name in fields:
            images = batch[name]
            blended = _blended(images, partner, share) if self.mixup else images
            if inside is not None:
                pasted = torch.where(inside[:, None], images.index_select(0, partner), images)
                blended = torch.where(cut[:, None, None, None], pasted, blended)
            mixed[name] = blended
        if left is not None:
            share = torch.where(cut, left, share)
        target = share[:, None] * target + (1 - share[:, None]) * target.index_select(0, partner)
        return {**batch, **mixed, "target": target}

    def _cut(self, rng: Draws) -> Tensor:
        """``(B,)`` bool: which images CutMix takes. Slot 0."""
        uniform = rng.uniform(0)
        return uniform < 0.5 if self.mixup and self.cutmix else torch.full_like(uniform, bool(self.cutmix)).bool()


def _blended(images: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    weight = share.to(images.dtype)[:, None, None, None]
    return weight * images + (1 - weight) * images.index_select(0, partner)


def _rectangles(images: Tensor, rng: Draws, alpha: float) -> tuple[Tensor, Tensor]:
    """CutMix's rectangles ``(B, H, W)`` bool, and the share ``(B,)`` of the image outside. Slots 0 to 2."""
    side = (1 - draw_shares(rng, alpha)).sqrt()
    spans = []
    for slot, size in zip((1, 2), images.shape[2:], strict=True):
        centre, half = (rng.uniform(slot) * size).floor(), (side * size).floor() / 2
        position = torch.arange(size, device=side.device)
        start, end = (centre - half).floor(), (centre + half).floor()
        spans.append((position >= start[:, None]) & (position < end[:, None]))
    inside = spans[0][:, :, None] & spans[1][:, None, :]
    return inside, 1 - inside.float().mean((1, 2))


@functools.lru_cache(maxsize=8)
def _quantiles(alpha: float, device: torch.device) -> Tensor:
    return share_quantiles(alpha).to(device)
