"""The parts of a run's state: which tensors of a distiller are saved, and whether a saved part fits this run.

A *kind* describes a part of a state:

- a type or a tuple of types: the part is an instance;
- ``[kind]``: a list or a tuple whose entries are of the kind;
- a dictionary: the kinds of the entries by name; an entry may be missing. If a key of the dictionary is a type, then
  all other entries have keys of this type and values of this kind. Otherwise other entries are not checked.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import CheckpointError, check_fit

Kind = Any
NUMBER = numbers.Real
ROW = {"epoch": NUMBER, "lr": NUMBER, str: object}  # a line of the logs
OPTIMIZER = {"param_groups": [{"params": [int]}], "state": {int: {str: (Tensor, NUMBER, type(None))}}}
RESULTS = {
    "last": {"epoch": int},
    "best": {"epoch": (int, type(None))},
    "teacher": {"sha256": (str, type(None)), str: object},
    "method_file": {"sha256": str},
    "seconds": {str: NUMBER},
    "images_seen": int,
    str: object,
}
STATE = {
    "epoch": int,
    "step_in_epoch": int,
    "step": int,
    "row": ROW,
    "config": str,
    "model": {str: Tensor},
    "optimizer": OPTIMIZER,
    "scaler": {str: NUMBER},
    "random": dict,
    "random_of_others": [dict],
    "hooks": {str: object},
    "results": RESULTS,
    "best_acc": (NUMBER, Tensor),
}


def check_kind(value: Any, kind: Kind, name: str) -> None:
    """Refuse a part of a state that is of another kind.

    Args:
        value: the part.
        kind: see the top of the file.
        name: the part's name in the message: ``"row of FILE"``.

    Raises:
        CheckpointError: names the part, its expected type and its type.
    """
    expected = {list: (list, tuple), dict: dict}.get(type(kind), kind)
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        names = " or ".join(cls.__name__ for cls in types)
        raise CheckpointError(f"{name} should be of type {names}, and is of type {type(value).__name__}")
    if isinstance(kind, list):
        for place, part in enumerate(value):
            check_kind(part, kind[0], f"entry {place} of {name}")
    elif isinstance(kind, dict):
        of_keys = tuple(key for key in kind if isinstance(key, type))
        for key, part in value.items():
            if of_keys and key not in kind:
                check_kind(key, of_keys, f"a key of {name}")
            check_kind(part, kind.get(key, kind.get(type(key), object)), f"{key} of {name}")


def trained_state(distiller: nn.Module) -> dict[str, Tensor]:
    """The distiller's state dict without the frozen parts of the teacher."""
    moving, frozen = {id(p) for p in distiller.teacher_parameters()}, distiller.frozen_networks()
    trained = {f"{role}.{n}" for role, net in frozen.items() for n, p in net.named_parameters() if id(p) in moving}
    state = distiller.state_dict()
    return {key: value for key, value in state.items() if key.split(".")[0] not in frozen or key in trained}


def fitting_state(distiller: nn.Module, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """A saved model's state for the distiller: without mdistiller's prefix ``module.`` and without a saved teacher.

    Raises:
        CheckpointError: names or shapes differ from :func:`trained_state`.
    """
    expected = trained_state(distiller)
    saved = {key.removeprefix("module."): value for key, value in state.items()}
    frozen = distiller.frozen_networks()
    fitting = {key: value for key, value in saved.items() if key in expected or key.split(".")[0] not in frozen}
    check_fit(expected, fitting, f"the model in {source}")
    return fitting


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
