"""The features contract: what every network of the zoo returns.

``forward(image) -> (logits, features)`` with ``logits`` ``(B, K)`` and ``features`` a dictionary:

- ``"feats"``: list of maps ``(B, C_i, H_i, W_i)``, shallow to deep, after the activation. Linear bottlenecks
  (MobileNetV2) and pre-activation blocks (WRN) end without an activation; their maps are signed.
- ``"preact_feats"``: the same list before the activation. If ``feats[0]`` exists only after its activation, this list
  contains the activated map; method files skip it by ``[1:]``. The key is absent for architectures without such maps
  (MobileNetV2).
- ``"pooled_feat"``: ``(B, D)``, the input of the classifier.
- ``"pooled_map"``: ``(B, D, H, W)``, the map whose mean over positions is ``pooled_feat``. The key is absent if this
  map is the last of ``feats``.

No operation is in place, so each map may be kept, hooked, or used in a loss.

Most networks return the stem's map first, then one map per stage. Some (vgg, MobileNetV1) have no stem map:
``feats[0]`` is their first stage. ``get_stage_indices()`` tells which maps are stages, so that a method need not guess
by ``[1:]``. Methods read widths, stages and the number of classes from a network's facts (``facts.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mdistiller.registry import InputError

Features = dict[str, Any]


class NotOfferedError(InputError, NotImplementedError):
    """The architecture does not have the requested part."""


def make_features(
    feats: list[Tensor],
    pooled_feat: Tensor,
    preact_feats: list[Tensor] | None = None,
    pooled_map: Tensor | None = None,
) -> Features:
    """The dictionary of the features contract. Without ``preact_feats`` or ``pooled_map`` its key is absent."""
    features: Features = {"feats": feats}
    if preact_feats is not None:
        features["preact_feats"] = preact_feats
    features["pooled_feat"] = pooled_feat
    if pooled_map is not None:
        features["pooled_map"] = pooled_map
    return features


def pooled_map(features: Features) -> Tensor:
    """The map ``(B, D, H, W)`` whose mean over positions is ``pooled_feat``, the classifier's input."""
    return features["pooled_map"] if "pooled_map" in features else features["feats"][-1]


class Stages(NamedTuple):
    """A network's stages, to be run one by one on maps from elsewhere.

    The network's logits are those of the ``classifier`` on the mean of the ReLU of the last stage's map.

    Args:
        maps: gives the stages' maps of the network's ``features``, shallow to deep.
        run: for each stage, the function from the previous stage's map to its own; the first takes the stem's map.
        classifier: of the pooled features.
        rectified: the maps are behind a ReLU.
    """

    maps: Callable[[Features], list[Tensor]]
    run: list[Callable[[Tensor], Tensor]]
    classifier: nn.Module
    rectified: bool


class FeatureNet(nn.Module):
    """Base of the zoo's networks. A network sets ``stage_channels`` and overrides the methods that it supports."""

    has_stem = True  # feats[0] is the stem's map, not a stage's
    stage_channels: list[int]  # width of each map in "feats"

    def get_stage_channels(self) -> list[int]:
        """Widths: ``get_stage_channels()[i] == features["feats"][i].shape[1]``, the stem included."""
        return list(self.stage_channels)

    def get_stage_indices(self) -> tuple[int, ...]:
        """Indices into ``feats`` of the stages: all maps but the stem's."""
        return tuple(range(int(self.has_stem), len(self.stage_channels)))

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules that compute the maps, in forward order, without pooling and classifier."""
        raise NotOfferedError(f"{type(self).__name__} does not say which modules its feature maps come from")

    def get_stages(self) -> Stages:
        """The stages as functions, for methods that start a network in the middle (FCFD)."""
        raise NotOfferedError(f"{type(self).__name__} does not say how its stages run one by one")

    def get_tails(self) -> list[tuple[int, nn.Module]]:
        """New modules from the network's maps to a last map of its own, as HSAKD's auxiliary branches need them.

        A tail repeats the stages behind a map; behind the last map, it adds stages of the last width without stride.
        The weights are fresh draws from torch's generator.

        Returns:
            For each tail the map's number in ``feats``, and the module ``(B, C, H, W)`` -> ``(B, D, H', W')``.
        """
        raise NotOfferedError(f"{type(self).__name__} does not offer the tails of its stages that HSAKD repeats")

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norm whose output is each stage's ``preact_feats`` (for OFD's margins), deepest last.

        The list may be shorter than the list of stages. Align the two from the deep end.
        """
        raise NotOfferedError(
            f"{type(self).__name__} has no batch norm that covers a whole map before its ReLU, "
            "so it cannot be the teacher of a method that asks for one (OFD); choose another teacher"
        )
