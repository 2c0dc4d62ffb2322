"""Which views a method asks for, read off its ``forward_train``, and the data set's recipes for them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mdistiller.registry import InputError

from .base import DataSet
from .randaugment import RandAugment
from .views import View

GIVEN = ("self", "target", "index", "epoch", "contrastive_index")  # what a method may have beside views


def batch_fields(distiller: type) -> tuple[str, ...]:
    """The image fields of a batch for this method: ``("image",)``, or ``("image_weak", "image_strong")``.

    They are the parameters of ``forward_train`` named ``image`` or ``image_<view>``. A method that names
    none gets ``image``.

    Raises:
        InputError: ``forward_train`` requires something that no data set delivers.
    """
    parameters = inspect.signature(distiller.forward_train).parameters
    fields = tuple(name for name in parameters if name == "image" or name.startswith("image_"))
    for name, parameter in parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if name not in fields + GIVEN and not variadic and parameter.default is parameter.empty:
            raise InputError(
                f"{distiller.__name__}.forward_train requires {name!r}, which no data set delivers; it can "
                f"have image, image_<view>, {', '.join(GIVEN[1:])}, and parameters with a default"
            )
    return fields or ("image",)


def wants_negatives(distiller: type) -> bool:
    """Whether ``forward_train`` names ``contrastive_index``: positions of images to contrast each image with."""
    return "contrastive_index" in inspect.signature(distiller.forward_train).parameters


def chosen_recipes(cfg: Any, dataset: type[DataSet]) -> dict[str, View]:
    """The data set's recipes by name, where ``weak`` and ``strong`` stand for those that the configuration gives them.

    ``DATASET.VIEW_WEAK`` and ``DATASET.VIEW_STRONG`` name recipes, ``DATASET.STRONG_N`` the operations of
    RandAugment in them. Random numbers go by the view, not by the recipe: two views of one recipe differ.

    Raises:
        InputError: the data set has no recipe of that name.
    """
    chosen = dict(dataset.views)
    for view in ("weak", "strong"):
        name = cfg.DATASET[f"VIEW_{view.upper()}"]
        if name == view and view not in dataset.views:
            continue  # matters only to a method that asks for it
        if name not in dataset.views:
            raise InputError(
                f"DATASET.VIEW_{view.upper()}: data set {dataset.name} has no recipe {name!r}; it has "
                f"{', '.join(dataset.views)}"
            )
        chosen[view] = tuple(
            replace(operation, n=cfg.DATASET.STRONG_N) if isinstance(operation, RandAugment) else operation
            for operation in dataset.views[name]
        )
    return chosen


def views_of(
    fields: tuple[str, ...], dataset: type[DataSet], recipes: Mapping[str, View] | None = None
) -> dict[str, tuple[str, View]]:
    """For each field the name and the recipe of its view; ``image`` is the weak view.

    Args:
        fields: what :func:`batch_fields` gives.
        dataset: whose views they are.
        recipes: by name; the data set's own where not given.

    Raises:
        InputError: the data set has no recipe of that name.
    """
    names = {field: field.removeprefix("image_") if field != "image" else "weak" for field in fields}
    for field, name in names.items():
        if name not in dataset.views:
            raise InputError(
                f"the method asks for {field!r}, but data set {dataset.name} has no view {name!r}; "
                f"its views are {', '.join(dataset.views)}"
            )
    recipes = dataset.views if recipes is None else recipes
    return {field: (name, recipes[name]) for field, name in names.items()}
