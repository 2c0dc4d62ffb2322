"""Wide residual networks for CIFAR.

Zagoruyko, Komodakis. Wide Residual Networks. 2016. arXiv:1605.07146.
State-dict keys are mdistiller's (``block1.layer.0.convShortcut``). ``feats[1:]`` are the stages' sums,
signed; ``preact_feats[1:]`` are those sums after the *next* block's batch norm, so ``relu(preact) != feats``.
Departs from mdistiller: the batch norm's result is handed on instead of being computed a second time, so
three layers update their running statistics once per step instead of twice. Outputs are equal.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import conv1x1, conv3x3, init_he_fan_out, tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model


class BasicBlock(nn.Module):
    """Pre-activation block: BN, ReLU, 3x3, BN, ReLU, 3x3, plus the skip.

    If the width changes, the skip projects the activated input; else the skip is the input itself.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        projects = in_channels != out_channels
        self.convShortcut = conv1x1(in_channels, out_channels, stride) if projects else None

    def forward(self, x: Tensor) -> Tensor:
        return self.after_bn1(x, self.bn1(x))

    def after_bn1(self, x: Tensor, preact: Tensor) -> Tensor:
        """The block without its first batch norm, for a caller that also needs ``preact = bn1(x)``."""
        activated = F.relu(preact)
        out = F.relu(self.bn2(self.conv1(activated)))
        out = self.conv2(F.dropout(out, self.drop_rate, self.training))
        return out + (x if self.convShortcut is None else self.convShortcut(activated))


class NetworkBlock(nn.Module):
    """A stage. Returns its sum, and its *input* after the first batch norm: the previous stage's preact."""

    def __init__(self, num_blocks: int, in_channels: int, out_channels: int, stride: int, drop_rate: float) -> None:
        super().__init__()
        first = BasicBlock(in_channels, out_channels, stride, drop_rate)
        rest = (BasicBlock(out_channels, out_channels, 1, drop_rate) for _ in range(num_blocks - 1))
        self.layer = nn.Sequential(first, *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, *rest = self.layer
        preact = first.bn1(x)
        x = first.after_bn1(x, preact)
        for block in rest:
            x = block(x)
        return x, preact


class WideResNet(FeatureNet):
    """Stem and three stages.

    Args:
        depth: layers, ``6n + 4``.
        widen_factor: multiplies the stage widths 16, 32, 64.
        num_classes: K.
        drop_rate: dropout between the two convolutions of a block.
    """

    def __init__(self, depth: int, widen_factor: int = 1, num_classes: int = 100, drop_rate: float = 0.0) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"WideResNet: depth={depth} is not 6n + 4 (10, 16, 22, 28, 40, ...)")
        num_blocks = (depth - 4) // 6
        self.stage_channels = [16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor]
        c0, c1, c2, c3 = self.stage_channels

        self.conv1 = conv3x3(3, c0)
        self.block1 = NetworkBlock(num_blocks, c0, c1, 1, drop_rate)
        self.block2 = NetworkBlock(num_blocks, c1, c2, 2, drop_rate)
        self.block3 = NetworkBlock(num_blocks, c2, c3, 2, drop_rate)
        self.bn1 = nn.BatchNorm2d(c3)
        self.fc = nn.Linear(c3, num_classes)
        init_he_fan_out(self)
        nn.init.zeros_(self.fc.bias)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.block1, self.block2, self.block3])

    def get_stages(self) -> Stages:
        run = [
            lambda x: self.block1(x)[0],
            lambda x: self.block2(x)[0],
            lambda x: self.bn1(self.block3(x)[0]),
        ]
        return Stages(lambda f: [*f["feats"][1:3], f["preact_feats"][3]], run, self.fc, rectified=False)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [self.block2.layer[0].bn1, self.block3.layer[0].bn1, self.bn1]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        stages, width = [self.block1, self.block2, self.block3], self.stage_channels[-1]
        again = NetworkBlock(len(self.block3.layer), width, width, 1, self.block3.layer[0].drop_rate)
        return list(enumerate(tails(stages, [again], [self.bn1, nn.ReLU()]), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = self.conv1(x)  # 32x32
        f1, _ = self.block1(f0)  # 32x32
        f2, f1_pre = self.block2(f1)  # 16x16
        f3, f2_pre = self.block3(f2)  # 8x8
        f3_pre = self.bn1(f3)
        last = F.relu(f3_pre)
        pooled = F.adaptive_avg_pool2d(last, 1).flatten(1)
        preact_feats = [f0, f1_pre, f2_pre, f3_pre]
        features = make_features([f0, f1, f2, f3], pooled, preact_feats=preact_feats, pooled_map=last)
        return self.fc(pooled), features


@register_model("cifar", "wrn_16_1")
def wrn_16_1(**kwargs: Any) -> WideResNet:
    return WideResNet(depth=16, widen_factor=1, **kwargs)


@register_model("cifar", "wrn_16_2")
def wrn_16_2(**kwargs: Any) -> WideResNet:
    return WideResNet(depth=16, widen_factor=2, **kwargs)


@register_model("cifar", "wrn_40_1")
def wrn_40_1(**kwargs: Any) -> WideResNet:
    return WideResNet(depth=40, widen_factor=1, **kwargs)


@register_model("cifar", "wrn_40_2", checkpoint="wrn_40_2_vanilla/ckpt_epoch_240.pth")
def wrn_40_2(**kwargs: Any) -> WideResNet:
    return WideResNet(depth=40, widen_factor=2, **kwargs)
