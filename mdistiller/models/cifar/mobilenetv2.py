"""MobileNetV2 for CIFAR: half the width, a stem of stride 2, four size reductions.

Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. 2018.
arXiv:1801.04381. State-dict keys are mdistiller's (``blocks.<group>.<n>.conv.<layer>``). The maps after the
stem are outputs of linear bottlenecks, which have no ReLU: they are signed, and there are no
``preact_feats``. Departs from mdistiller: ReLU as there (not the paper's ReLU6); nothing is printed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import Tail, conv_bn_relu, init_he_fan_out, init_small_linear
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

# Of each group: channels at width 1, blocks, stride of the first block.
_GROUPS = [(16, 1, 1), (24, 2, 1), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1)]
_TAPPED_GROUPS = (1, 2, 4, 6)  # the last groups of their resolution, except 1 (the stem halves already)


class InvertedResidual(nn.Module):
    """1x1 up, 3x3 depthwise, linear 1x1 down; with a skip if the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            *conv_bn_relu(in_channels, hidden, 1),
            *conv_bn_relu(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return x + out if self.has_skip else out


class MobileNetV2(FeatureNet):
    """Stem, seven groups of inverted residuals, a 1x1 convolution to 1280 channels.

    Args:
        expansion: hidden over input channels of a block (the first group has 1).
        width_mult: multiplies the channels; the last convolution never narrows.
        num_classes: K.
    """

    def __init__(self, expansion: int = 6, width_mult: float = 1.0, num_classes: int = 100) -> None:
        super().__init__()
        in_channels = int(32 * width_mult)
        self.stage_channels = [in_channels] + [int(_GROUPS[i][0] * width_mult) for i in _TAPPED_GROUPS]
        self.conv1 = nn.Sequential(*conv_bn_relu(3, in_channels, 3, stride=2))
        self.blocks = nn.ModuleList()
        for group, (width, num_blocks, stride) in enumerate(_GROUPS):
            out_channels = int(width * width_mult)
            blocks = []
            for n in range(num_blocks):
                blocks.append(
                    InvertedResidual(in_channels, out_channels, stride if n == 0 else 1, expansion if group else 1)
                )
                in_channels = out_channels
            self.blocks.append(nn.Sequential(*blocks))
        last_channels = int(1280 * max(width_mult, 1.0))
        self.conv2 = nn.Sequential(*conv_bn_relu(in_channels, last_channels, 1))
        self.classifier = nn.Sequential(nn.Linear(last_channels, num_classes))
        init_he_fan_out(self)
        init_small_linear(self.classifier[0])

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.blocks])

    def get_stages(self) -> Stages:
        """The last stage ends with the last convolution, behind its ReLU."""
        groups = [self.blocks[start:end] for start, end in ((0, 2), (2, 3), (3, 5), (5, 7))]
        run = [nn.Sequential(*group) for group in groups[:-1]] + [nn.Sequential(*groups[-1], self.conv2)]
        return Stages(lambda f: [*f["feats"][1:4], f["pooled_map"]], run, self.classifier, rectified=False)

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last batch norm of each tapped group. No ReLU follows; OFD's margins are still defined."""
        return [self.blocks[i][-1].conv[-1] for i in _TAPPED_GROUPS]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        groups, again, width = list(self.blocks), [], self.stage_channels[-1]
        for group in groups[-2:]:
            expand, project = group[0].conv[0], group[0].conv[-2]
            expansion = expand.out_channels // expand.in_channels
            blocks = [InvertedResidual(width, project.out_channels, 1, expansion)]
            width = project.out_channels
            blocks += [InvertedResidual(width, width, 1, expansion) for _ in group[1:]]
            again.append(nn.Sequential(*blocks))
        behind = [groups[tap + 1 :] or again for tap in _TAPPED_GROUPS]
        return list(enumerate([Tail(*stages, self.conv2) for stages in behind], 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        x = self.conv1(x)  # 16x16
        feats = [x]
        for group, block in enumerate(self.blocks):  # 16x16, 16x16, 8x8, 4x4, 4x4, 2x2, 2x2
            x = block(x)
            if group in _TAPPED_GROUPS:
                feats.append(x)
        last = self.conv2(x)
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)
        return self.classifier(pooled), make_features(feats, pooled, pooled_map=last)


def mobilenetv2_T_w(T: int, W: float, feature_dim: int = 100) -> MobileNetV2:
    """mdistiller's general constructor. T: expansion; W: width multiplier; feature_dim: classes."""
    return MobileNetV2(expansion=T, width_mult=W, num_classes=feature_dim)


@register_model("cifar", "MobileNetV2")
def mobile_half(num_classes: int = 100) -> MobileNetV2:
    return MobileNetV2(expansion=6, width_mult=0.5, num_classes=num_classes)
