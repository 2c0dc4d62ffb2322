"""ResNet for CIFAR: three stages of 16, 32, 64 channels, or wider (``x4``).

He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition, Sec. 4.2. 2016. arXiv:1512.03385.
State-dict keys are mdistiller's, so its public teachers load: ``conv1``, ``layer{1,2,3}.<n>.downsample``,
``fc``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import BasicBlock, Bottleneck, conv3x3, init_he_fan_out, rectified_stages, residual_stage, residual_tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

# block, convolutions that one block adds to each of the three stages together
_BLOCKS = {"basicblock": (BasicBlock, 6), "bottleneck": (Bottleneck, 9)}


class ResNet(FeatureNet):
    """Stem and three stages.

    Args:
        depth: layers; ``6n + 2`` with basic blocks, ``9n + 2`` with bottlenecks.
        num_filters: widths of the stem and of the three stages (before a bottleneck's expansion).
        block_name: ``"basicblock"`` or ``"bottleneck"``.
        num_classes: K.
    """

    def __init__(
        self, depth: int, num_filters: list[int], block_name: str = "basicblock", num_classes: int = 100
    ) -> None:
        super().__init__()
        block, unit = _BLOCKS[block_name.lower()]
        if depth < unit + 2 or (depth - 2) % unit:
            raise ValueError(f"ResNet: depth={depth} is not {unit}n + 2, as {block_name} needs")
        num_blocks = (depth - 2) // unit
        stem, *widths = num_filters
        self.stage_channels = [stem] + [width * block.expansion for width in widths]
        c0, c1, c2, c3 = self.stage_channels

        self.conv1 = conv3x3(3, c0)
        self.bn1 = nn.BatchNorm2d(c0)
        self.relu = nn.ReLU()
        self.layer1 = residual_stage(block, c0, widths[0], num_blocks, stride=1)
        self.layer2 = residual_stage(block, c1, widths[1], num_blocks, stride=2)
        self.layer3 = residual_stage(block, c2, widths[2], num_blocks, stride=2)
        self.fc = nn.Linear(c3, num_classes)
        init_he_fan_out(self)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.relu, self.layer1, self.layer2, self.layer3])

    def get_stages(self) -> Stages:
        return rectified_stages([self.layer1, self.layer2, self.layer3], self.fc)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [stage[-1].last_bn for stage in (self.layer1, self.layer2, self.layer3)]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        stages = [self.layer1, self.layer2, self.layer3]
        return list(enumerate(residual_tails(stages, self.stage_channels[-1]), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = self.relu(self.bn1(self.conv1(x)))  # 32x32
        f1, f1_pre = self.layer1(f0)  # 32x32
        f2, f2_pre = self.layer2(f1)  # 16x16
        f3, f3_pre = self.layer3(f2)  # 8x8
        pooled = F.adaptive_avg_pool2d(f3, 1).flatten(1)
        features = make_features([f0, f1, f2, f3], pooled, preact_feats=[f0, f1_pre, f2_pre, f3_pre])
        return self.fc(pooled), features


_NARROW = [16, 16, 32, 64]
_WIDE = [32, 64, 128, 256]


@register_model("cifar", "resnet8")
def resnet8(**kwargs: Any) -> ResNet:
    return ResNet(8, _NARROW, **kwargs)


@register_model("cifar", "resnet14")
def resnet14(**kwargs: Any) -> ResNet:
    return ResNet(14, _NARROW, **kwargs)


@register_model("cifar", "resnet20")
def resnet20(**kwargs: Any) -> ResNet:
    return ResNet(20, _NARROW, **kwargs)


@register_model("cifar", "resnet32")
def resnet32(**kwargs: Any) -> ResNet:
    return ResNet(32, _NARROW, **kwargs)


@register_model("cifar", "resnet44")
def resnet44(**kwargs: Any) -> ResNet:
    return ResNet(44, _NARROW, **kwargs)


@register_model("cifar", "resnet56", checkpoint="resnet56_vanilla/ckpt_epoch_240.pth")
def resnet56(**kwargs: Any) -> ResNet:
    return ResNet(56, _NARROW, **kwargs)


@register_model("cifar", "resnet110", checkpoint="resnet110_vanilla/ckpt_epoch_240.pth")
def resnet110(**kwargs: Any) -> ResNet:
    return ResNet(110, _NARROW, **kwargs)


@register_model("cifar", "resnet8x4")
def resnet8x4(**kwargs: Any) -> ResNet:
    return ResNet(8, _WIDE, **kwargs)


@register_model("cifar", "resnet14x4")
def resnet14x4(**kwargs: Any) -> ResNet:
    return ResNet(14, _WIDE, **kwargs)


@register_model("cifar", "resnet32x4", checkpoint="resnet32x4_vanilla/ckpt_epoch_240.pth")
def resnet32x4(**kwargs: Any) -> ResNet:
    return ResNet(32, _WIDE, **kwargs)
