"""Parts that several networks share: residual blocks, the stage that runs them, initialisation."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ._features import Stages


def conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """3x3 convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Pointwise convolution."""
    return nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)


def conv_bn_relu(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """The three layers, for a Sequential. An odd kernel keeps the size at stride 1."""
    padding = kernel_size // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


def shuffle_channels(x: Tensor, groups: int) -> Tensor:
    """Interleave the channel groups. The next grouped convolution then mixes them."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def init_he_fan_out(net: nn.Module) -> None:
    """Initialise convolutions only: normal with std ``sqrt(2 / (k * k * out_channels))``, biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_small_linear(linear: nn.Linear) -> None:
    """Classifier of the vgg and MobileNetV2 nets: normal with std 0.01, bias 0."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)


class ResidualStage(nn.Sequential):
    """Blocks in a row. A block returns its sum before the ReLU; the stage applies the ReLU between them.

    Returns the last block's map after and before the activation.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self:
            preact = block(x)
            x = self.activate(preact)
        return x, preact

    def activate(self, preact: Tensor) -> Tensor:
        return F.relu(preact)


class ResidualBlock(nn.Module):
    """``branch(x) + skip(x)``, before the ReLU. ``skip`` is a projection if the shape changes."""

    expansion: int
    # The projection's name in the state dict: "downsample" in torchvision's and mdistiller's resnet files,
    # "shortcut" in mdistiller's resnetv2.
    projection_name = "downsample"

    def _add_projection(self, in_channels: int, out_channels: int, stride: int) -> None:
        projection = None
        if stride != 1 or in_channels != out_channels:
            projection = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
        self.add_module(self.projection_name, projection)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        project = getattr(self, self.projection_name)
        return self.branch(x) + (x if project is None else project(x))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self._add_projection(in_channels, width, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.bn2(self.conv2(x))


class Bottleneck(ResidualBlock):
    """1x1 down, 3x3 (with the stride), 1x1 up to four times the width."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self._add_projection(in_channels, out_channels, stride)

    @property
    def last_bn(self) -> nn.BatchNorm2d:
        return self.bn3

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


def rectified_stages(layers: list[ResidualStage], classifier: nn.Module) -> Stages:
    """The stages of a residual network whose stem's map is the first of ``feats``."""
    run = [lambda x, layer=layer: layer(x)[0] for layer in layers]
    return Stages(lambda features: features["feats"][1:], run, classifier, rectified=True)


def residual_stage(
    block: type[ResidualBlock], in_channels: int, width: int, num_blocks: int, stride: int
) -> ResidualStage:
    """``num_blocks`` blocks; the first has the stride. The output width is ``width * block.expansion``."""
    first = block(in_channels, width, stride)
    rest = (block(width * block.expansion, width) for _ in range(num_blocks - 1))
    return ResidualStage(first, *rest)


class Tail(nn.Sequential):
    """Stages behind a map of a network, with weights of their own. Returns the last map.

    Args:
        *stages: are copied and initialised anew. A stage returns its map, or a tuple that begins with the map.
    """

    def __init__(self, *stages: nn.Module) -> None:
        super().__init__(*copy.deepcopy(stages))
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        init_he_fan_out(self)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self:
            x = stage(x)
            x = x[0] if isinstance(x, tuple) else x
        return x


def tails(stages: Sequence[nn.Module], again: Sequence[nn.Module], end: Sequence[nn.Module] = ()) -> list[Tail]:
    """A tail behind each stage: the later stages; behind the last stage ``again``; then ``end``."""
    return [Tail(*(stages[number:] or again), *end) for number in range(1, len(stages) + 1)]


def residual_tails(stages: Sequence[ResidualStage], width: int) -> list[Tail]:
    """:func:`tails` of a ResNet. Behind the last stage is one more stage of its ``width``, without stride."""
    block = type(stages[-1][-1])
    return tails(stages, [residual_stage(block, width, width // block.expansion, len(stages[-1]), stride=1)])
