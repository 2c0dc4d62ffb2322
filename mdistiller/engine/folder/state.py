"""The parts of a run's state: what of a distiller is saved, and whether a saved part fits this run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, check_fit


def trained_state(distiller: nn.Module) -> dict[str, Tensor]:
    """The distiller's state dict without what is frozen of the teacher."""
    moving, frozen = {id(p) for p in distiller.teacher_parameters()}, distiller.frozen_networks()
    trained = {f"{role}.{n}" for role, net in frozen.items() for n, p in net.named_parameters() if id(p) in moving}
    state = distiller.state_dict()
    return {key: value for key, value in state.items() if key.split(".")[0] not in frozen or key in trained}


def fitting_state(distiller: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Of a saved model what the distiller takes: mdistiller's ``module.`` prefix and saved teacher are dropped.

    Raises:
        CheckpointError: names or shapes differ from :func:`trained_state`.
    """
    own = trained_state(distiller)
    given = {key.removeprefix("module."): value for key, value in state.items()}
    frozen = distiller.frozen_networks()
    given = {key: value for key, value in given.items() if key in own or key.split(".")[0] not in frozen}
    check_fit(own, given, f"the model in {source}")
    return given


def check_optimizer_fit(optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str) -> None:
    """Compare a saved optimiser state with the optimiser: groups, their sizes, the shapes of the moments.

    Raises:
        CheckpointError: they differ.
    """
    groups, saved = optimizer.param_groups, state.get("param_groups", [])
    sizes, saved_sizes = ([len(group["params"]) for group in part] for part in (groups, saved))
    if sizes != saved_sizes:
        raise CheckpointError(
            f"the optimiser in {source} does not fit: it has groups of {saved_sizes} parameters, this run {sizes}"
        )
    parameters = [p for group in groups for p in group["params"]]
    numbers = [number for group in saved for number in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for name, value in state.get("state", {}).get(number, {}).items():
            if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                raise CheckpointError(
                    f"the optimiser in {source} does not fit: {name} of parameter {number} is {tuple(value.shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )
