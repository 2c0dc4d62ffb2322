"""An option of the configuration: default, meaning, range and role, declared once.

``mdistiller/engine/cfg.py`` declares the library's options in :data:`OPTIONS`. Methods and data sets declare theirs in
their ``defaults``, nested dictionaries from keys to options; a plain value there is an option without bounds.
Everything that treats one key unlike another asks the option, and holds no list of keys.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from mdistiller.registry import InputError, Registry, dataset_dict, distiller_dict, suggestion

Role = Literal["result", "data", "speed", "place", "ignored"]
MANY, WIDEST = 10**6, 2**16  # epochs or images, and channels: more is a slip of the pen
BOUNDS = {"above": operator.gt, "at_least": operator.ge, "below": operator.lt, "at_most": operator.le}


@dataclass(frozen=True)
class Option:
    """The facts of a key. Bounds hold for a number, or for each number of a list.

    Args:
        default: its type is the key's.
        help: the meaning, for the reader of ``tools/list.py options``.
        above: every value is greater.
        at_least: no value is less.
        below: every value is less.
        at_most: no value is greater.
        one_of: the allowed values; a table is read when a value is checked, and may grow until then.
        holds: a further condition, and what it asks for in words: ``(lambda n: n % 2 == 1, "odd")``.
        role: ``"result"``: what is learned depends on it; ``"data"``: the images and the batches that are seen do;
            ``"speed"``: how the same is computed; ``"place"``: where things lie and what is written down;
            ``"ignored"``: mdistiller's key, which nothing here reads.
        resumable: a run may go on with another value, although the result depends on it.
        varies: with any value but 0, an image differs from epoch to epoch.
        is_weight: it weights a term of the loss.
        code: which code a value names, if the option names code; see ``mdistiller/consent.py``.
        settled: a run writes down what it finds in place of ``auto``.
        when: whether a run of a configuration reads it; without, each run of its section does.
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
        """Those that are given, by name."""
        return {name: bound for name in BOUNDS if (bound := getattr(self, name)) is not None}

    @property
    def allowed(self) -> str:
        """The condition on a value, in words; empty where any value of the default's type is allowed."""
        if isinstance(self.one_of, Registry):
            return f"the name of a {self.one_of.kind}"
        if self.one_of is not None:
            return ", ".join(self.one_of)
        bounds = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in self.bounds.items())
        return ", ".join(filter(None, [self.holds[1] if self.holds else "", bounds]))

    def check(self, key: str, value: Any) -> Any:
        """``value``, if it is allowed.

        Raises:
            InputError: it is not; names ``key``, the value and what is allowed.
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
    """A list of texts."""
    return isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)


def dead(default: Any, help: str) -> Option:
    """A key of mdistiller that its users' files give and read, and that has no effect here; ``help`` says why."""
    return Option(default, help, role="ignored")


OPTIONS: dict[str, Option] = {}


def options_in(tree: Mapping[str, Any], prefix: str = "", **known: Any) -> dict[str, Option]:
    """The options of nested ``defaults`` by dotted key.

    Args:
        tree: its leaves are options or plain values.
        prefix: put before each key, ``"KD."``.
        known: what holds for plain values, ``role="data"``.
    """
    found: dict[str, Option] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= options_in(value, f"{prefix}{key}.", **known)
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, Option) else Option(value, **known)
    return found


def options_of_method(method: type) -> dict[str, Option]:
    """The options that a method's class adds: its section's, and two for each further network."""
    found = {}
    for network, role in getattr(method, "networks", {}).items():
        key = f"DISTILLER.{network.upper()}"
        found[key] = Option("", f"architecture of the {network}; empty: the {role}'s")
        found[f"{key}_CKPT"] = Option("", f"weights of the {network}", resumable=True)
    return found | options_in(method.defaults or {}, f"{method.section}.")


def options_of_dataset(dataset: type) -> dict[str, Option]:
    """The options of a data set's section ``DATASET.<NAME>``; plain values have the role ``data``."""
    found = options_in(dataset.defaults, f"DATASET.{dataset.name.upper()}.", role="data")
    return {key: replace(option, when=lambda cfg: dataset.name == cfg.DATASET.TYPE) for key, option in found.items()}


def options_of(cfg: Any) -> dict[str, Option]:
    """The options of a run by dotted key: the library's, all data sets' and the method's.

    A configuration that is not shaped like ``CFG`` states its options by a method ``own_options``.
    """
    if hasattr(cfg, "own_options"):
        return cfg.own_options()
    found = dict(OPTIONS)
    for dataset in dataset_dict.values():
        found |= options_of_dataset(dataset)
    method = distiller_dict.get(cfg.DISTILLER.TYPE)
    return found if method is None else found | options_of_method(method)
