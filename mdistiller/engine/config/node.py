"""A yacs node that converts number types and explains its errors.

yacs refuses ``DKD.BETA 8`` if the default is 8.0, and raises a ``KeyError`` for an unknown key. This node converts
numbers without loss and names the closest known keys in its errors. A YAML file may have bases (``_BASE_``), and
``AMP: off`` is the text ``"off"``, not a boolean.
"""

from __future__ import annotations

import ast
import math
import os
import re
import reprlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from mdistiller.consent import COMMAND_LINE
from mdistiller.registry import InputError, closest, suggestion

ROOT = Path(__file__).resolve().parents[2]  # the package
# The library's configurations: in the package, or in the checkout that holds the package.
CONFIGS = next((place for place in (ROOT / "configs", ROOT.parent / "configs") if place.is_dir()), ROOT / "configs")
BASE_KEY, METHOD_FILES = "_BASE_", "DISTILLER.PLUGINS"
ALLOWED, TYPED, FREE = "__allowed_keys__", "__typed_keys__", "__free_lists__"  # attributes of a node
DEEPEST = 50  # levels of bases
WORDS_FOR_BOOL = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
SWITCH = ("auto", "on", "off")  # the values of a switch; booleans are accepted as on and off


class _Loader(yaml.SafeLoader):
    """YAML in which only ``true`` and ``false`` are booleans, and in which no key may occur twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def config_path(path: Path) -> Path:
    """``path``, or the library's file ``configs/...`` of this name if the current folder has no such file."""
    of_library = Path(os.path.normpath(path))
    if not path.exists() and of_library.parts[:1] == (CONFIGS.name,):
        of_library = CONFIGS.parent / of_library
        if of_library.exists() or (of_library.parent.is_dir() and not path.parent.is_dir()):
            return of_library
    return path


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        FileNotFoundError: no such file.
        InputError: the file cannot be read; names the line of the fault.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # reading from a pipe may wait for ever
            raise InputError(f"cannot read {path}: it is no regular file; copy its content into a regular file")
        with path.open(encoding="utf-8") as file:
            return yaml.load(file, _Loader)
    except (InputError, FileNotFoundError):
        raise
    except IsADirectoryError:
        raise InputError(f"cannot read {path}: it is a folder; name a file") from None
    except UnicodeDecodeError:
        raise InputError(f"cannot read {path}: it is no text file (UTF-8)") from None
    except RecursionError:
        raise InputError(f"cannot read {path}: its lists or keys are nested too deeply") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: a NUL in the path, a number of 5,000 digits
        raise InputError(f"cannot read {path}: {error}") from None


class ConfigNode(CfgNode):
    """``yacs.config.CfgNode`` with number conversion, helpful errors and inheritance between files.

    A key without a default has no type and takes any value. These are the keys of :meth:`allow_key` and the keys of a
    node with ``new_allowed``, except those of :meth:`enter_default`.
    """

    def allow_key(self, key: str) -> None:
        """Accept any value for the dotted ``key``, which has no default."""
        first, _, rest = key.partition(".")
        if rest and isinstance(self.get(first), ConfigNode):
            self[first].allow_key(rest)
        elif first not in self:
            self.__dict__.setdefault(ALLOWED, set()).add(first)

    def free_list(self, key: str) -> None:
        """Let the list ``key`` hold entries of any type, whatever it holds now: its default is empty."""
        self.__dict__.setdefault(FREE, set()).add(key)

    def enter_default(self, key: str, default: Any) -> None:
        """Set the default of the dotted ``key``. Its type becomes the key's; an existing key keeps its number type."""
        first, _, rest = key.partition(".")
        if not rest and not isinstance(self.get(first), CfgNode):
            with suppress(InputError):
                default = convert(default, self.get(first), key, "")
            self[first] = default
            self.__dict__.setdefault(TYPED, set()).add(first)
        elif rest and isinstance(self.setdefault(first, ConfigNode(new_allowed=True)), ConfigNode):
            self[first].enter_default(rest, default)

    def before_merge(self, trees: Sequence[tuple[str, Any]], **how: Any) -> None:
        """Called before a merge with the trees and their sources; may add keys."""

    def drops(self, key: str, value: Any) -> bool:
        """Whether an unknown key is ignored instead of refused, for keys in files of earlier versions."""
        return False

    def merge_from_file(self, cfg_filename: str | os.PathLike[str], but: Sequence[str] = (), **how: Any) -> None:
        """Merge a YAML file.

        The bases in ``_BASE_`` are merged first, in their order, and each base after its own bases. A common base of
        several files is merged once, before these files. In a text, ``{KEY}`` is the value of the bases:
        ``TAG: "{TAG},lt"`` adds a word to the tag.

        Args:
            cfg_filename: the file.
            but: dotted keys that the files do not change.
            how: for :meth:`before_merge`.

        Raises:
            InputError: a file is missing, is no YAML mapping or inherits from itself; a key is unknown; a value has
                the wrong type.
        """
        trees = [(str(path), tree) for path, tree in _read_with_bases(Path(cfg_filename)).values()]
        for key in but:
            for _, tree in trees:
                _leave_out(tree, key)
        self.before_merge(trees, **how)
        for source, tree in trees:
            self._merge(tree, source)

    def merge_from_list(self, cfg_list: Sequence[Any], source: str = COMMAND_LINE, **how: Any) -> None:
        """Merge ``[KEY, VALUE, KEY, VALUE, ...]`` of a command line; strings are read as literals.

        Args:
            cfg_list: the keys and values.
            source: their source, for messages.
            how: for :meth:`before_merge`.
        """
        files = [str(word) for word in cfg_list[::2] if str(word).endswith((".yaml", ".yml"))]
        if files:
            raise InputError(
                f"{files[0]} is in the place of a KEY; to read a configuration file, write --cfg {files[0]}"
            )
        if len(cfg_list) % 2:
            key, equals, value = str(cfg_list[-1]).partition("=")
            advice = f"write {key} {value}" if equals else f"given: {' '.join(map(str, cfg_list))}"
            raise InputError(f"options come in pairs KEY VALUE; {cfg_list[-1]!r} has no value ({advice})")
        trees = [self._option(str(key), word) for key, word in zip(cfg_list[::2], cfg_list[1::2], strict=True)]
        self.before_merge([(source, tree) for tree in trees], **how)
        for tree in trees:
            self._merge(tree, source)

    def _option(self, key: str, word: Any) -> Any:
        """``KEY VALUE`` as the tree of a file with this key."""
        default = value_at(self, key)
        tree = word if default is None else _literal(word)  # without a default, the merge reads the literal
        if isinstance(word, str) and not isinstance(tree, str) and isinstance(default, str):
            tree = word  # a text that looks like a number or a list: NAME 1e3
        if isinstance(tree, str) and isinstance(default, (list, tuple)):
            tree = _bare_list(tree)
        for part in reversed(key.split(".")):
            tree = {part: tree}
        return tree

    def merge_from_other_cfg(self, cfg_other: CfgNode, **how: Any) -> None:
        """Merge another node; the same checks as for a file."""
        self.before_merge([("merged node", cfg_other)], **how)
        self._merge(cfg_other, source="merged node")

    def _merge(self, tree: Any, source: str, prefix: str = "", root: ConfigNode | None = None) -> None:
        if not isinstance(tree, dict):
            content = "and is empty" if tree is None else f"not {brief(tree)}"
            raise InputError(f"{source}: {prefix.rstrip('.') or 'the file'} must hold keys, {content}")
        root = self if root is None else root
        for key, value in tree.items():
            full_key = f"{prefix}{key}"
            untyped = self.is_new_allowed() or key in self.__dict__.get(ALLOWED, ())
            untyped = untyped and key not in self.__dict__.get(TYPED, ())
            if key not in self and not untyped:
                if root.drops(full_key, value):
                    continue
                full_key = ".".join([full_key, *_only_path(value)])
                section = not prefix and isinstance(value, dict)
                advice = f"; if a method file reads it, name the file by {METHOD_FILES}" if section else ""
                raise InputError(f"{source}: unknown config key {full_key!r}; {_keys_nearby(full_key, root)}{advice}")
            if isinstance(value, str) and isinstance(self.get(key), str):
                value = value.replace(f"{{{key}}}", self[key])
            if isinstance(self.get(key), CfgNode):
                if not isinstance(self[key], ConfigNode):  # a script has set a plain yacs node
                    self[key] = ConfigNode(self[key])
                self[key]._merge(value, source, f"{full_key}.", root)
            elif untyped and isinstance(value, dict):
                self[key] = ConfigNode(new_allowed=True)
                self[key]._merge(value, source, f"{full_key}.", root)
            elif untyped:
                self[key] = _literal(value)  # as yacs reads it: 1e-3 is a number
            else:
                known = [] if key in self.__dict__.get(FREE, ()) else self[key]
                self[key] = convert(value, known, full_key, source)


def value_at(tree: Any, key: str) -> Any:
    """The value under a dotted key of nested dictionaries, or ``None``."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leave_out(tree: dict[str, Any], key: str) -> None:
    """Remove the dotted ``key`` from a tree, if the tree has it."""
    first, _, rest = key.partition(".")
    if not rest:
        tree.pop(first, None)
    elif isinstance(tree.get(first), dict):
        _leave_out(tree[first], rest)


def convert(value: Any, default: Any, key: str, source: str) -> Any:
    """``value`` in the type of ``default``.

    Raises:
        InputError: the value cannot be converted; names key, type and value.
    """
    if default is None:
        return value
    kind = type(default)
    if value is None and kind is str:  # "NAME:" without a value
        return ""
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in WORDS_FOR_BOOL:
            return WORDS_FOR_BOOL[str(value).lower()]
    elif kind in (int, float) and not isinstance(value, bool):
        if kind is int and isinstance(value, int) and value.bit_length() < 1000:
            return value  # exact; Python does not print much longer numbers
        try:
            number = float(value)  # YAML reads 1e-3 as a string
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number.is_integer():
                return int(number)
        except (TypeError, ValueError, OverflowError):
            pass
    elif kind is str:
        if default in SWITCH and str(value).lower() in WORDS_FOR_BOOL:
            return "on" if WORDS_FOR_BOOL[str(value).lower()] else "off"
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return _text(value if isinstance(value, str) else brief(value), key, source)
    elif kind in (list, tuple):
        if isinstance(value, str) and isinstance(_literal(value), (list, tuple)):  # YAML reads (32, 32) as a text
            value = _literal(value)
        if isinstance(value, str) and (not default or isinstance(default[0], str)):
            value = [value]
        if isinstance(value, (list, tuple)):
            items = [_entry(v, default, key, source) for v in value]
            return kind(items)
    elif kind is not int and isinstance(value, kind):  # a boolean is no number
        return value
    raise InputError(f"{source}: {key} takes {_name_of(kind)} (default {default!r}), got {brief(value)}")


def _entry(value: Any, default: Sequence[Any], key: str, source: str) -> Any:
    """An entry of a list, converted to the type of the default's first entry; any type if the default is empty."""
    if default:
        return convert(value, default[0], key, source)
    return _text(value, key, source) if isinstance(value, str) else value


def _text(value: str, key: str, source: str) -> str:
    """``value`` with ``~`` as the user's folder; most texts are names and paths.

    Raises:
        InputError: the text holds a control character, or names an unknown user.
    """
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", value):
        raise InputError(f"{source}: {key} {brief(value)} must not hold line breaks or control characters")
    if re.match(r"~[\w-]*(/|$)", value):
        path = os.path.expanduser(value)
        if path == value:
            raise InputError(f"{source}: {key} {value}: there is no user {value[1:].partition('/')[0]!r}")
        return path
    return value


_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 120
_brief.maxlist = _brief.maxtuple = _brief.maxdict = 20


def brief(value: Any) -> str:
    """``repr`` of a user's value; long values are cut."""
    try:
        return _brief.repr(value)
    except ValueError:  # a number of thousands of digits
        return "a number of very many digits"


def _name_of(kind: type) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a finite number", str: "a text"}
    return names.get(kind, f"a {kind.__name__}")


def _literal(value: Any) -> Any:
    """The value of a command-line word: a number, a list, a boolean, else the word itself."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _bare_list(word: str) -> Any:
    """The list in ``[a, b]``, a YAML list of texts without quotes; any other word is returned unchanged."""
    if not (word.startswith("[") and word.endswith("]")):
        return word
    try:
        return yaml.load(word, _Loader)
    except yaml.YAMLError:
        return word


def _keys_nearby(key: str, root: ConfigNode) -> str:
    """Advice for an unknown key, the first that applies:

    - keys that end in ``key`` (``SOLVER.LR`` for ``LR``);
    - similar keys of its section, or similar keys with the same last word, or all keys of its section;
    - similar keys of all sections, or all sections.
    """
    keys = _keys(root)
    section, _, word = key.rpartition(".")
    same_word = [known for known in keys if known.lower().rpartition(".")[2] == word.lower()]
    beside = value_at(root, section) if section else None
    in_section = closest(word, beside) if isinstance(beside, ConfigNode) else []
    near = [known for known in keys if known.endswith(f".{key}")] or [f"{section}.{name}" for name in in_section]
    near = near or closest(key, same_word)
    if not near and isinstance(beside, ConfigNode):
        return f"{section} has: {', '.join(beside) or 'no keys'}"
    near = near or closest(key, keys)
    return f"closest: {', '.join(near)}" if near else f"sections: {', '.join(root)}"


def _only_path(tree: Any) -> list[str]:
    """The keys from the root of a tree down to the first level with several keys or a value."""
    if not isinstance(tree, dict) or len(tree) != 1:
        return []
    ((key, below),) = tree.items()
    return [str(key), *_only_path(below)]


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key, value in node.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{key}.")
    return keys


def _read_with_bases(path: Path, below: tuple[Path, ...] = ()) -> dict[Path, tuple[Path, dict[str, Any]]]:
    """Path and tree of the file's bases and then of the file, by resolved path, in the order of the merge."""
    path, where = config_path(path), f" (the {BASE_KEY} of {below[-1]})" if below else ""
    if len(below) > DEEPEST:
        raise InputError(f"{below[0]} is more than {DEEPEST} files deep in {BASE_KEY}")
    resolved = path.resolve()
    if resolved in [p.resolve() for p in below]:
        raise InputError(f"{path}{where} inherits from itself: {' -> '.join(map(str, [*below, path]))}")
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"no config file {path}{where}; {files_nearby(path)}") from None
    if tree is None:
        raise InputError(f"config file {path}{where} is empty; it must hold keys, like the files in configs/")
    if not isinstance(tree, dict):
        raise InputError(f"config file {path}{where} must hold keys, not {type(tree).__name__}")
    bases = tree.pop(BASE_KEY, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) and "\0" not in base for base in bases)):
        raise InputError(f"config file {path}{where}: {BASE_KEY} takes a file or a list of files, got {brief(bases)}")
    files: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for base in bases:
        files |= _read_with_bases(path.parent / base, (*below, path))  # a repeated base keeps its first position
    return files | {resolved: (path, tree)}


def sections_of(path: str | os.PathLike[str]) -> set[str]:
    """The sections with a key in a configuration file or in one of its bases."""
    return {section for _, tree in _read_with_bases(Path(path)).values() for section, keys in tree.items() if keys}


def files_nearby(path: Path) -> str:
    """The YAML files in the folder of ``path``, for messages."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} (current folder: {Path.cwd()})"
    names = [p.name for p in path.parent.glob("*.yaml")]
    where = "the current folder" if path.parent == Path() else path.parent
    if not names:
        return f"{where} holds no .yaml file (current folder: {Path.cwd()})"
    return f"in {where}, {suggestion(path.name, names)}"
