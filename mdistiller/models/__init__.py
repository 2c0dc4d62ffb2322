"""The networks, by name: ``constructor, checkpoint = cifar_model_dict["resnet32x4"]``."""

from ._registration import ModelEntry
from .any import find_network
from .cifar import cifar_model_dict, tiny_imagenet_model_dict
from .imagenet import imagenet_model_dict

__all__ = ["ModelEntry", "cifar_model_dict", "imagenet_model_dict", "tiny_imagenet_model_dict"]

for _table in (cifar_model_dict, tiny_imagenet_model_dict, imagenet_model_dict):
    _table.finder = find_network
    _table.advice = "other networks: cifar:resnet8, imagenet:ResNet18, timm:NAME, package.module:factory (docs/own.md)"
