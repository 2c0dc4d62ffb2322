"""An option of the configuration: default, meaning, range and role, declared once.

``mdistiller/engine/cfg.py`` declares the library's options in :data:`OPTIONS`. Methods and data sets declare their
options in ``defaults``, nested dictionaries from keys to options; a plain value there is an option without bounds.
Code that treats keys differently reads their options; no other file has a list of keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mdistiller.registry import InputError, Registry, dataset_dict, distiller_dict, suggestion

Role = Literal["result", "data", "speed", "place", "ignored"]
MANY, WIDEST = 10**6, 2**16  # epochs or images, and channels: a larger number is a typing error
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


@dataclass(frozen=True)
class Option:
    """The facts of a key. Bounds hold for a number, or for each number of a list.

    Args:
        default: the default; its type is the key's.
        help: the meaning, for the reader of ``tools/list.py options``.
        above: every value is greater.
        at_least: no value is less.
        below: every value is less.
        at_most: no value is greater.
        one_of: the allowed values. A table is read at each check, so it may grow until then.
        holds: a further condition and its text: ``(lambda n: n % 2 == 1, "odd")``.
        role: ``"result"``: decides the learning; ``"data"``: decides the images and batches; ``"speed"``: decides the
            way of computing; ``"place"``: folders, files and logs; ``"ignored"``: a key of mdistiller that the library
            does not read.
        resumable: a run may continue with another value, although the result depends on the value.
        varies: with any value but 0, an image differs from epoch to epoch.
        is_weight: the option is the weight of a term of the loss.
        code: returns the code that a value names, if the option names code; see ``mdistiller/consent.py``.
        settled: a run writes the value that it finds into ``config.yaml`` in place of ``auto``.
        when: whether a run with a configuration reads the option; ``None``: each run of its section reads it.
    """

    default: Any
    help: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    one_of: Iterable[str] | None = None
    holds: tuple[Callable[[Any], bool], str] | None = None
    role: Role = "result"
    resumable: bool = False
    varies: bool = False
    is_weight: bool = False
    code: Callable[[Any], list[str]] | None = None
    settled: bool = False
    when: Callable[[Any], bool] | None = None

    @property
    def fixed(self) -> bool:
        """A run cannot be resumed with another value."""
        return self.decides_result and not self.resumable

    @property
    def decides_result(self) -> bool:
        """Runs with different values are different runs."""
        return self.role in ("result", "data")

    def is_read(self, cfg: Any) -> bool:
        return self.role != "ignored" and (self.when is None or self.when(cfg))

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are not ``None``, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}

    @property
    def allowed(self) -> str:
        """The condition on a value, in words; empty if every value of the default's type is allowed."""
        if isinstance(self.one_of, Registry):
            return f"the name of a {self.one_of.kind}"
        if self.one_of is not None:
            return ", ".join(self.one_of)
        bounds = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in self.bounds.items())
        return ", ".join(filter(None, [self.holds[1] if self.holds else "", bounds]))

    def check(self, key: str, value: Any) -> Any:
        """``value``, if the value is allowed.

        Raises:
            InputError: the value is not allowed; names ``key``, the value and the allowed values.
        """
        if self.one_of is not None:
            if value not in self.one_of:
                if isinstance(self.one_of, Registry):
                    raise InputError(f"{key}: {self.one_of.refusal(value)}")
                raise InputError(f"{key}: no choice named {value!r}; {suggestion(str(value), self.one_of)}")
            return value
        entries = value if isinstance(value, (list, tuple)) else [value]
        within = not self.bounds or all(isinstance(entry, (int, float)) for entry in entries)
        within = within and all(BOUNDS[name](entry, bound) for entry in entries for name, bound in self.bounds.items())
        within = within and not any(isinstance(entry, int) and abs(entry) >= 2**63 for entry in entries)
        if not within or (self.holds is not None and not self.holds[0](value)):
            raise InputError(f"{key} must be {self.allowed or 'below 2**63'}, got {value}")
        return value


def weight(default: float, help: str = "") -> Option:
    """The weight of a term of the loss, 0 or more."""
    return Option(default, help, at_least=0, is_weight=True)


def are_texts(value: Any) -> bool:
    """Whether a value is a list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)


def dead(default: Any, help: str) -> Option:
    """A key of mdistiller that users' files set or read, and that has no effect in this library; ``help`` says why."""
    return Option(default, help, role="ignored")


OPTIONS: dict[str, Option] = {}


def options_in(tree: Mapping[str, Any], prefix: str = "", **known: Any) -> dict[str, Option]:
    """The options of nested ``defaults`` by dotted key.

    Args:
        tree: its leaves are options or plain values.
        prefix: of each key, ``"KD."``.
        known: further arguments of the plain values' options, ``role="data"``.
    """
    options: dict[str, Option] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            options |= options_in(value, f"{prefix}{key}.", **known)
        else:
            options[f"{prefix}{key}"] = value if isinstance(value, Option) else Option(value, **known)
    return options


def options_of_method(method: type) -> dict[str, Option]:
    """The options that a method's class adds: of its section, and two for each further network."""
    options = {}
    for network, role in getattr(method, "networks", {}).items():
        key = f"DISTILLER.{network.upper()}"
        options[key] = Option("", f"architecture of the {network}; empty: the {role}'s")
        options[f"{key}_CKPT"] = Option("", f"weights of the {network}", resumable=True)
    return options | options_in(method.defaults or {}, f"{method.section}.")


def options_of_dataset(dataset: type) -> dict[str, Option]:
    """The options of a data set's section ``DATASET.<NAME>``; plain values have the role ``data``."""
    options = options_in(dataset.defaults, f"DATASET.{dataset.name.upper()}.", role="data")
    return {key: replace(option, when=lambda cfg: dataset.name == cfg.DATASET.TYPE) for key, option in options.items()}


def options_of(cfg: Any) -> dict[str, Option]:
    """The options of a run by dotted key: of the library, of all data sets and of the method.

    A configuration with other sections than ``CFG`` has a method ``own_options`` that returns its options.
    """
    if hasattr(cfg, "own_options"):
        return cfg.own_options()
    options = dict(OPTIONS)
    for dataset in dataset_dict.values():
        options |= options_of_dataset(dataset)
    method = distiller_dict.get(cfg.DISTILLER.TYPE)
    return options if method is None else options | options_of_method(method)
