"""Images to contrast each image with: one positive and many of other classes (CRD's sampling).

Tian, Krishnan, Isola. Contrastive Representation Distillation. ICLR 2020. arXiv:1910.10699.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mdistiller.functional import draws
from mdistiller.registry import InputError

from .subsets import check_class_numbers
from .views import name_key

MODES = ("exact", "relax")


class Negatives:
    """Draws rows of K + 1 positions in the training set, as a function of seed, epoch and image.

    Args:
        labels: ``(N,)`` of the training set, on the device of the draws.
        count: K, the negatives of each image. They differ from each other unless K exceeds the images of other
            classes; each of these is drawn with the same probability.
        mode: the positive is the image itself (``exact``) or any image of its class (``relax``).
        seed: of the draws.

    Raises:
        InputError: an unknown mode, no negative asked for, no class numbers, or only one class.
    """

    def __init__(self, labels: Tensor, count: int, mode: str = "exact", seed: int = 0) -> None:
        if mode not in MODES:
            raise InputError(f"CRD.MODE takes {' or '.join(MODES)}, got {mode!r}")
        if not isinstance(count, int) or count < 1:
            raise InputError(f"CRD.NCE.K, the number of negatives for each image, must be at least 1, got {count}")
        check_class_numbers(labels, "contrastive_index")
        if len(labels.unique()) < 2:
            raise InputError("contrastive_index needs images of at least two classes")
        self.count, self.mode, self.seed = count, mode, seed
        self.labels = labels
        self.by_class = labels.argsort(stable=True)  # the images of a class stand side by side
        self.class_size = labels.bincount()
        self.class_start = self.class_size.cumsum(0) - self.class_size

    def draw(self, epoch: int, index: Tensor) -> Tensor:
        """``(B, K + 1)`` int64: the positive, then the negatives, of the images at ``index`` ``(B,)``."""
        start = draws.hash_keys(self.seed, name_key("negatives"), epoch, index)[:, None]
        label = self.labels[index]
        first, size = self.class_start[label][:, None], self.class_size[label][:, None]
        others = len(self.labels) - size
        # One of each of K equal stretches of a circle of all negatives, which is turned at random: they are
        # distinct, and none is likelier than another.
        slot = torch.arange(self.count, device=index.device)[None, :]
        low, high = slot * others // self.count, (slot + 1) * others // self.count
        chosen = low + (draws.uniform(slot + 2, start=start).double() * (high - low).clamp(min=1)).long()
        turn = (draws.uniform(0, start=start).double() * others).long()
        place = (chosen + turn) % others
        negative = self.by_class[place + size * (place >= first)]  # skips the image's own class
        if self.mode == "exact":
            positive = index[:, None]
        else:
            positive = self.by_class[first + (draws.uniform(1, start=start).double() * size).long()]
        return torch.cat([positive, negative], dim=1)


def negatives_from(cfg: Any, section: str, labels: Tensor) -> Negatives:
    """Negatives by ``NCE.K`` and ``MODE`` of the method's own section, or else of ``CRD``.

    Raises:
        InputError: neither says K; see also :class:`Negatives`.
    """
    for name in (section, "CRD"):
        settings = cfg.get(name) or {}
        if "K" in (settings.get("NCE") or {}):
            return Negatives(labels, settings["NCE"]["K"], settings.get("MODE", "exact"), cfg.EXPERIMENT.SEED)
    raise InputError(
        "the method asks for contrastive_index, and the number of negatives is not set; set "
        "CRD.NCE.K (mdistiller: 16384)"
    )
