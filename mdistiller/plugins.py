"""Plugins: method files of other projects, loaded and registered without changes.

There are two ways to add a file: name it in ``DISTILLER.PLUGINS``, or put it into ``mdistiller/distillers/``. Files in
``mdistiller/distillers/`` that no module imports are searched only for a method that is not registered. The search
parses them without executing them. Then the one file that declares the method is loaded.

A file declares the names of its classes, the names that it registers (``@register_distiller("X")``,
``distiller_dict["X"] = ...``), and its file name without ``.py``. It also declares these names in capitals, as in
mdistiller's table (``REVIEWKD`` is ``ReviewKD``). A registered name is never replaced, also not in another letter case.

A file is loaded as a module of ``mdistiller.distillers``. So it may contain ``from ._base import Distiller`` or
``from .KD import kd_loss``, and in a sub-folder of its project's package ``from .._base import Distiller``. A helper
file beside it is loaded first if the package lacks the helper (``from .loss import ...``) or one of its names. An
import that fails is left out if the file does not use its names (``from turtle import st``).

A file may hold hooks, with or without methods: ``HOOKS = [MyHook]``, a list of classes derived from
``mdistiller.engine.hooks.Hook``. A run uses the hooks of its method's file and of the files in ``DISTILLER.PLUGINS``.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import mdistiller.distillers
from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.files import file_sha256
from mdistiller.forks import attribute_path
from mdistiller.messages import warn
from mdistiller.options import Option
from mdistiller.registry import InputError

PACKAGE = mdistiller.distillers.__name__
FOLDER = Path(mdistiller.distillers.__file__).resolve().parent


@dataclass(frozen=True)
class MethodFile:
    """A loaded file.

    Args:
        path: of the file.
        methods: the file's classes by their names in ``distiller_dict``.
        taken: names that the file declares and that belong to another method, compared without letter case.
        reads: the configuration keys that the file's code reads, ``cfg.A.B`` as ``"A.B"``.
        required: for each class the keys that its constructor always reads.
        hooks: the file's list ``HOOKS``.
    """

    path: Path
    methods: dict[str, type[Distiller]]
    taken: tuple[str, ...]
    reads: tuple[str, ...]
    required: dict[str, tuple[str, ...]]
    hooks: tuple[Any, ...]


_loaded: dict[Path, MethodFile] = {}


def load_method_file(path: str | Path) -> MethodFile:
    """Load a file once and register its methods.

    A file without a method is a helper for other files and registers nothing.

    Raises:
        InputError: the file is missing, fails when it is executed, or declares only names that are registered already.
    """
    path = Path(path).expanduser().resolve()
    if path.suffix != ".py":
        raise InputError(f"no method file {path}: DISTILLER.PLUGINS takes Python files (.py)")
    if path not in _loaded:
        registered = dict(distiller_dict)
        try:
            _loaded[path] = _load(path, registered)
        except BaseException:
            distiller_dict.clear()
            distiller_dict.update(registered)
            sys.modules.pop(_module_name(path), None)
            raise
    return _loaded[path]


def load_methods(paths: Iterable[str], name: str) -> MethodFile | None:
    """Load the files of ``DISTILLER.PLUGINS``; then search for ``DISTILLER.TYPE`` if it is not registered.

    Returns:
        The file of the method; ``None`` for a method of the library and for a name that no file declares.

    Raises:
        InputError: see :func:`load_method_file`; or the library and one of the files both have a method of this name.
    """
    for file in [load_method_file(path) for path in paths]:
        if name in file.taken:
            owner = next(cls for known, cls in distiller_dict.items() if known.upper() == name.upper())
            raise InputError(
                f"DISTILLER.TYPE {name}: {file.path} has a method of that name, and {owner.__module__} "
                f"too; copy the file to a free name, my_{name}.py, and set DISTILLER.TYPE my_{name}"
            )
    if name not in distiller_dict:
        find_method(name)
    return method_file(distiller_dict.get(name))


def find_method(name: str) -> type[Distiller] | None:
    """Load the file in ``mdistiller/distillers/`` that declares ``name``.

    Raises:
        InputError: several files declare the name, or the file cannot be loaded.
    """
    by_stem, by_content = [], []
    for path in sorted(FOLDER.glob("*.py")):
        if path.stem.startswith("_") or f"{PACKAGE}.{path.stem}" in sys.modules:
            continue
        if name in _spellings([path.stem]):
            by_stem.append(path)
        elif name in _spellings(_declared_names(path)):
            by_content.append(path)
    candidates = by_stem or by_content
    if len(candidates) > 1:
        raise InputError(
            f"method {name!r} is declared by {', '.join(p.name for p in candidates)} in {FOLDER}; keep one of them"
        )
    return load_method_file(candidates[0]).methods.get(name) if candidates else None


def method_file(method: type | None) -> MethodFile | None:
    """The file that a registered class was loaded from; ``None`` for a class of the library."""
    return next((file for file in _loaded.values() if method in file.methods.values()), None)


def hooks_of(paths: Iterable[str], name: str) -> list[Any]:
    """The hooks in the files of ``DISTILLER.PLUGINS`` and in the file of the method ``name``."""
    files = {file.path: file for file in [*map(load_method_file, paths), method_file(distiller_dict[name])] if file}
    return [hook for file in files.values() for hook in file.hooks]


def source_of(method: type) -> dict[str, str] | None:
    """Path and SHA-256 of the file that defines a method, to tell versions apart; ``None`` in a notebook.

    The path of a file of the package begins with ``mdistiller/``, independent of the place of installation.
    """
    file = method_file(method)
    try:
        path = Path(file.path if file else inspect.getfile(method))
        inside = path.resolve().is_relative_to(FOLDER.parent)
        name = path.resolve().relative_to(FOLDER.parent.parent).as_posix() if inside else str(path)
        return {"path": name, "sha256": file_sha256(path)}
    except (TypeError, OSError):
        return None


def contents(paths: Iterable[str]) -> str:
    """The content of loaded files, for messages: ``"a.py was read and holds no method"``."""
    files = [load_method_file(path) for path in paths]
    return "; ".join(f"{file.path} was read and holds {', '.join(file.methods) or 'no method'}" for file in files)


def place_in_file(error: BaseException) -> str:
    """``"FILE, line 12"``: the innermost line of a loaded file in an error's traceback; empty if there is none."""
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) in _loaded]
    return f"{places[-1].filename}, line {places[-1].lineno}" if places else ""


distiller_dict.finder = find_method
distiller_dict.advice = "name a method file of another project in DISTILLER.PLUGINS"


# Loading


def _load(path: Path, registered: dict[str, Any]) -> MethodFile:
    tree = _parse(path)
    reads, required = _config_reads(tree, path)
    module = _execute(path, tree)
    changed = [name for name, cls in registered.items() if distiller_dict.get(name) is not cls]
    if changed:
        raise InputError(f"method file {path} replaces {', '.join(changed)}, which another file has registered")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Distiller) and value.__module__ == module.__name__
    ]
    methods = {name: cls for name, cls in distiller_dict.items() if name not in registered}
    owners = {name.upper(): cls for name, cls in registered.items()}
    taken = [name for name, cls in methods.items() if owners.get(name.upper(), cls) is not cls]
    for name in taken:  # the file registered a name that differs from a known name in letter case only
        del distiller_dict[name], methods[name]
    for name, cls in _names(classes, path.stem):
        if name not in distiller_dict and name.upper() not in owners:
            distiller_dict.add(name, cls)
            methods[name] = cls
        elif distiller_dict.get(name) is not cls and name not in taken:
            taken.append(name)
    if classes and not methods:
        raise InputError(
            f"method file {path}: its names are taken ({', '.join(taken)}); copy it to a free name, such as "
            f"my_{path.stem}.py, and set DISTILLER.TYPE my_{path.stem}"
        )
    for cls in dict.fromkeys(methods.values()):
        _state_section(cls, module, reads)
        if getattr(cls, "defaults", None) is not None:
            _check_defaults(cls.defaults, path)
    if taken:
        warn(f"{path}: {', '.join(taken)} stays registered as before; the file's methods are {', '.join(methods)}")
    hooks = getattr(module, "HOOKS", ())
    return MethodFile(path, methods, tuple(taken), reads, required, tuple(hooks) if isinstance(hooks, list) else ())


def _names(classes: list[type], stem: str) -> Iterator[tuple[str, type]]:
    """The names to register each class by: the class's name, and the file's if the file has one class or equals it."""
    for cls in classes:
        alone = len(classes) == 1
        for name in _spellings([cls.__name__, *([stem] if alone or stem.upper() == cls.__name__.upper() else [])]):
            yield name, cls


def _spellings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(spelling for name in names for spelling in (name, name.upper())))


def _state_section(cls: type[Distiller], module: ModuleType, reads: tuple[str, ...]) -> None:
    """Set the configuration section and the defaults (``DEFAULTS``) of a class that declares no section."""
    defaults = getattr(module, "DEFAULTS", None)
    if "section" in vars(cls) or (defaults is None and "__init__" not in vars(cls)):  # its own, or its parent's
        return
    sections = list(dict.fromkeys(key.split(".")[0] for key in reads))
    likely = [s for s in sections if s.upper() in (cls.__name__.upper(), module.__name__.split(".")[-1].upper())]
    cls.section = (likely or [cls.__name__])[0]
    cls.defaults = defaults


def _check_defaults(defaults: Any, path: Path, name: str = "DEFAULTS") -> None:
    if not (isinstance(defaults, dict) and all(isinstance(key, str) for key in defaults)):
        raise InputError(f"method file {path}: {name} must be a dictionary from texts to values, not {defaults!r:.80}")
    for key, value in defaults.items():
        kinds = (Option, bool, int, float, str, list, tuple, type(None))
        if isinstance(value, dict):
            _check_defaults(value, path, f"{name}[{key!r}]")
        elif not isinstance(value, kinds):
            raise InputError(
                f"method file {path}: {name}[{key!r}] is {value!r:.80}; a default is a number, a text, a list, True, "
                "False, None, or an Option"
            )


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise InputError(f"no method file {path}; paths in DISTILLER.PLUGINS are relative to {Path.cwd()}") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read method file {path}: {error}") from None


def _execute(path: Path, tree: ast.Module) -> ModuleType:
    """Execute a file as a module of the package, after the helpers beside the file."""
    name = _module_name(path)
    if name in sys.modules:
        raise InputError(f"method file {path}: a file of this name is loaded already, {sys.modules[name].__file__}")
    for _, helper in _helpers(tree, path):
        if not _is_loaded(helper):
            _execute(helper, _parse(helper))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        _resolve_imports(tree, path)
        tree.body = [node for node in tree.body if not _is_dispensable(node, tree)]
        exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise InputError(f"method file {path}{_line_of(error, path)}: {type(error).__name__}: {error}") from error
    return module


def _module_name(path: Path) -> str:
    """``mdistiller.distillers.STEM``; with a hash of the path if the package has a file of this name."""
    stem = path.stem.replace(".", "_")
    if path.parent != FOLDER and (FOLDER / path.name).is_file():
        stem = f"{stem} {hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    return f"{PACKAGE}.{stem}"


def _helpers(tree: ast.Module, path: Path) -> list[tuple[ast.ImportFrom, Path]]:
    """Imports that need a helper: a file beside ``path``, or in the folder above for imports with two dots.

    These are imports from the package of a module that the package lacks, or of a name that its module lacks.
    """
    helpers = []
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and path.parent != FOLDER]:
        for stem in _stems_in_package(node):
            beside = (path.parent.parent if node.level == 2 else path.parent) / f"{stem}.py"
            if beside != path and beside.is_file() and not _provides(stem, node):
                helpers.append((node, beside))
    return helpers


def _stems_in_package(node: ast.ImportFrom) -> list[str]:
    """``["KD"]`` of ``from .KD import ...``, and of ``from ..KD import ...`` in a file of a sub-folder."""
    module = node.module or ""
    if node.level == 1:
        return [module] if module else [alias.name for alias in node.names]
    if node.level == 2 and module and "." not in module and not _is_module(FOLDER.parent / module):
        return [module]
    return [module.removeprefix(f"{PACKAGE}.")] if not node.level and module.startswith(f"{PACKAGE}.") else []


def _is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def _provides(stem: str, node: ast.ImportFrom) -> bool:
    """Whether the package's module has all imported names."""
    if not (FOLDER / f"{stem}.py").is_file():
        return False
    module = importlib.import_module(f"{PACKAGE}.{stem}")
    return node.module is None or all(alias.name == "*" or hasattr(module, alias.name) for alias in node.names)


def _resolve_imports(tree: ast.Module, path: Path) -> None:
    """Change a file's imports such that they find helpers and modules of the package."""
    names = {node: _module_name(helper) for node, helper in _helpers(tree, path)}
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]:
        if node in names:
            node.module, node.level = names[node], 0
        elif node.level == 2 and _stems_in_package(node):
            node.level = 1


def _is_loaded(path: Path) -> bool:
    module = sys.modules.get(_module_name(path))
    return module is not None and Path(module.__file__) == path


def _is_dispensable(node: ast.stmt, tree: ast.Module) -> bool:
    """Whether a statement is an import that fails and whose names the file never uses."""
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return False
    bound = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if "*" in bound or bound & {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}:
        return False
    try:
        exec(compile(ast.Module([node], []), "<import>", "exec", dont_inherit=True), {"__package__": PACKAGE})
    except ImportError as error:
        warn(f"import left out, because it fails and is not used: {ast.unparse(node)} ({error})")
        return True
    return False


def _line_of(error: BaseException, path: Path) -> str:
    """``", line 12"``: the innermost line of the file in an error's traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


# Facts of a file, read without executing it


def _declared_names(path: Path) -> list[str]:
    """Names of classes with a base, and names registered as literals; empty for a file that cannot be read."""
    try:
        tree = _parse(path)
    except InputError:
        return []
    names = [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    for node in ast.walk(tree):
        key = None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register_distiller" and node.args:
            key = node.args[0]
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == "distiller_dict":
            key = node.slice
        if isinstance(key, ast.Constant):
            names.append(str(key.value))
    return names


def _config_reads(tree: ast.Module, path: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """:attr:`MethodFile.reads` and :attr:`MethodFile.required` of a file and its helpers."""
    everywhere, required = _Reads(["cfg"]), {}
    for _, helper in _helpers(tree, path):
        reads, of_helper = _config_reads(_parse(helper), helper)
        everywhere.keys |= dict.fromkeys(reads)
        required |= of_helper
    for cls in [node for node in tree.body if isinstance(node, ast.ClassDef)]:
        for function in [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]:
            parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            visitor = _Reads(["cfg", *parameters[3:4]])  # self, student, teacher, cfg
            for statement in function.body:
                visitor.visit(statement)
            required[cls.name] = tuple(visitor.always)
            everywhere.config_names |= visitor.config_names
    everywhere.visit(tree)
    return tuple(everywhere.keys), required


BRANCHES = (ast.If, ast.IfExp, ast.While, ast.For, ast.Try, ast.BoolOp, ast.FunctionDef, ast.Lambda)


class _Reads(ast.NodeVisitor):
    """Collects ``cfg.A.B`` and ``self.cfg.A.B``; in ``always`` only those outside of branches and inner functions."""

    def __init__(self, config_names: list[str]) -> None:
        self.config_names = set(config_names)
        self.keys: dict[str, None] = {}
        self.always: dict[str, None] = {}
        self.branches = 0

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, BRANCHES):
            self._visit_branch(node)
        else:
            super().visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._record(node)

    def visit_Call(self, node: ast.Call) -> None:
        inner = node.func.value if isinstance(node.func, ast.Attribute) else node.func  # cfg.A.items() reads cfg.A
        for part in (inner, *node.args, *node.keywords):
            self.visit(part)

    def _record(self, node: ast.Attribute) -> None:
        root, parts = attribute_path(node)
        if not isinstance(root, ast.Name):
            self.visit(root)
            return
        if root.id == "self" and parts[0] in self.config_names:
            parts = parts[1:]
        elif root.id not in self.config_names:
            return
        if parts and isinstance(node.ctx, ast.Load):
            self.keys[".".join(parts)] = None
            if not self.branches:
                self.always[".".join(parts)] = None

    def _visit_branch(self, node: ast.AST) -> None:
        if isinstance(node, (ast.If, ast.IfExp, ast.While)):
            self.visit(node.test)
        self.branches += 1
        self.generic_visit(node)
        self.branches -= 1
