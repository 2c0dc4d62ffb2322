"""ResNet for ImageNet, with torchvision's weights.

He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. 2016. arXiv:1512.03385.
State-dict keys are torchvision's and mdistiller's. ``feats[0]`` is the stem before max-pooling.
``get_bn_before_relu()`` leaves the first stage out, as mdistiller's does: with MobileNetV1 as the student,
unmodified OFD files count on three entries. Departs from mdistiller: ``get_stage_channels()`` holds the
widths of the five maps, where mdistiller says 256, 512, 1024, 2048 for every depth and leaves the stem out;
inputs other than 224x224 work.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.registry import InputError

from .._blocks import BasicBlock, Bottleneck, init_he_fan_out, rectified_stages, residual_stage, residual_tails
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model


class ResNet(FeatureNet):
    """Stem and four stages of 64, 128, 256, 512 channels times the block's expansion."""

    def __init__(self, block: type[BasicBlock | Bottleneck], num_blocks: list[int], num_classes: int = 1000) -> None:
        super().__init__()
        widths = (64, 128, 256, 512)
        self.stage_channels = [64] + [width * block.expansion for width in widths]
        c0, c1, c2, c3, c4 = self.stage_channels

        self.conv1 = nn.Conv2d(3, c0, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(c0)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = residual_stage(block, c0, widths[0], num_blocks[0], stride=1)
        self.layer2 = residual_stage(block, c1, widths[1], num_blocks[1], stride=2)
        self.layer3 = residual_stage(block, c2, widths[2], num_blocks[2], stride=2)
        self.layer4 = residual_stage(block, c3, widths[3], num_blocks[3], stride=2)
        self.fc = nn.Linear(c4, num_classes)
        init_he_fan_out(self)

    def get_feat_modules(self) -> nn.ModuleList:
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return nn.ModuleList([self.conv1, self.bn1, self.relu, self.maxpool, *stages])

    def get_stages(self) -> Stages:
        return rectified_stages([self.layer1, self.layer2, self.layer3, self.layer4], self.fc)

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norms of the last three stages."""
        return [stage[-1].last_bn for stage in (self.layer2, self.layer3, self.layer4)]

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return list(enumerate(residual_tails(stages, self.stage_channels[-1]), 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        f0 = self.relu(self.bn1(self.conv1(x)))  # 112x112
        f1, f1_pre = self.layer1(self.maxpool(f0))  # 56x56
        f2, f2_pre = self.layer2(f1)  # 28x28
        f3, f3_pre = self.layer3(f2)  # 14x14
        f4, f4_pre = self.layer4(f3)  # 7x7
        pooled = F.adaptive_avg_pool2d(f4, 1).flatten(1)
        features = make_features([f0, f1, f2, f3, f4], pooled, preact_feats=[f0, f1_pre, f2_pre, f3_pre, f4_pre])
        return self.fc(pooled), features


def _resnet(
    name: str, block: type[BasicBlock | Bottleneck], num_blocks: list[int], pretrained: bool, kwargs: Any
) -> ResNet:
    """Build, and load torchvision's first ImageNet weights (``IMAGENET1K_V1``, mdistiller's teachers).

    Raises:
        InputError: another number of classes; weights that could not be fetched, with where to put them.
    """
    net = ResNet(block, num_blocks, **kwargs)
    if pretrained:
        if net.fc.out_features != 1000:
            raise InputError(
                f"{name}: its public weights (pretrained=True) are for 1000 classes, not {net.fc.out_features}; "
                "name your own weights with DISTILLER.TEACHER_CKPT FILE, or another teacher with DISTILLER.TEACHER"
            )
        from torchvision.models import get_model_weights

        weights = get_model_weights(name)["IMAGENET1K_V1"]
        try:
            net.load_state_dict(weights.get_state_dict(check_hash=True))
        except OSError as error:
            raise InputError(
                f"{name}: torchvision's weights could not be downloaded ({error}); put {weights.url} into "
                f"{torch.hub.get_dir()}/checkpoints, or name your own file with DISTILLER.TEACHER_CKPT FILE"
            ) from None
    return net


@register_model("imagenet", "ResNet18", pretrained=True)
def resnet18(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _resnet("resnet18", BasicBlock, [2, 2, 2, 2], pretrained, kwargs)


@register_model("imagenet", "ResNet34", pretrained=True)
def resnet34(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _resnet("resnet34", BasicBlock, [3, 4, 6, 3], pretrained, kwargs)


@register_model("imagenet", "ResNet50", pretrained=True)
def resnet50(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _resnet("resnet50", Bottleneck, [3, 4, 6, 3], pretrained, kwargs)


@register_model("imagenet", "ResNet101", pretrained=True)
def resnet101(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _resnet("resnet101", Bottleneck, [3, 4, 23, 3], pretrained, kwargs)


@register_model("imagenet", "ResNet152", pretrained=True)
def resnet152(pretrained: bool = False, **kwargs: Any) -> ResNet:
    return _resnet("resnet152", Bottleneck, [3, 8, 36, 3], pretrained, kwargs)
