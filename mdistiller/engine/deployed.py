"""The deployed network of a method: the network that is scored, averaged, saved as the student and exported."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from mdistiller.distillers import Distiller
from mdistiller.registry import InputError


def deployed_network(distiller: Distiller) -> nn.Module:
    """``distiller.deployed()``, or the whole method if the method defines only ``forward_test``."""
    return WholeMethod(distiller) if deploys_whole(type(distiller)) else distiller.deployed()


def deploys_whole(method: type) -> bool:
    """Whether a method inherits or defines ``forward_test`` in a class that is more derived than its ``deployed``."""
    definers = [cls for cls in method.__mro__ if {"forward_test", "deployed"} & vars(cls).keys()]
    return bool(definers) and "deployed" not in vars(definers[0])


class WholeMethod(nn.Module):
    """A method as a network: ``forward`` is its ``forward_test``.

    Parameters and state dict are the method's without its frozen networks. A copy has its own weights and shares the
    frozen networks. A frozen network with trained parameters belongs to the state and is copied.

    Args:
        distiller: the method; its modules become those of this network.
    """

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        trained = {id(p) for p in distiller.teacher_parameters()}
        frozen = distiller.frozen_networks().items()
        self.frozen = {name: net for name, net in frozen if trained.isdisjoint(map(id, net.parameters()))}
        vars(self)["distiller"] = distiller  # not registered as a module, else all keys would begin with "distiller."
        self._modules = {name: net for name, net in distiller._modules.items() if name not in self.frozen}
        self._parameters, self._buffers = distiller._parameters, distiller._buffers
        self._non_persistent_buffers_set = distiller._non_persistent_buffers_set

    def forward(self, image: Tensor) -> Any:
        return self.distiller.forward_test(image)

    def train(self, mode: bool = True) -> WholeMethod:
        super().train(mode)
        self.distiller.train(mode)  # last, since the method may keep some of its modules in eval mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeMethod:
        """
        Raises:
            InputError: the method holds an object that cannot be copied, such as an open file.
        """
        memo.update({id(network): network for network in self.frozen.values()})
        try:
            return WholeMethod(copy.deepcopy(self.distiller, memo))
        except (TypeError, RuntimeError) as error:
            raise InputError(
                f"{type(self.distiller).__name__} cannot be copied ({error}), but SOLVER.EMA_DECAY and "
                "DATASET.VAL_FRACTION need a copy; define deployed(self), which returns the network that predicts"
            ) from error
