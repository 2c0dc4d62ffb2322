"""CAT-KD: match the class activation maps.

Guo, Yan, Li, Lin. Class Attention Transfer Based Knowledge Distillation. CVPR 2023. arXiv:2304.12777. Shapes: B images,
K classes, H, W positions.

The activation map (CAM) of a class is the classifier's weighted sum of the channels of the map that is pooled. Its mean
is the class's logit without bias. CAMs are pooled to ``RESOLUTION`` squared positions and, by ``NORMALISE``, divided by
their length over the positions. The loss is the mean squared difference (:func:`cat_loss`). ``CAT`` alone, without
labels, is ``LOSS.CE_WEIGHT`` 0.

The authors change the networks: the classifier becomes a convolution without bias in front of the pooling. Here the
networks stay as they are, and the bias, which no CAM has, stays in the logits. ``BINARISE`` and ``TOP_CLASSES`` are
the ablations. The authors' code keeps the CAMs of one class less than its key says; ``TOP_CLASSES`` n keeps n.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import at_least_float32, require_same_width, unit
from mdistiller.models._features import pooled_map
from mdistiller.options import MANY, Option

from ._base import Distiller, register_distiller
from ._common import feature_losses

DEFAULTS = {
    "RESOLUTION": Option(2, "side of the pooled CAMs", at_least=1, at_most=MANY),
    "NORMALISE": Option(True, "divide each CAM by its length"),
    "BINARISE": Option(False, "the teacher's CAMs are 1 where they exceed their mean absolute value, else 0"),
    "TOP_CLASSES": Option(0, "compare the classes with the teacher's highest logits only; 0: all", at_least=0),
    "LOSS": feature_losses(400.0),
}
PAPER = "Guo et al., CVPR 2023, arXiv:2304.12777"


def class_activation_maps(maps: Tensor, weight: Tensor) -> Tensor:
    """``sum_c weight[k, c] maps[c]`` of each class k.

    Args:
        maps: ``(B, C, H, W)``, the map that is pooled; gradient flows.
        weight: ``(K, C)`` of the classifier; gradient flows.

    Returns:
        ``(B, K, H, W)`` in float32 or better.
    """
    with torch.autocast(maps.device.type, enabled=False):
        return F.conv2d(at_least_float32(maps), at_least_float32(weight).flatten(1)[:, :, None, None])


def binary(cam: Tensor) -> Tensor:
    """1 where a CAM exceeds the mean of its absolute values, else 0; ``(B, K, H, W)``."""
    return (cam > cam.abs().mean((2, 3), keepdim=True)).to(cam.dtype)


def cat_loss(
    cam_s: Tensor, cam_t: Tensor, resolution: int = 2, normalise: bool = True, kept: Tensor | None = None
) -> Tensor:
    """``(u_s - u_t)^2``, u the pooled CAMs; mean over images, classes and positions.

    Args:
        cam_s: ``(B, K, H, W)``; gradient flows.
        cam_t: ``(B, K, H', W')``; constant.
        resolution: side of the pooled CAMs.
        normalise: u is divided by its length over the positions.
        kept: ``(B, n)`` the classes that are compared; ``None``: all.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: CAMs of different numbers of images or classes.

    Example:
        >>> cam_s, cam_t = torch.ones(1, 1, 2, 2), torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]])
        >>> cat_loss(cam_s, cam_t), cat_loss(cam_s, cam_t, normalise=False)
        (tensor(0.2500), tensor(3.))
    """
    require_same_width("cat_loss", cam_s, cam_t)
    pooled = [F.adaptive_avg_pool2d(at_least_float32(cam), resolution).flatten(2) for cam in (cam_s, cam_t.detach())]
    if kept is not None:
        pooled = [cam.gather(1, kept[:, :, None].expand(-1, -1, cam.shape[2])) for cam in pooled]
    return F.mse_loss(*(map(unit, pooled) if normalise else pooled))


@register_distiller("CATKD", DEFAULTS, paper=PAPER, family="feature")
class CATKD(Distiller):
    """Class activation maps (:func:`cat_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own = cfg.CATKD
        facts = self.network_facts(cfg)
        for of_network in facts:
            of_network.need("pooled_map")
        self.classifiers = [of_network.need("classifier") for of_network in facts]

    def forward_train(self, image: Tensor, target: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            logits_teacher, features_teacher = self.teacher(image)
        weight_s, weight_t = (
            network.get_submodule(path).weight
            for network, path in zip((self.student, self.teacher), self.classifiers, strict=True)
        )
        cam_t = class_activation_maps(pooled_map(features_teacher), weight_t)
        if self.own.BINARISE:
            cam_t = binary(cam_t)
        top = self.own.TOP_CLASSES
        kept = logits_teacher.topk(min(top, logits_teacher.shape[1]), dim=1).indices if top else None
        cam_s = class_activation_maps(pooled_map(features_student), weight_s)
        distance = cat_loss(cam_s, cam_t, self.own.RESOLUTION, self.own.NORMALISE, kept)
        return logits_student, {
            "loss_ce": self.own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": self.own.LOSS.FEAT_WEIGHT * distance,
        }
