"""Facts of a network for the methods, found by one black image.

A network need not declare anything: every module works that returns ``(logits, features)`` as ``_features.py`` says.
The image does not show two facts: which maps are stages, and which batch norms precede the ReLUs. A network may declare
them by ``get_stage_indices()`` and ``get_bn_before_relu()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mdistiller.messages import warn
from mdistiller.registry import InputError

from ._features import pooled_map

Shapes = tuple[torch.Size, ...]

_READ = "must return (logits, features) with {}, which this method reads: see mdistiller/models/_features.py"
LACKING = {
    "shapes": _READ.format("the maps of its stages in features['feats']"),
    "pooled_width": _READ.format("the classifier's input in features['pooled_feat']"),
    "pooled_map": "must return (logits, features) with the map whose mean is features['pooled_feat'] in "
    "features['pooled_map'], or last in features['feats']: see mdistiller/models/_features.py",
    "classifier": "has no layer whose output is the logits",
    "last_convolution": "has no nn.Conv2d",
    "norms_before_relu": "does not say by get_bn_before_relu() from which batch norms its maps before the ReLU come",
}
"""The messages of :meth:`NetworkFacts.need` for a network without the fact."""
RELUS = ("ReluBackward0", "LeakyReluBackward0", "HardtanhBackward0")
"""autograd's names of the activations that remove or shrink a map's negative part."""


@dataclass(frozen=True)
class NetworkFacts:
    """Facts of a network that methods need. ``None``: the network does not have the part.

    Modules are given by their names, so the facts also hold for copies of the network.

    Args:
        role: ``"student"`` or ``"teacher"``, for messages.
        network: name of its class, for messages.
        side: of the black image, in pixels; the geometric mean of height and width.
        classes: K.
        shapes: of the maps ``feats``, shallow to deep: ``(1, C, H, W)``, or ``(1, N, C)`` for tokens.
        preact_shapes: of ``preact_feats``.
        activated: a map of ``feats`` is the output of a ReLU.
        stages: numbers of the maps that are stages; by default all maps but the first.
        pooled_width: D of ``pooled_feat``.
        pooled_map: shape of the map whose mean over positions is ``pooled_feat``.
        classifier: the layer whose output is the logits.
        last_convolution: the ``nn.Conv2d`` that is called last, not counting the classifier.
        norms_before_relu: the batch norms whose outputs are the deepest of ``preact_feats``, deepest last.
    """

    role: str
    network: str
    side: float
    classes: int
    shapes: Shapes | None
    preact_shapes: Shapes | None
    activated: bool
    stages: tuple[int, ...]
    pooled_width: int | None
    pooled_map: torch.Size | None
    classifier: str | None
    last_convolution: str | None
    norms_before_relu: tuple[str, ...] | None

    def __str__(self) -> str:
        return f"{self.role} {self.network}"

    def need(self, name: str) -> Any:
        """The fact of that name.

        Raises:
            InputError: the network does not have it. The message names the network and the missing part.
        """
        fact = getattr(self, name)
        if fact is None:
            raise InputError(f"the {self} {LACKING[name]}")
        return fact

    @property
    def channels(self) -> list[int]:
        """The width of each map."""
        return _widths(self.need("shapes"))

    @property
    def preact_channels(self) -> list[int]:
        """The width of each map before its activation, or :attr:`channels` if the network returns no such maps."""
        shapes = self.preact_shapes or self.need("shapes")
        if self.preact_shapes is None and self.activated:
            warn(
                f"the {self} gives no features['preact_feats']: this method reads maps before the ReLU, and now reads "
                "maps behind the ReLU"
            )
        return _widths(shapes)

    @property
    def strides(self) -> list[int]:
        """For each map, the distance of two neighbouring positions in pixels of the image."""
        positions = (shape[2:].numel() if len(shape) == 4 else shape[1] for shape in self.need("shapes"))
        return [round(self.side / math.sqrt(count)) for count in positions]


@contextmanager
def asked(network: nn.Module, size: Sequence[int]) -> Iterator[Tensor]:
    """A black image for a network in eval mode; afterwards every module has its former mode.

    Args:
        network: the network.
        size: of the image, ``(H, W)`` pixels.

    Yields:
        ``(1, 3, H, W)``, in the number format and on the device of the network's parameters.
    """
    like = next(network.parameters(), torch.empty(0))
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype)
    finally:
        for module, mode in modes.items():
            module.training = mode


def facts_of(network: nn.Module, size: Sequence[int], role: str = "network") -> NetworkFacts:
    """Find a network's facts by one black image.

    The network runs in eval mode, without gradient. No statistics change and no random number is drawn. Afterwards
    every module has its former mode.

    Args:
        network: returns ``(logits, features)``.
        size: of the image, ``(H, W)`` pixels.
        role: the network's role, for messages.

    Raises:
        InputError: the network fails on such an image, or its result is not ``(logits, features)``.
    """
    name, (height, width) = type(network).__name__, size
    convolutions: list[str] = []
    flat: list[tuple[str, Tensor]] = []  # outputs that may be the logits
    handles = [
        module.register_forward_hook(partial(_listen, path, convolutions, flat))
        for path, module in network.named_modules()
        if is_parametrized(module) or any(True for _ in module.parameters(recurse=False))
    ]
    try:
        # without a backward pass; the graph tells which maps come out of a ReLU
        with asked(network, size) as image, torch.enable_grad():
            output = network(image.requires_grad_())
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"the {role} {name} fails on an image of {height}x{width} pixels: {error}; DATASET.IMAGE_SIZE must be the "
            "side of the images"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    is_pair = isinstance(output, (tuple, list)) and len(output) == 2
    if not (is_pair and isinstance(output[0], Tensor) and isinstance(output[1], Mapping)):
        raise InputError(
            f"the {role} {name} must return (logits, features), features being a dictionary: see "
            "mdistiller/models/_features.py"
        )
    logits, features = output
    shapes, pooled = _shapes(features, "feats"), features.get("pooled_feat")
    classifier = next((path for path, given in flat if _same(given, logits)), None)
    declared = getattr(network, "get_stage_indices", None)
    return NetworkFacts(
        role=role,
        network=name,
        side=math.sqrt(height * width),
        classes=logits.shape[1],
        shapes=shapes,
        preact_shapes=_shapes(features, "preact_feats"),
        activated=any(type(feat.grad_fn).__name__ in RELUS for feat in features.get("feats", ())),
        stages=tuple(declared()) if declared is not None else tuple(range(1, len(shapes or ()))),
        pooled_width=None if pooled is None else pooled.flatten(1).shape[1],
        pooled_map=_pooled_map(features),
        classifier=classifier,
        last_convolution=next((path for path in reversed(convolutions) if path != classifier), None),
        norms_before_relu=_norms_before_relu(network),
    )


def _listen(
    path: str, convolutions: list[str], flat: list[tuple[str, Tensor]], module: nn.Module, _: Any, output: Any
) -> None:
    """Record a convolution, and an output with one number for each of its channels."""
    if isinstance(module, nn.Conv2d):
        convolutions.append(path)
    if isinstance(output, Tensor) and output.numel() == output.shape[:2].numel():
        flat.append((path, output))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor is the other, or a reshaped view of it."""
    base_a, base_b = (x if x._base is None else x._base for x in (a, b))
    return base_a is base_b and a.numel() == b.numel()


def _shapes(features: Mapping[str, Any], key: str) -> Shapes | None:
    return tuple(feat.shape for feat in features[key]) if key in features else None


def _pooled_map(features: Mapping[str, Any]) -> torch.Size | None:
    """The shape of the map, if its mean is ``pooled_feat``."""
    if "pooled_feat" not in features or not ("pooled_map" in features or features.get("feats")):
        return None
    maps, pooled = pooled_map(features).detach(), features["pooled_feat"].detach().flatten(1)
    if maps.ndim != 4 or maps.shape[1] != pooled.shape[1]:
        return None
    is_its_mean = maps.is_meta or torch.allclose(maps.mean((2, 3)), pooled, rtol=1e-3, atol=1e-5)
    return maps.shape if is_its_mean else None


def _widths(shapes: Shapes) -> list[int]:
    return [shape[1] if len(shape) == 4 else shape[-1] for shape in shapes]


def _norms_before_relu(network: nn.Module) -> tuple[str, ...] | None:
    try:
        norms = network.get_bn_before_relu()
    except (NotImplementedError, AttributeError):
        return None
    paths = {module: path for path, module in network.named_modules()}
    return tuple(paths[norm] for norm in norms) if norms else None
