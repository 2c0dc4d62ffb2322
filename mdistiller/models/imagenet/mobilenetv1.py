"""MobileNet for ImageNet.

Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam. MobileNets: Efficient Convolutional Neural
Networks for Mobile Vision Applications. 2017. arXiv:1704.04861. State-dict keys are mdistiller's
(``model.<block>.<layer>``, ``fc``). There is no stem map: all four maps are stages. Departs from mdistiller:
``num_classes`` is heeded, ``pretrained=True`` is refused instead of ignored, inputs other than 224x224 work.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdistiller.registry import InputError

from .._blocks import conv_bn_relu
from .._features import FeatureNet, Features, Stages, make_features
from .._registration import register_model

# Output channels and stride of the depthwise-separable blocks, model.1 to model.13.
_BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
_BLOCKS += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
_TAPPED_BLOCKS = (3, 5, 11, 13)  # the last blocks of their resolutions


def _separable(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Depthwise 3x3, then 1x1."""
    depthwise = conv_bn_relu(in_channels, in_channels, 3, stride, groups=in_channels)
    return nn.Sequential(*depthwise, *conv_bn_relu(in_channels, out_channels, 1))


@register_model("imagenet", "MobileNetV1")
class MobileNetV1(FeatureNet):
    """A strided convolution, thirteen separable blocks, pooling, classifier."""

    has_stem = False

    def __init__(self, pretrained: bool = False, num_classes: int = 1000) -> None:
        super().__init__()
        if pretrained:
            raise InputError("MobileNetV1: there are no public weights; load a checkpoint instead")
        self.stage_channels = [128, 256, 512, 1024]
        blocks = [nn.Sequential(*conv_bn_relu(3, 32, 3, stride=2))]
        in_channels = 32
        for out_channels, stride in _BLOCKS:
            blocks.append(_separable(in_channels, out_channels, stride))
            in_channels = out_channels
        self.model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1))
        self.fc = nn.Linear(in_channels, num_classes)

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList(list(self.model)[:-1])

    def get_stages(self) -> Stages:
        """Each ends with a block whose map is in ``feats``; the first takes the image."""
        starts = (0, *(place + 1 for place in _TAPPED_BLOCKS))
        run = [self.model[start : place + 1] for start, place in zip(starts, _TAPPED_BLOCKS, strict=False)]
        return Stages(lambda f: f["feats"], run, self.fc, rectified=True)

    def get_bn_before_relu(self) -> list[nn.Module]:
        return [self.model[i][-2] for i in _TAPPED_BLOCKS]

    def forward(self, x: Tensor) -> tuple[Tensor, Features]:
        feats, preact_feats = [], []  # 56x56, 28x28, 14x14, 7x7
        *blocks, pool = self.model
        for index, block in enumerate(blocks):
            *layers, relu = block
            for layer in layers:
                x = layer(x)
            preact, x = x, relu(x)
            if index in _TAPPED_BLOCKS:
                preact_feats.append(preact)
                feats.append(x)
        pooled = pool(x).flatten(1)
        return self.fc(pooled), make_features(feats, pooled, preact_feats=preact_feats)
