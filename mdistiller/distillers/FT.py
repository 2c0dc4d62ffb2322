"""FT: factor transfer, the student translates into the teacher's paraphrase.

Kim, Park, Kwak. Paraphrasing Complex Network: Network Compression via Factor Transfer. NeurIPS 2018. arXiv:1802.04977.
Shapes: B images, C channels of the teacher's last map, H, W positions.

Before training, a paraphraser learns to code the teacher's last map in ``RATE C`` channels: encoder and decoder of
three layers each, mean squared error of the decoded map (``PREPARE``; the result is kept for other students). Then the
paraphraser is frozen. A translator, the same encoder with batch norms, is trained with the student. The factor of a
code is the mean over channels of its squares, divided by its length. The loss is the mean absolute difference of both
networks' factors (:func:`ft_loss`).

As in RepDistiller: its factors are attention maps, where the paper normalises the code itself. RepDistiller's rate of
the first stage is 0.01 for ResNet and WRN students, and ``SOLVER.LR`` for others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, draws, gradient_in_layout, pool_to_common
from mdistiller.options import Option

from ._base import register_distiller
from ._common import FeatureDistiller, feature_losses, generator_kept
from ._prepared import Batches, minimise, preparation_options
from .AT import attention_map

DEFAULTS = {
    "RATE": Option(0.5, "channels of the code, as a share of the teacher's", above=0, at_most=1),
    "P": Option(1, "power of the difference: 1 absolute, 2 squared", at_least=1, at_most=2),
    "PREPARE": preparation_options(epochs=30, lr=0.01),
    "LOSS": feature_losses(200.0),
}
PAPER = "Kim et al., NeurIPS 2018, arXiv:1802.04977"

SLOPE = 0.1  # of the LeakyReLUs
PARAPHRASER_KEY = 4  # key of the seed for the paraphraser's initial weights


def ft_loss(code_s: Tensor, code_t: Tensor, p: int = 1) -> Tensor:
    """``mean |Q_s - Q_t|^p`` over images and positions, Q the factors ``unit(mean_c A_c^2)``.

    Args:
        code_s: ``(B, C_s, H_s, W_s)``; gradient flows. The larger map is pooled to the smaller size.
        code_t: ``(B, C_t, H_t, W_t)``; constant.
        p: 1 or 2.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: codes of different numbers of images.

    Example:
        >>> code_s, code_t = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> ft_loss(code_s, code_t)
        tensor(1.)
    """
    factor_s, factor_t = (attention_map(code, 2) for code in pool_to_common(code_s, code_t.detach()))
    return (factor_s - factor_t).abs().pow(p).mean()


def encoder(width: int, code: int, batch_norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions, ``width`` -> ``width`` -> ``code`` -> ``code`` channels, a LeakyReLU behind each."""
    return _three_layers(nn.Conv2d, (width, width, code, code), batch_norm)


def _three_layers(convolution: type, widths: tuple[int, ...], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers.append(convolution(before, after, kernel_size=3, padding=1))
        layers += [nn.BatchNorm2d(after)] if batch_norm else []
        layers.append(nn.LeakyReLU(SLOPE))
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """Encoder and decoder of the teacher's map, without batch norm."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder = encoder(width, code, batch_norm=False)
        self.decoder = _three_layers(nn.ConvTranspose2d, (code, code, width, width), batch_norm=False)

    def forward(self, maps: Tensor) -> Tensor:
        return self.decoder(self.encoder(maps))


@register_distiller("FT", DEFAULTS, paper=PAPER, family="feature")
class FT(FeatureDistiller):
    """Distance of translated and paraphrased last maps (:func:`ft_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher, cfg)
        self.own, self.lr = cfg.FT, cfg.SOLVER.LR
        width_s, width_t = (facts.channels[-1] for facts in self.network_facts(cfg))
        code = max(1, int(width_t * self.own.RATE))
        self.translator = encoder(width_s, code, batch_norm=True)
        with generator_kept(int(draws.hash_keys(cfg.EXPERIMENT.SEED, PARAPHRASER_KEY))):  # the same for each student
            self.paraphraser = Paraphraser(width_t, code).requires_grad_(False)

    def distance(self, features_student: dict[str, Any], features_teacher: dict[str, Any]) -> Tensor:
        code_s = self.translator(gradient_in_layout(features_student["feats"][-1]))
        with torch.no_grad():
            code_t = self.paraphraser.encoder(features_teacher["feats"][-1])
        return ft_loss(gradient_in_layout(code_s), code_t, self.own.P)

    def prepare(self, batches: Batches, autocast: Callable[[], AbstractContextManager]) -> dict[str, float]:
        """Train the paraphraser to reconstruct the teacher's last map."""

        def loss_of(batch: dict[str, Tensor]) -> Tensor:
            with autocast():
                with torch.no_grad():
                    _, features = self.teacher(batch["image"])
                last = features["feats"][-1]
                return F.mse_loss(at_least_float32(self.paraphraser(last)), at_least_float32(last))

        self.paraphraser.requires_grad_(True)
        try:
            return minimise(loss_of, self.paraphraser.parameters(), batches, self.own.PREPARE, self.lr)
        finally:
            self.paraphraser.requires_grad_(False)

    def preparation(self) -> tuple[nn.Module, dict[str, Any]]:
        """The paraphraser, and the settings on which it depends. It also depends on teacher, data and seed."""
        settings = {"RATE": self.own.RATE, **self.own.PREPARE}
        return self.paraphraser, settings | {"LR": self.own.PREPARE.LR or self.lr}
