"""The data set's recipes for the views that a method asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mdistiller.registry import InputError

from .base import DataSet
from .randaugment import RandAugment
from .views import View


def chosen_recipes(cfg: Any, dataset: DataSet) -> dict[str, View]:
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
    fields: tuple[str, ...], dataset: DataSet, recipes: Mapping[str, View] | None = None
) -> dict[str, tuple[str, View]]:
    """For each field the name and the recipe of its view; ``image`` is the weak view.

    Args:
        fields: the views of :class:`mdistiller.contract.Contract`.
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
