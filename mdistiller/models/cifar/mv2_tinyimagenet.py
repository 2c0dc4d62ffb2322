"""MobileNetV2 for Tiny-ImageNet (64x64): full width, ReLU6, biases, a convolution as the classifier.

Sandler, Howard, Zhu, Zhmoginov, Chen. MobileNetV2: Inverted Residuals and Linear Bottlenecks. 2018.
arXiv:1801.04381. State-dict keys are mdistiller's (``pre``, ``stage1`` ... ``stage7``, ``conv1``, ``conv2``),
and so is the padded 1x1 stem, which makes 66x66 of 64x64. Stage maps except the last are outputs of linear
bottlenecks, signed; there are no ``preact_feats``. Departs from mdistiller: ``pooled_feat`` is ``(B, 1280)``,
not ``(B, 1280, 1, 1)``; the get_* methods exist.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._features import FeatureNet, Features, make_features
from .._registration import register_model


class LinearBottleneck(nn.Module):
    """1x1 up, 3x3 depthwise, linear 1x1 down; with a skip if the shape stays."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, expansion: int = 6) -> None:
        super().__init__()
        self.has_skip = stride == 1 and in_channels == out_channels
        hidden = in_channels * expansion
        self.residual = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, out_channels, 1),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        return x + out if self.has_skip else out


def _stage(num_blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = LinearBottleneck(in_channels, out_channels, stride)
    rest = (LinearBottleneck(out_channels, out_channels) for _ in range(num_blocks - 1))
    return nn.Sequential(first, *rest)


class MobileNetV2(FeatureNet):
    """Stem, seven stages, a 1x1 convolution to 1280 channels, a 1x1 convolution to the classes."""

    def __init__(self, num_classes: int = 200) -> None:
        super().__init__()
        self.stage_channels = [32, 24, 32, 64, 1280]
        self.pre = nn.Sequential(nn.Conv2d(3, 32, 1, padding=1), nn.BatchNorm2d(32), nn.ReLU6())
        self.stage1 = LinearBottleneck(32, 16, expansion=1)
        self.stage2 = _stage(2, 16, 24, stride=2)
        self.stage3 = _stage(3, 24, 32, stride=2)
        self.stage4 = _stage(4, 32, 64, stride=2)
        self.stage5 = _stage(3, 64, 96, stride=1)
        self.stage6 = _stage(3, 96, 160, stride=1)
        self.stage7 = LinearBottleneck(160, 320)
        self.conv1 = nn.Sequential(nn.Conv2d(320, 1280, 1), nn.BatchNorm2d(1280), nn.ReLU6())
        self.conv2 = nn.Conv2d(1280, num_classes, 1)

    def get_feat_modules(self) -> nn.ModuleList:
        stages = [self.stage1, self.stage2, self.stage3, self.stage4, self.stage5, self.stage6, self.stage7]
        return nn.ModuleList([self.pre, *stages, self.conv1])

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The last batch norm of each map. Only the deepest is followed by a ReLU."""
        linear = [stage[-1].residual[-1] for stage in (self.stage2, self.stage3, self.stage4)]
        return [*linear, self.conv1[1]]

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = self.pre(x)  # 66x66
        f1 = self.stage2(self.stage1(f0))  # 33x33
        f2 = self.stage3(f1)  # 17x17
        f3 = self.stage4(f2)  # 9x9
        f4 = self.conv1(self.stage7(self.stage6(self.stage5(f3))))  # 9x9
        pooled = F.adaptive_avg_pool2d(f4, 1).flatten(1)
        logits = self.conv2(pooled[:, :, None, None]).flatten(1)
        return logits, make_features([f0, f1, f2, f3, f4], pooled)


@register_model("tiny_imagenet", "MobileNetV2")
def mobilenetv2_tinyimagenet(**kwargs: Any) -> MobileNetV2:
    return MobileNetV2(**kwargs)
