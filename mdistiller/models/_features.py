"""What every network of the zoo gives a distiller: the features contract.

``forward(image) -> (logits, features)`` with ``logits`` ``(B, K)`` and ``features`` a dictionary:

- ``"feats"``: list of maps ``(B, C_i, H_i, W_i)``, shallow to deep, after the activation. Linear
  bottlenecks (MobileNetV2) and pre-activation blocks (WRN) end without one; their maps are signed.
- ``"preact_feats"``: the same list before the activation. Where ``feats[0]`` is activated already, it stands
  in this list as it is: method files skip it by ``[1:]``. Absent where the architecture has no such maps
  (MobileNetV2).
- ``"pooled_feat"``: ``(B, D)``, what the classifier reads.

Nothing is computed in place, so each map may be kept, changed into a loss, or hooked.

Which maps are stages? Most networks give the stem first, then one map per stage; some (vgg, MobileNetV1)
have no stem map, and ``feats[0]`` is their first stage. ``get_stage_indices()`` says which, so that a method
need not guess by ``[1:]``. Methods read widths, stages and the number of classes off a network's facts (``facts.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mdistiller.registry import InputError

Features = dict[str, Any]


class NotOfferedError(InputError, NotImplementedError):
    """A network was asked for something that its architecture does not have."""


def make_features(feats: list[Tensor], pooled_feat: Tensor, preact_feats: list[Tensor] | None = None) -> Features:
    """The dictionary of the contract above; without ``preact_feats`` its key is absent."""
    features: Features = {"feats": feats}
    if preact_feats is not None:
        features["preact_feats"] = preact_feats
    features["pooled_feat"] = pooled_feat
    return features


class FeatureNet(nn.Module):
    """Base of the zoo's networks. A network sets ``stage_channels`` and overrides what it can offer."""

    has_stem = True  # feats[0] is the stem's map, not a stage's
    stage_channels: list[int]  # width of each map in "feats"

    def get_stage_channels(self) -> list[int]:
        """Widths: ``get_stage_channels()[i] == features["feats"][i].shape[1]``, the stem included."""
        return list(self.stage_channels)

    def get_stage_indices(self) -> tuple[int, ...]:
        """Indices into ``feats`` that are stages: all but the stem's map."""
        return tuple(range(int(self.has_stem), len(self.stage_channels)))

    def get_feat_modules(self) -> nn.ModuleList:
        """The modules that the maps come from, without pooling and classifier, in forward order."""
        raise NotOfferedError(f"{type(self).__name__} does not say which modules its feature maps come from")

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norm that each stage's ``preact_feats`` comes from (OFD's margins), deepest last.

        May be shorter than the list of stages; align the two from the deep end.
        """
        raise NotOfferedError(
            f"{type(self).__name__} has no batch norm that covers a whole map before its ReLU, "
            "so it cannot be the teacher of a method that asks for one (OFD); choose another teacher"
        )
