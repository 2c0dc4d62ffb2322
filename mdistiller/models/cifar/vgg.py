"""VGG with batch norm for CIFAR: one linear classifier on the pooled last map.

Simonyan, Zisserman. Very Deep Convolutional Networks for Large-Scale Image Recognition. 2014.
arXiv:1409.1556. State-dict keys are mdistiller's (``block0.0`` ... ``block4.1``, ``classifier``). There is no
stem map: all five maps are stages. ``preact_feats[0]`` is activated, as in mdistiller.
Departs from mdistiller: the pooling between the last two blocks is skipped where their maps would fall
below 2x2, not for every input but 64x64. The two rules agree at 32x32 and 64x64.
"""

from __future__ import annotations

from typing import Any

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import Tail, init_he_fan_out, init_small_linear
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

_WIDTHS = (64, 128, 256, 512, 512)


def _conv_block(in_channels: int, out_channels: int, num_convs: int) -> nn.Sequential:
    """Convolutions with batch norm, and ReLUs between them. The block ends before its last ReLU."""
    layers: list[nn.Module] = []
    for _ in range(num_convs):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]
        in_channels = out_channels
    return nn.Sequential(*layers[:-1])


@torch.fx.wrap  # symbolic tracing keeps the call whole: the shape decides
def _halve_if_large(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) if min(x.shape[-2:]) > 4 else x


class PoolIfLarge(nn.Module):
    """Max-pooling by 2 of maps above 4x4. Smaller maps do not change."""

    def forward(self, x: Tensor) -> Tensor:
        return _halve_if_large(x)


class VGG(FeatureNet):
    """Five blocks of 64, 128, 256, 512, 512 channels.

    Args:
        num_convs: convolutions in each of the five blocks.
        num_classes: K.
    """

    has_stem = False

    def __init__(self, num_convs: tuple[int, ...], num_classes: int = 100) -> None:
        super().__init__()
        self.stage_channels = list(_WIDTHS)
        c0, c1, c2, c3, c4 = _WIDTHS
        self.block0 = _conv_block(3, c0, num_convs[0])
        self.block1 = _conv_block(c0, c1, num_convs[1])
        self.block2 = _conv_block(c1, c2, num_convs[2])
        self.block3 = _conv_block(c2, c3, num_convs[3])
        self.block4 = _conv_block(c3, c4, num_convs[4])
        self.pool0 = nn.MaxPool2d(2)
        self.pool1 = nn.MaxPool2d(2)
        self.pool2 = nn.MaxPool2d(2)
        self.pool3 = PoolIfLarge()  # from 64x64 inputs up
        self.pool4 = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c4, num_classes)
        init_he_fan_out(self)
        init_small_linear(self.classifier)

    def get_feat_modules(self) -> nn.ModuleList:
        blocks = (self.block0, self.block1, self.block2, self.block3, self.block4)
        pools = (self.pool0, self.pool1, self.pool2, self.pool3, self.pool4)
        return nn.ModuleList([module for pair in zip(blocks, pools, strict=True) for module in pair])

    def get_stages(self) -> Stages:
        """Without the first block, which is taken for the stem."""
        pools = (self.pool0, self.pool1, self.pool2, self.pool3)
        blocks = (self.block1, self.block2, self.block3, self.block4)
        run = [
            lambda x, pool=pool, block=block: block(pool(F.relu(x))) for pool, block in zip(pools, blocks, strict=True)
        ]
        return Stages(lambda f: f["preact_feats"][1:], run, self.classifier, rectified=False)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [block[-1] for block in (self.block1, self.block2, self.block3, self.block4)]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        blocks = [self.block1, self.block2, self.block3, self.block4]
        pools = [self.pool0, self.pool1, self.pool2, self.pool3]
        parts = [nn.Sequential(pool, block, nn.ReLU()) for pool, block in zip(pools, blocks, strict=True)]
        again = [nn.Sequential(self.block4, nn.ReLU()) for _ in range(2)]
        return [(0, Tail(*parts)), (1, Tail(*parts[1:])), (2, Tail(*parts[2:])), (4, Tail(*again))]

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.block0(x))  # 32x32
        f1_pre = self.block1(self.pool0(f0))  # 16x16
        f1 = F.relu(f1_pre)
        f2_pre = self.block2(self.pool1(f1))  # 8x8
        f2 = F.relu(f2_pre)
        f3_pre = self.block3(self.pool2(f2))  # 4x4
        f3 = F.relu(f3_pre)
        f4_pre = self.block4(self.pool3(f3))  # 4x4
        f4 = F.relu(f4_pre)
        pooled = self.pool4(f4).flatten(1)
        features = make_features([f0, f1, f2, f3, f4], pooled, preact_feats=[f0, f1_pre, f2_pre, f3_pre, f4_pre])
        return self.classifier(pooled), features


@register_model("cifar", "vgg8")
def vgg8_bn(**kwargs: Any) -> VGG:
    return VGG((1, 1, 1, 1, 1), **kwargs)


@register_model("cifar", "vgg11")
def vgg11_bn(**kwargs: Any) -> VGG:
    return VGG((1, 1, 2, 2, 2), **kwargs)


@register_model("cifar", "vgg13", checkpoint="vgg13_vanilla/ckpt_epoch_240.pth")
def vgg13_bn(**kwargs: Any) -> VGG:
    return VGG((2, 2, 2, 2, 2), **kwargs)


@register_model("cifar", "vgg16")
def vgg16_bn(**kwargs: Any) -> VGG:
    return VGG((2, 2, 3, 3, 3), **kwargs)


@register_model("cifar", "vgg19")
def vgg19_bn(**kwargs: Any) -> VGG:
    return VGG((2, 2, 4, 4, 4), **kwargs)
