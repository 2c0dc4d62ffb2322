"""ShuffleNetV2 for CIFAR and Tiny-ImageNet: a 1x1 stem, no max-pooling, the first stage strides.

Ma, Zhang, Zheng, Sun. ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design. 2018.
arXiv:1807.11164. State-dict keys are mdistiller's. ``preact_feats`` hold the two halves before they are
shuffled (one half is activated already), ``feats`` after: ``relu(preact)`` is a channel permutation of
``feats``. Departs from mdistiller: inputs other than 32x32 work, Tiny-ImageNet's 64x64 among them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import ResidualStage, conv1x1, shuffle_channels, tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

_STEM_CHANNELS = 24


def _depthwise3x3(channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)


class BasicBlock(nn.Module):
    """One half of the channels stays; the other half passes 1x1, depthwise 3x3, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _depthwise3x3(half, stride=1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        passed, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        return torch.cat([passed, out], dim=1)


class DownBlock(nn.Module):
    """Both halves are computed from the whole input, at stride 2: a short branch and a long branch."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.conv1 = _depthwise3x3(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)

        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        short = self.bn2(self.conv2(self.bn1(self.conv1(x))))
        long = F.relu(self.bn3(self.conv3(x)))
        long = self.bn5(self.conv5(self.bn4(self.conv4(long))))
        return torch.cat([short, long], dim=1)


class ShuffleStage(ResidualStage):
    """Blocks return two halves before the ReLU. The unchanged half is non-negative, so the ReLU does not change it."""

    def activate(self, preact: Tensor) -> Tensor:
        return shuffle_channels(F.relu(preact), groups=2)


def _stage(in_channels: int, out_channels: int, num_blocks: int) -> ShuffleStage:
    first = DownBlock(in_channels, out_channels)
    return ShuffleStage(first, *(BasicBlock(out_channels) for _ in range(num_blocks)))


# By the paper's size: widths of the three stages and of the last 1x1 convolution.
_WIDTHS = {
    0.5: (48, 96, 192, 1024),
    1: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2: (244, 488, 976, 2048),
}
_NUM_BLOCKS = (3, 7, 3)  # of each stage, behind its first, which strides


class ShuffleNetV2(FeatureNet):
    """Stem, three stages, a 1x1 convolution. ``net_size`` scales the widths: 0.5, 1, 1.5 or 2."""

    def __init__(self, net_size: float, num_classes: int = 100) -> None:
        super().__init__()
        *widths, last_channels = _WIDTHS[net_size]
        self.stage_channels = [_STEM_CHANNELS, *widths]
        c0, c1, c2, c3 = self.stage_channels
        n1, n2, n3 = _NUM_BLOCKS
        self.conv1 = conv1x1(3, c0)
        self.bn1 = nn.BatchNorm2d(c0)
        self.layer1 = _stage(c0, c1, n1)
        self.layer2 = _stage(c1, c2, n2)
        self.layer3 = _stage(c2, c3, n3)
        self.conv2 = conv1x1(c3, last_channels)
        self.bn2 = nn.BatchNorm2d(last_channels)
        self.linear = nn.Linear(last_channels, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3])

    def get_stages(self) -> Stages:
        """The last stage ends with the last convolution."""
        run = [lambda x, layer=layer: layer(x)[0] for layer in (self.layer1, self.layer2)]
        run.append(lambda x: F.relu(self.bn2(self.conv2(self.layer3(x)[0]))))
        return Stages(lambda f: [*f["feats"][1:3], f["pooled_map"]], run, self.linear, rectified=True)

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        again = ShuffleStage(*[copy.deepcopy(self.layer3[-1]) for _ in self.layer3])
        end = [self.conv2, self.bn2, nn.ReLU()]
        return list(enumerate(tails([self.layer1, self.layer2, self.layer3], [again], end), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))  # 32x32
        f1, f1_pre = self.layer1(f0)  # 16x16
        f2, f2_pre = self.layer2(f1)  # 8x8
        f3, f3_pre = self.layer3(f2)  # 4x4
        last = F.relu(self.bn2(self.conv2(f3)))
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)
        preact_feats = [f0, f1_pre, f2_pre, f3_pre]
        features = make_features([f0, f1, f2, f3], pooled, preact_feats=preact_feats, pooled_map=last)
        return self.linear(pooled), features


@register_model("cifar", "ShuffleV2")
@register_model("tiny_imagenet", "ShuffleV2")
def ShuffleV2(**kwargs: Any) -> ShuffleNetV2:
    return ShuffleNetV2(net_size=1, **kwargs)
