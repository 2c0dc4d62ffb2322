"""The parts of a run's state: what of a distiller is saved, and whether a saved part fits this run.

A *kind* says what a part of a state may be: a type, or a tuple of types; ``[kind]`` a list or tuple of such parts; a
dictionary the kinds of its entries, by name (an entry may be missing) or, where the key is a type, those of all other
entries, whose keys are of that type. Entries that a dictionary does not mention are left alone.
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
    "teacher": {"sha256": (str, type(None))},
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
        kind: see above.
        name: the part's, for the message: ``"row of FILE"``.

    Raises:
        CheckpointError: names the part, what it should be and what it is.
    """
    expected = {list: (list, tuple), dict: dict}.get(type(kind), kind)
    if not isinstance(value, expected):
        types = expected if isinstance(expected, tuple) else (expected,)
        wanted = " or ".join(cls.__name__ for cls in types)
        raise CheckpointError(f"{name} should be of type {wanted}, and is of type {type(value).__name__}")
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
