"""Which views a method asks for, read off its ``forward_train``, and the data set's recipes for them."""

from __future__ import annotations

import inspect

from mdistiller.registry import InputError

from .base import DataSet
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


def views_of(fields: tuple[str, ...], dataset: type[DataSet]) -> dict[str, tuple[str, View]]:
    """For each field the name and the recipe of its view; ``image`` is the weak view.

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
    return {field: (name, dataset.views[name]) for field, name in names.items()}
