"""Names of networks with a colon: ``timm:NAME[.tag]``, ``torchvision:NAME`` and ``package.module:factory``.

Also ``cifar:NAME`` and its like: a network of this library's tables, where the data set's own table lacks the name.
"""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from mdistiller.registry import MODEL_FAMILIES, InputError, Registry, UnknownName, check_choice, suggestion

from .._registration import ModelEntry


def is_foreign(name: str) -> bool:
    """Whether a name belongs to another library or to a factory."""
    return ":" in name


def is_code(name: str) -> bool:
    """Whether a name belongs to a factory, ``package.module:factory``. A factory is executed."""
    return is_foreign(name) and name.partition(":")[0] not in FINDERS


def find_network(name: str) -> ModelEntry | None:
    """The entry of a network whose name has a colon; ``None``: the name has none.

    Raises:
        UnknownName: the library has no such network; the message has the closest names.
        InputError: the library is not installed; there is no such factory.
    """
    if not is_foreign(name):
        return None
    library, _, rest = name.partition(":")
    found = FINDERS[library](rest) if library in FINDERS else _factory(library, rest)
    return found if isinstance(found, ModelEntry) else ModelEntry(found)


def _imported_timm(wanted: str) -> ModuleType:
    try:
        import timm
    except ImportError:
        raise InputError(f'{wanted} needs timm: pip install -e ".[models]"') from None
    return timm


def _timm(name: str) -> Callable[..., nn.Module]:
    timm = _imported_timm(f"timm:{name}")
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise UnknownName(f"timm has no network named {architecture!r}; {suggestion(architecture, timm.list_models())}")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise UnknownName(f"timm's {architecture} has no weights named {tag!r}; {suggestion(tag, tags)}")

    def build(num_classes: int | None = None, pretrained: bool = False, **arguments: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **arguments)

    return build


def _torchvision(name: str) -> Callable[..., nn.Module]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName(f"torchvision has no classifier named {name!r}; {suggestion(name, known)}")

    def build(num_classes: int | None = None, pretrained: bool = False, **arguments: Any) -> nn.Module:
        weights = models.get_model_weights(name).DEFAULT
        if pretrained:
            network, known = models.get_model(name, weights=weights, **arguments), len(weights.meta["categories"])
            if num_classes not in (None, known):
                _renew_classifiers(network, known, num_classes)
        else:
            network = models.get_model(name, num_classes=num_classes, **arguments)
        made_for = weights.transforms()
        side = made_for.crop_size[0]
        network.pretrained_cfg = {"input_size": (3, side, side), "mean": made_for.mean, "std": made_for.std}
        return network

    return build


def _renew_classifiers(network: nn.Module, known: int, num_classes: int) -> None:
    """Layers with fresh weights in place of the layers with one output for each known class, as timm does."""
    for module in list(network.modules()):
        for name, layer in module.named_children():
            if isinstance(layer, nn.Linear) and layer.out_features == known:
                setattr(module, name, nn.Linear(layer.in_features, num_classes))
            elif isinstance(layer, nn.Conv2d) and layer.out_channels == known and layer.kernel_size == (1, 1):
                setattr(module, name, nn.Conv2d(layer.in_channels, num_classes, 1))


def _of_table(table: Registry) -> Callable[[str], ModelEntry]:
    def entry(name: str) -> ModelEntry:
        if name not in table:  # the table's own finder would look behind a second colon, and may execute code
            raise UnknownName(table.refusal(name))
        return ModelEntry.of(table[name])

    return entry


FINDERS: dict[str, Callable[[str], Callable[..., nn.Module]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    **{family: _of_table(table) for family, table in MODEL_FAMILIES.items()},
}
"""By library, before the colon."""


def names_like(pattern: str) -> list[tuple[str, str]]:
    """Networks of timm and torchvision by a pattern, and the names of their public weights.

    Args:
        pattern: ``"timm:resnet*"``; without ``*`` and ``?``, all names that contain the text behind the colon.

    Raises:
        InputError: another library, or one that is not installed.
    """
    library, _, wanted = pattern.partition(":")
    wanted = wanted if {*"*?["} & {*wanted} else f"*{wanted}*"
    check_choice("library", library, LISTED)
    if library == "timm":
        timm = _imported_timm(pattern)
        weights: dict[str, list[str]] = {name: [] for name in timm.list_models(wanted)}
        for known in timm.list_pretrained(wanted + ".*"):
            name, _, tag = known.partition(".")
            weights.setdefault(name, []).append(tag)
    else:
        from torchvision import models

        names = fnmatch.filter(models.list_models(module=models), wanted)
        weights = {name: [each.name for each in models.get_model_weights(name)] for name in names}
    return [(f"{library}:{name}", ", ".join(tags)) for name, tags in sorted(weights.items())]


LISTED = ("timm", "torchvision")


def _factory(module: str, name: str) -> Callable[..., nn.Module]:
    full = f"{module}:{name}"
    if not all(part.isidentifier() for part in [*module.split("."), name]):
        raise InputError(
            f"{full} is no name of a network: a factory is written package.module:factory (mine.net:small for the "
            "function small in mine/net.py); other names begin with timm: or torchvision:"
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; at the end, so that it hides nothing that is installed
    try:
        factory = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise InputError(
            f"{full}: {error}; a name package.module:factory must lie below the current folder "
            f"({os.getcwd()}), be installed, or be found by PYTHONPATH"
        ) from None
    except AttributeError:
        known = [each for each in vars(sys.modules[module]) if not each.startswith("_")]
        raise InputError(f"{full}: module {module} has no {name!r}; {suggestion(name, known)}") from None
    if not callable(factory):
        raise InputError(f"{full}: {name} is no function and no class")
    takes_classes = "num_classes" in _parameters(factory)

    def build(num_classes: int, **arguments: Any) -> nn.Module:
        if takes_classes:
            arguments["num_classes"] = num_classes
        network = factory(**arguments)
        if not isinstance(network, nn.Module):
            raise InputError(f"{full} must return a torch.nn.Module, not {type(network).__name__}")
        return network

    return build


def _parameters(factory: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # of a built-in
        return []
