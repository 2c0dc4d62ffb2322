"""Networks for ImageNet (224x224; other sizes from 32 up work too)."""

from mdistiller.registry import imagenet_model_dict

from .mobilenetv1 import MobileNetV1
from .resnet import resnet18, resnet34, resnet50, resnet101, resnet152

__all__ = [
    "MobileNetV1",
    "imagenet_model_dict",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
]
