"""Adapts a network of any library to this library. The network keeps its class, its weights' names and its logits.

The adapted network is an instance of a subclass of its own class. So ``state_dict()`` has the names of the network's
library, and a student's file loads into a plain network of that library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError

from .._features import Features, make_features
from ..facts import asked
from . import probed_maps, timm_maps
from .classes import ListedOutputs, OfClasses
from .inputs import Input

Outputs = tuple[Tensor, list[Tensor], Tensor]  # logits (B, K), maps, pooled features (B, D)


class Adapted:
    """Base class in front of a network's own class. ``_reader`` runs the network and returns its :data:`Outputs`."""

    _reader: Callable[[nn.Module, Callable[[Tensor], Any], Tensor], Outputs]
    _input: Input | None
    _has_stem: bool
    _num_maps: int

    def forward(self, image: Tensor) -> tuple[Tensor, Features]:
        if self._input is not None:
            image = self._input(image)
        logits, maps, pooled = self._reader(self, super().forward, image)
        return logits, make_features(maps, pooled)

    @property
    def map_names(self) -> list[str]:
        """Names of the modules, or numbers of timm's intermediates, that the maps come from."""
        return list(map(str, self._reader.maps))

    def get_stage_indices(self) -> tuple[int, ...]:
        """Indices of the stages: all maps, or all maps after the stem's."""
        return tuple(range(int(self._has_stem), self._num_maps))


class FitsInput:
    """Base class in front of the class of a network of this library. It transforms images to the network's input."""

    _input: Input

    def forward(self, image: Tensor) -> tuple[Tensor, Features]:
        return super().forward(self._input(image))


def with_features(
    network: nn.Module,
    size: int | Sequence[int] = 224,
    maps: Sequence[str | int] = (),
    input: Input | None = None,
) -> nn.Module:
    """Let a classifier return ``(logits, features)``, as every method needs.

    This changes the network itself and returns it: its class becomes a subclass of its class. Weights, names and logits
    do not change. The network runs once on one image, in eval mode.

    Args:
        network: returns the logits ``(B, K)``, or a tuple that begins with them (torchvision's auxiliary classifiers).
            A network that already returns ``(logits, features)`` does not change.
        size: side of the network's images, or ``(H, W)``, in pixels.
        maps: names of the modules whose outputs are the maps, shallow to deep (``["layer1", "layer2"]``). For a timm
            network also numbers of its intermediates. Empty: one map for each size, or four for a plain transformer.
        input: transformation of the images before the network; ``None``: none.

    Raises:
        InputError: the network fails on such an image, or returns no logits; no such module; a module without a map.
    """
    if isinstance(network, Adapted):
        raise InputError(f"{type(network).__name__} has features already: call with_features once")
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with asked(network, (height, width)) as image, torch.no_grad():
            if _returns_features(network(image)):
                if maps:
                    raise InputError(f"{type(network).__name__} returns maps itself; leave out maps=")
                return network if input is None else _fitted(network, FitsInput, input)
            of_timm = timm_maps.able(network) and not any(isinstance(name, str) for name in maps)
            reader, shapes = (timm_maps if of_timm else probed_maps).reader_of(network, image, maps)
    except InputError:
        raise
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(network).__name__} fails on an image of {height}x{width} pixels: {str(error).splitlines()[0]}"
        ) from error
    network._reader, network._num_maps = reader, len(shapes)
    network._has_stem = has_stem(shapes, height)
    return _fitted(network, Adapted, input)


def with_outputs(network: nn.Module, outputs: Sequence[Sequence[int]]) -> nn.Module:
    """Let a network that returns ``(logits, features)`` give the logits of a data set's classes.

    This changes the network itself and returns it, as :func:`with_features` does. A state dict does not change.

    Args:
        network: a teacher that was trained on other classes.
        outputs: for each class of the data set, the numbers of the network's outputs, at least one.
    """
    network._outputs = ListedOutputs(outputs)
    return _subclassed(network, OfClasses)


def without_features(network: nn.Module) -> tuple[nn.Module, Input | None]:
    """Undo :func:`with_features`: the network itself with its own class, and the transformation of its images."""
    if not isinstance(network, (Adapted, FitsInput)):
        return network, None
    input = network._input
    for name in ("_input", "_reader", "_num_maps", "_has_stem"):
        if hasattr(network, name):
            delattr(network, name)
    for module in network.modules():
        probed_maps.remove_taps(module)
    network.__class__ = type(network).__bases__[1]
    return network, input


def _fitted(network: nn.Module, front: type, input: Input | None) -> nn.Module:
    network._input = input  # a module: its constants move with the network
    return _subclassed(network, front)


def _subclassed(network: nn.Module, front: type) -> nn.Module:
    """The network as an instance of a subclass of its class. Methods of ``front`` override those of its class."""
    cls = type(network)
    network.__class__ = type(cls.__name__, (front, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    return network


def has_stem(shapes: Sequence[torch.Size], side: int) -> bool:
    """Whether the first map is a stem's: there are five maps, and the first has half the image's side."""
    return len(shapes) == 5 and round(side / shapes[0][2]) == 2


def _returns_features(output: Any) -> bool:
    return isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping)
