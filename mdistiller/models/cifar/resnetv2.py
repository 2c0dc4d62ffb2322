"""The ImageNet ResNets (18 to 152) with a 3x3 stem and no max-pooling, for CIFAR and Tiny-ImageNet.

He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385.
State-dict keys are mdistiller's: as torchvision's, but ``shortcut`` for ``downsample`` and ``linear`` for
``fc``. Departs from mdistiller: ``get_stage_channels()`` holds the widths of the five maps, where mdistiller
says 256, 512, 1024, 2048 for every depth and leaves the stem out.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _blocks
from .._blocks import conv3x3, init_he_fan_out, rectified_stages, residual_stage, residual_tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model


class BasicBlock(_blocks.BasicBlock):
    projection_name = "shortcut"


class Bottleneck(_blocks.Bottleneck):
    projection_name = "shortcut"


class ResNet(FeatureNet):
    """Stem and four stages of 64, 128, 256, 512 channels times the block's expansion."""

    def __init__(self, block: type[BasicBlock | Bottleneck], num_blocks: list[int], num_classes: int = 100) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        self.stage_channels = [64] + [width * block.expansion for width in widths]
        c0, c1, c2, c3, c4 = self.stage_channels

        self.conv1 = conv3x3(3, c0)
        self.bn1 = nn.BatchNorm2d(c0)
        self.layer1 = residual_stage(block, c0, widths[0], num_blocks[0], stride=1)
        self.layer2 = residual_stage(block, c1, widths[1], num_blocks[1], stride=2)
        self.layer3 = residual_stage(block, c2, widths[2], num_blocks[2], stride=2)
        self.layer4 = residual_stage(block, c3, widths[3], num_blocks[3], stride=2)
        self.linear = nn.Linear(c4, num_classes)
        init_he_fan_out(self)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.conv1, self.bn1, self.layer1, self.layer2, self.layer3, self.layer4])

    def get_stages(self) -> Stages:
        return rectified_stages([self.layer1, self.layer2, self.layer3, self.layer4], self.linear)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [stage[-1].last_bn for stage in (self.layer1, self.layer2, self.layer3, self.layer4)]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return list(enumerate(residual_tails(stages, self.stage_channels[-1]), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = F.relu(self.bn1(self.conv1(x)))  # 32x32
        f1, f1_pre = self.layer1(f0)  # 32x32
        f2, f2_pre = self.layer2(f1)  # 16x16
        f3, f3_pre = self.layer3(f2)  # 8x8
        f4, f4_pre = self.layer4(f3)  # 4x4
        pooled = F.adaptive_avg_pool2d(f4, 1).flatten(1)
        features = make_features([f0, f1, f2, f3, f4], pooled, preact_feats=[f0, f1_pre, f2_pre, f3_pre, f4_pre])
        return self.linear(pooled), features


@register_model("cifar", "ResNet18")
@register_model("tiny_imagenet", "ResNet18", checkpoint="ResNet18_vanilla/ti_res18")
def ResNet18(**kwargs: Any) -> ResNet:
    return ResNet(BasicBlock, [2, 2, 2, 2], **kwargs)


def ResNet34(**kwargs: Any) -> ResNet:
    return ResNet(BasicBlock, [3, 4, 6, 3], **kwargs)


@register_model("cifar", "ResNet50", checkpoint="ResNet50_vanilla/ckpt_epoch_240.pth")
def ResNet50(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 6, 3], **kwargs)


def ResNet101(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, [3, 4, 23, 3], **kwargs)


def ResNet152(**kwargs: Any) -> ResNet:
    return ResNet(Bottleneck, [3, 8, 36, 3], **kwargs)
