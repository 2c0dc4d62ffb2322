"""NORM: widen the student's last map N times over, and match each part with the teacher's last map.

Liu, Li, Li, Yao. NORM: Knowledge Distillation via N-to-One Representation Matching. ICLR 2023. arXiv:2305.13803.
Shapes: B images, C channels of the teacher's last map, H, W positions.

Two 1x1 convolutions, each with a batch norm and without ReLU, stand in front of the student's pooling: the first widens
the map to ``N * C`` channels, the second narrows it again, and the result is added to the map. Each of the N parts of
the wide map should be the teacher's map (:func:`norm_loss`); of maps of two sizes the larger is max-pooled. The
deployed network is the student with both convolutions, which are linear after training.

Settings of the authors' code that the paper does not have, and that gave the published numbers:

- ``LOGIT_SCALE``: the cross-entropy and KD see logits that are normalised over the classes (mean 0, variance 1) and
  multiplied by 2.5; 0 leaves them alone;
- ``SCHEDULE``, ``SCHEDULE_EPOCHS``: the factor of the weight changes at certain epochs.

Our readings: the convolutions stand behind the student's last layer before the pooling (in WRN, ShuffleV2 and
MobileNetV2 this layer follows the last stage). The authors searched the cross-entropy's weight over 0.0625, 0.125, 0.25
and 0.5 and do not say which won; 0.5 is ours. NORM+KD is ``LOSS.KD_WEIGHT``; ``DISTILLER.ADD_KD`` would teach the
student without the convolutions. With both own weights 0 nothing is added: plain training.

``NORM_CRD`` is NORM with CRD's loss on the pooled features (mdistiller/distillers/CRD.py). In the authors' code one
option is both its weight and the logits' scale, 2.5; here each has a key.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, gradient_in_layout, require_same_images, spatial_mean
from mdistiller.models._features import pooled_map
from mdistiller.options import MANY, Option, weight
from mdistiller.registry import InputError

from ._base import Distiller, register_distiller
from ._common import generator_kept
from .CRD import DEFAULTS as CRD_DEFAULTS
from .CRD import ContrastMemory, Embed, nce_loss
from .KD import kd_loss

DEFAULTS = {
    "N": Option(8, "parts of the wide map", at_least=1, at_most=MANY),
    "LOGIT_SCALE": Option(2.5, "of the normalised logits; 0: logits as they are", at_least=0),
    "TEMPERATURE": Option(4.0, "temperature of KD", above=0),
    "SCHEDULE": Option([0.1, 0.5, 1.0, 0.5, 0.1], "factors of FEAT_WEIGHT", at_least=0),
    "SCHEDULE_EPOCHS": Option([10, 20, 180, 210], "epochs from which on the next factor holds", at_least=1),
    "LOSS": {
        "CE_WEIGHT": weight(0.5, "of the cross-entropy"),
        "FEAT_WEIGHT": weight(1.0, "of norm_loss"),
        "KD_WEIGHT": weight(0.0, "of KD"),
    },
}
CRD_PART = {"MODE": CRD_DEFAULTS["MODE"], "NCE": CRD_DEFAULTS["NCE"], "FEAT": {"DIM": CRD_DEFAULTS["FEAT"]["DIM"]}}
DEFAULTS_CRD = {**DEFAULTS, **CRD_PART, "LOSS": {**DEFAULTS["LOSS"], "CRD_WEIGHT": weight(2.5, "of CRD's loss")}}
PAPER = "Liu et al., ICLR 2023, arXiv:2305.13803"


def norm_loss(wide: Tensor, f_t: Tensor) -> Tensor:
    """``sum over the N parts w_n of mean((w_n - F_t)^2)``, the mean over images, channels and positions.

    Args:
        wide: ``(B, N * C, H, W)``; gradient flows.
        f_t: ``(B, C, H', W')``; constant. The larger map is max-pooled.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different numbers of images, or a width that is no multiple of the teacher's.

    Example:
        >>> norm_loss(torch.ones(2, 6, 4, 4), torch.zeros(2, 3, 8, 8))
        tensor(2.)
    """
    require_same_images("norm_loss", wide, f_t)
    if wide.shape[1] % f_t.shape[1]:
        raise InputError(f"norm_loss takes N times the teacher's channels, got {tuple(wide.shape)}, {tuple(f_t.shape)}")
    size = [min(pair) for pair in zip(wide.shape[2:], f_t.shape[2:], strict=True)]
    wide, f_t = (
        at_least_float32(f if list(f.shape[2:]) == size else F.adaptive_max_pool2d(f, size))
        for f in (wide, f_t.detach())
    )
    parts = wide.unflatten(1, (-1, f_t.shape[1]))
    return (parts - f_t[:, None]).square().mean() * parts.shape[1]


def normalised(logits: Tensor, scale: float) -> Tensor:
    """``scale * (z - mean) / sqrt(variance + 1e-7)`` of each sample; the logits themselves for scale 0."""
    if not scale:
        return logits
    return scale * F.layer_norm(at_least_float32(logits), logits.shape[1:], eps=1e-7)


class Expansion(nn.Module):
    """``x + narrow(widen(x))`` of maps ``(B, C_s, H, W)``; returns the sum and the wide map.

    Args:
        width: C_s.
        wide: channels of the wide map.
    """

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide))
        self.narrow = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = self.widen(x)
        return x + self.narrow(wide), wide


class Expanded(nn.Module):
    """The student with the expansion in front of its pooling: images ``(B, 3, H, W)`` to logits ``(B, K)``.

    Args:
        student: returns ``(logits, features)``.
        expansion: of the map that the student pools.
        classifier: name of the student's classifier.
        scale: of the normalised logits.
    """

    def __init__(self, student: nn.Module, expansion: Expansion, classifier: str, scale: float) -> None:
        super().__init__()
        self.student, self.expansion, self.classifier, self.scale = student, expansion, classifier, scale

    def forward(self, image: Tensor) -> Tensor:
        return self.parts(image)[0]

    def parts(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, pooled features and the wide map."""
        maps, wide = self.expansion(pooled_map(self.student(image)[1]))
        pooled = spatial_mean(gradient_in_layout(maps))
        return normalised(self.student.get_submodule(self.classifier)(pooled), self.scale), pooled, wide


@register_distiller("NORM", DEFAULTS, paper=PAPER, family="feature")
class NORM(Distiller):
    """Each part of a wide map of the student should be the teacher's last map (:func:`norm_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = own = cfg[self.section]
        if len(own.SCHEDULE) != len(own.SCHEDULE_EPOCHS) + 1:
            raise InputError(
                f"{self.section}.SCHEDULE must have one entry more than SCHEDULE_EPOCHS, got {own.SCHEDULE} and "
                f"{own.SCHEDULE_EPOCHS}"
            )
        self.is_plain = not any(value for key, value in own.LOSS.items() if key != "CE_WEIGHT")
        if self.is_plain:
            return
        of_student, of_teacher = self.network_facts(cfg)
        self.classifier_name = of_student.need("classifier")
        width = of_student.need("pooled_map")[1]
        with generator_kept():
            self.expansion = Expansion(width, own.N * of_teacher.channels[-1])

    def deployed(self) -> nn.Module:
        """The student with the expansion."""
        if self.is_plain:
            return self.student
        return Expanded(self.student, self.expansion, self.classifier_name, self.own.LOGIT_SCALE)

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.terms(image, target, epoch)[:2]

    def terms(
        self, image: Tensor, target: Tensor, epoch: int
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, Tensor | None]:
        """Logits, losses, and both networks' pooled features, ``None`` for plain training."""
        own = self.own
        if self.is_plain:
            logits, _ = self.student(image)
            return logits, {"loss_ce": own.LOSS.CE_WEIGHT * F.cross_entropy(logits, target)}, None, None
        logits, pooled, wide = self.deployed().parts(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        factor = own.SCHEDULE[sum(epoch >= start for start in own.SCHEDULE_EPOCHS)]
        distance = norm_loss(gradient_in_layout(wide), features_teacher["feats"][-1])
        losses = {
            "loss_ce": own.LOSS.CE_WEIGHT * F.cross_entropy(logits, target),
            "loss_kd": factor * own.LOSS.FEAT_WEIGHT * distance,
        }
        if own.LOSS.KD_WEIGHT:
            kd = kd_loss(logits, normalised(logits_teacher, own.LOGIT_SCALE), own.TEMPERATURE)
            losses["loss_logits"] = own.LOSS.KD_WEIGHT * kd
        return logits, losses, pooled, features_teacher["pooled_feat"]


@register_distiller("NORM_CRD", DEFAULTS_CRD, paper=PAPER, family="feature")
class NORMCRD(NORM):
    """NORM, and CRD's contrastive loss on the pooled features (:func:`~mdistiller.distillers.CRD.nce_loss`)."""

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any, num_data: int) -> None:
        super().__init__(student, teacher, cfg)
        self.num_data = num_data
        if self.is_plain:
            return
        dim, nce = self.own.FEAT.DIM, self.own.NCE
        width_s, width_t = (facts.need("pooled_width") for facts in self.network_facts(cfg))
        with generator_kept():
            self.embed_s, self.embed_t = Embed(width_s, dim), Embed(width_t, dim)
            self.memory = ContrastMemory(dim, num_data, nce.K, nce.TEMPERATURE, nce.MOMENTUM)

    def forward_train(
        self,
        image: Tensor,
        target: Tensor,
        index: Tensor,
        contrastive_index: Tensor,
        epoch: int = 1,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logits, losses, pooled_s, pooled_t = self.terms(image, target, epoch)
        if pooled_s is not None:
            with torch.autocast(image.device.type, enabled=False):
                ratios = self.memory(self.embed_s(pooled_s), self.embed_t(pooled_t), index, contrastive_index)
                contrast = sum(nce_loss(log_ratio, self.num_data) for log_ratio in ratios)
            losses["loss_crd"] = self.own.LOSS.CRD_WEIGHT * contrast
        return logits, losses
