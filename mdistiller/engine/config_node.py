"""A yacs node that forgives number types and explains what it refuses.

yacs itself refuses ``DKD.BETA 8`` where the default is 8.0, and answers an unknown key with a ``KeyError``.
Here numbers convert where nothing is lost, an unknown key is refused with the closest known ones, and a
YAML file may build on others by ``_BASE_``.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from mdistiller.registry import InputError, suggestion

BASE_KEY = "_BASE_"


class ConfigNode(CfgNode):
    """``yacs.config.CfgNode`` with loose numbers, helpful errors and inheritance between files."""

    def merge_from_file(self, cfg_filename: str | os.PathLike[str]) -> None:
        """Merge a YAML file, the files that its ``_BASE_`` names first.

        Raises:
            InputError: a file that is missing, is no YAML mapping, or inherits from itself; an unknown key;
                a value of the wrong type.
        """
        for path, tree in _read_with_bases(Path(cfg_filename)):
            self._merge(tree, source=str(path))

    def merge_from_list(self, cfg_list: Sequence[Any]) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` as given on a command line; strings are read as literals."""
        if len(cfg_list) % 2:
            raise InputError(
                f"options come in pairs KEY VALUE; {cfg_list[-1]!r} has no value "
                f"(given: {' '.join(map(str, cfg_list))})"
            )
        for key, value in zip(cfg_list[::2], cfg_list[1::2], strict=True):
            tree: Any = _literal(value)
            for part in reversed(str(key).split(".")):
                tree = {part: tree}
            self._merge(tree, source="command line")

    def merge_from_other_cfg(self, cfg_other: CfgNode) -> None:
        """Merge another node; the same checks as for a file."""
        self._merge(cfg_other, source="merged node")

    def _merge(self, tree: Any, source: str, prefix: str = "", root: ConfigNode | None = None) -> None:
        if not isinstance(tree, dict):
            raise InputError(f"{source}: {prefix.rstrip('.') or 'the file'} must hold keys, not {tree!r}")
        root = self if root is None else root
        for key, value in tree.items():
            full_key = f"{prefix}{key}"
            if key not in self:
                if not self.is_new_allowed():
                    near = suggestion(full_key, _leaves(root))
                    raise InputError(f"{source}: unknown config key {full_key}; {near}")
                self[key] = ConfigNode(value) if isinstance(value, dict) else value
            elif isinstance(self[key], CfgNode):
                self[key]._merge(value, source, f"{full_key}.", root)
            else:
                self[key] = convert(value, self[key], full_key, source)


def convert(value: Any, default: Any, key: str, source: str) -> Any:
    """``value`` in the type of ``default``, or an ``InputError`` that names key, type and value."""
    if default is None:
        return value
    kind = type(default)
    if value is None and kind is str:  # "NAME:" with nothing behind it
        return ""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML reads 1e-3 as a string
            if kind is float:
                return number
            if number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif kind in (list, tuple):
        if isinstance(value, (list, tuple)):
            items = [convert(v, default[0], key, source) if default else v for v in value]
            return kind(items)
    elif isinstance(value, kind):
        return value
    raise InputError(f"{source}: {key} takes {_name_of(kind)} (default {default!r}), got {value!r}")


def _name_of(kind: type) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return names.get(kind, f"a {kind.__name__}")


def _literal(value: Any) -> Any:
    """What a command-line word stands for: a number, a list, a boolean, else the word itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _leaves(node: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, CfgNode) else [f"{prefix}{key}"]
    return keys


def _read_with_bases(path: Path, below: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """The file's tree behind those of its bases, in the order in which they are merged."""
    where = f" (the {BASE_KEY} of {below[-1]})" if below else ""
    resolved = path.resolve()
    if resolved in [p.resolve() for p in below]:
        raise InputError(f"{path}{where} inherits from itself: {' -> '.join(map(str, [*below, path]))}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no config file {path}{where}; {_files_nearby(path)}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read config file {path}{where}: {error}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise InputError(f"config file {path}{where} must hold keys, not {type(tree).__name__}")
    bases = tree.pop(BASE_KEY, [])
    files: list[tuple[Path, dict[str, Any]]] = []
    for base in [bases] if isinstance(bases, str) else bases:
        files += _read_with_bases(path.parent / base, (*below, path))
    return [*files, (path, tree)]


def _files_nearby(path: Path) -> str:
    """What lies where the file was looked for."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} (seen from {Path.cwd()})"
    names = [p.name for p in path.parent.glob("*.yaml")]
    return f"in {path.parent}: {suggestion(path.name, names)}"
