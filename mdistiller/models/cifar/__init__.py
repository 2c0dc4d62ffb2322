"""Networks for small images: CIFAR (32x32) and Tiny-ImageNet (64x64)."""

from mdistiller.registry import cifar_model_dict, tiny_imagenet_model_dict

from .mobilenetv2 import mobile_half
from .mv2_tinyimagenet import mobilenetv2_tinyimagenet
from .resnet import (
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from .resnetv2 import ResNet18, ResNet50
from .ShuffleNetv1 import ShuffleV1
from .ShuffleNetv2 import ShuffleV2
from .vgg import vgg8_bn, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "ResNet18",
    "ResNet50",
    "ShuffleV1",
    "ShuffleV2",
    "cifar_model_dict",
    "mobile_half",
    "mobilenetv2_tinyimagenet",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "tiny_imagenet_model_dict",
    "vgg8_bn",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_40_1",
    "wrn_40_2",
]
