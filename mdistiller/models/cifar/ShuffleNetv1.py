"""ShuffleNet for CIFAR: three groups, no max-pooling, the first stage strides.

Zhang, Zhou, Lin, Sun. ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices.
2017. arXiv:1707.01083. State-dict keys are mdistiller's. Departs from mdistiller: ``get_stage_channels()``
and ``get_bn_before_relu()`` exist, and inputs other than 32x32 work.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import ResidualStage, shuffle_channels, tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

_STEM_CHANNELS = 24


class Bottleneck(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; returns the map before the ReLU.

    A block without stride adds the input. A block with stride appends the input's average pool as further channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        branch_channels = out_channels - in_channels if stride == 2 else out_channels
        hidden = branch_channels // 4
        self.groups = 1 if in_channels == _STEM_CHANNELS else groups  # the stem is too narrow to split
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, branch_channels, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(branch_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = shuffle_channels(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1)
        return out + x


def _stage(in_channels: int, out_channels: int, num_blocks: int, groups: int) -> ResidualStage:
    first = Bottleneck(in_channels, out_channels, 2, groups)
    rest = (Bottleneck(out_channels, out_channels, 1, groups) for _ in range(num_blocks - 1))
    return ResidualStage(first, *rest)


class ShuffleNet(FeatureNet):
    """Stem and three stages.

    Args:
        widths: output channels of the stages.
        num_blocks: blocks of the stages, including the block with stride.
        groups: of the 1x1 convolutions.
        num_classes: K.
    """

    def __init__(
        self,
        widths: tuple[int, int, int],
        num_blocks: tuple[int, int, int],
        groups: int,
        num_classes: int = 100,
    ) -> None:
        super().__init__()
        self.stage_channels = [_STEM_CHANNELS, *widths]
        c0, c1, c2, c3 = self.stage_channels
        n1, n2, n3 = num_blocks
        self.conv1 = nn.Conv2d(3, c0, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c0)
        self.layer1 = _stage(c0, c1, n1, groups)
        self.layer2 = _stage(c1, c2, n2, groups)
        self.layer3 = _stage(c2, c3, n3, groups)
        self.linear = nn.Linear(c3, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_stages(self) -> Stages:
        run = [lambda x, layer=layer: layer(F.relu(x))[1] for layer in (self.layer1, self.layer2, self.layer3)]
        return Stages(lambda f: f["preact_feats"][1:], run, self.linear, rectified=False)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [stage[-1].bn3 for stage in (self.layer1, self.layer2, self.layer3)]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        again = ResidualStage(*[copy.deepcopy(self.layer3[-1]) for _ in self.layer3])
        return list(enumerate(tails([self.layer1, self.layer2, self.layer3], [again]), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))  # 32x32
        f1, f1_pre = self.layer1(f0)  # 16x16
        f2, f2_pre = self.layer2(f1)  # 8x8
        f3, f3_pre = self.layer3(f2)  # 4x4
        pooled = F.adaptive_avg_pool2d(f3, 1).flatten(1)
        features = make_features([f0, f1, f2, f3], pooled, preact_feats=[f0, f1_pre, f2_pre, f3_pre])
        return self.linear(pooled), features


@register_model("cifar", "ShuffleV1")
def ShuffleV1(**kwargs: Any) -> ShuffleNet:
    return ShuffleNet(widths=(240, 480, 960), num_blocks=(4, 8, 4), groups=3, **kwargs)
