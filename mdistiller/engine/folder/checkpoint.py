"""Reading and writing of checkpoints, safe against crashes and untrusted files.

A checkpoint is written to a temporary file in the same folder, flushed to the disk and renamed. So a checkpoint's name
always holds a whole checkpoint. The file ends with a checksum of all its bytes. Reading compares the checksum first
(``torch.load`` compares none, see :mod:`.seal`), then loads with ``weights_only=True``, which executes no code. Names
and shapes of the weights are compared with the model before the model changes.

Besides tensors and plain values, files may hold numpy numbers and ``argparse.Namespace``, as the files of mdistiller
and RepDistiller do.
"""

from __future__ import annotations

import argparse
import copy
import errno
import io
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from mdistiller.files import DISK_FULL, StrPath, no_space
from mdistiller.messages import say
from mdistiller.registry import InputError, RunError

from .seal import fault, seal

State = Mapping[str, Tensor]  # a module's state dict


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, unsafe or not of this model."""


class SaveError(RunError):
    """A run's file cannot be written; an earlier file of this name is unchanged."""


class DiskFullError(SaveError):
    """A run's file cannot be written, since the disk is full."""


def save_checkpoint(obj: Any, path: StrPath, *, keep_previous: bool = False) -> None:
    """Write ``obj`` with ``torch.save`` such that ``path`` holds either the old file or the whole new one.

    The file ends with a checksum, which :func:`load_checkpoint` compares. Its tensors are on the CPU, so that a plain
    ``torch.load`` reads them on a machine without a GPU.

    Args:
        obj: tensors and plain values, nested.
        path: the file.
        keep_previous: keep the old file as :func:`previous` of ``path``.

    Raises:
        SaveError: see :func:`saving`.
    """
    buffer = io.BytesIO()
    torch.save(_on_cpu(obj), buffer)
    seal(buffer)
    write_atomically(path, buffer.getvalue(), keep_previous=keep_previous)


def _on_cpu(value: Any) -> Any:
    """``value`` with its tensors on the CPU; dictionaries keep their type and attributes, which state dicts have."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        moved = copy.copy(value)
        moved.update((key, _on_cpu(part)) for key, part in value.items())
        return moved
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def previous(path: StrPath) -> Path:
    """The path at which ``save_checkpoint(..., keep_previous=True)`` keeps the old file."""
    return Path(f"{path}_previous")


@contextmanager
def saving(path: Path, needed: int = 0, kept: str = "earlier files are intact") -> Iterator[None]:
    """Context of writing a run's file: an error of the file system becomes an error that says what to do.

    Args:
        path: the file.
        needed: number of bytes to write; 0: not known.
        kept: for the message: the state of the files after a failure.

    Raises:
        DiskFullError: says how much space is missing.
        SaveError: the folder does not exist any more, or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise DiskFullError(f"{no_space(path, needed)}; {kept}. Free space and continue with --resume") from None
        if not path.parent.is_dir():
            raise SaveError(
                f"cannot write {path}: its folder was deleted or renamed during the run; restore the folder and "
                "continue with --resume, or start again"
            ) from None
        raise SaveError(f"cannot write {path}: {error.strerror or error}; {kept}") from None


def write_atomically(path: StrPath, content: bytes | str, *, keep_previous: bool = False) -> None:
    """Replace the content of ``path``: temporary file in the same folder, fsync, read back, rename.

    Raises:
        SaveError: see :func:`saving`; ``path`` does not change.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    kept = f"the earlier {path.name} is intact" if path.exists() else "there was no earlier file"
    with saving(path, len(data), kept), _temporary_beside(path) as (handle, temporary):
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if Path(temporary).read_bytes() != data:
            raise OSError(errno.EIO, "the file's content differs from the written bytes", str(path))
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp lets only the owner read the file
        if keep_previous and path.exists():
            _link_over(path, previous(path))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power failure may undo the rename
        finally:
            os.close(folder)


@contextmanager
def _temporary_beside(path: Path) -> Iterator[tuple[int, str]]:
    """Handle and name of a new file in the same folder; it is removed after an error."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        yield handle, temporary
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def append(path: Path, text: str) -> None:
    """Append ``text`` to the file.

    Raises:
        SaveError: see :func:`saving`.
    """
    with saving(path, len(text.encode())), path.open("a", newline="") as file:
        file.write(text)


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of writes that a crash interrupted."""
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink()


def _link_over(source: Path, target: Path) -> None:
    """Make ``target`` another name of ``source``'s content, without a moment in which ``source`` is absent."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class _Dtype:
    """Replaces ``numpy.dtype``, and allows number types only: a file could make numpy read numbers as pointers."""

    def __init__(self, code: str, *_: object) -> None:
        if re.fullmatch(r"[biufc]\d{1,2}", code) is None:
            raise pickle.UnpicklingError(f"numpy data of type {code!r}; only numbers are read")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.value = self.value.newbyteorder(state[1])  # the rest of the state is for records only


class _Scalar:
    """Replaces ``numpy.core.multiarray.scalar``: one number from its bytes."""

    def __new__(cls, dtype: _Dtype, data: bytes) -> Any:
        return np.frombuffer(data, dtype.value, count=1)[0]


class _Array(np.ndarray):
    """Replaces ``numpy.ndarray``: empty for any arguments, until ``__setstate__`` sets shape and bytes."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, data = state
        array = np.frombuffer(data, dtype.value).reshape(shape)  # raises if the shape does not fit the bytes
        super().__setstate__((1, array.shape, array.dtype, bool(fortran_order), bytes(data)))


class _Reconstruct:
    """Replaces ``numpy.core.multiarray._reconstruct``: an empty array."""

    def __new__(cls, kind: type[_Array], *_: object) -> _Array:
        return kind.__new__(kind)


class _NoBytes:
    """Replaces ``bytes``: pickle writes empty bytes as a call of ``bytes()``."""

    def __new__(cls) -> Any:
        return b""


_HARMLESS_GLOBALS = {
    "argparse.Namespace": argparse.Namespace,
    "builtins.bytes": _NoBytes,
    "numpy.dtype": _Dtype,
    "numpy.ndarray": _Array,
    **{
        f"numpy.{core}.multiarray.{name}": stand_in
        for core in ("core", "_core")  # before and since numpy 2
        for name, stand_in in (("scalar", _Scalar), ("_reconstruct", _Reconstruct))
    },
}
_GLOBALS_LOCK = threading.Lock()  # all threads of a process share the list of allowed names


@contextmanager
def _harmless_globals() -> Iterator[None]:
    """Allow ``weights_only`` loading of the other objects in RepDistiller's and mdistiller's files.

    ``torch.serialization.safe_globals`` is not used: at its end it drops names that were allowed before, and with two
    objects of one name it is undefined which one counts.
    """
    with _GLOBALS_LOCK:
        before = torch.serialization.get_safe_globals()
        names = [
            entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in before
        ]
        others = [entry for entry, name in zip(before, names, strict=True) if name not in _HARMLESS_GLOBALS]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*others, *((what, name) for name, what in _HARMLESS_GLOBALS.items())])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def load_checkpoint(path: StrPath) -> Any:
    """The object that ``torch.save`` wrote to ``path``, on the CPU.

    All bytes of a file of the archive format (torch 1.6 and later) are checked. Older files, such as RepDistiller's,
    have no checksum, so only their structure is checked.

    Raises:
        CheckpointError: the file does not exist, is not readable, is damaged, or would execute code when it is loaded.
    """
    path = Path(path)
    with _opened(path) as file:
        try:
            return _read_safetensors(path) if path.suffix == ".safetensors" else _read(file, path)
        except CheckpointError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(_explain_unpickling(path, error)) from None
        except Exception:  # damaged bytes may cause any error: an early end, a huge allocation
            raise CheckpointError(_damaged(path)) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise CheckpointError(f'{path} needs safetensors: pip install -e ".[models]"') from None
    return load_file(path)


def _opened(path: Path) -> BinaryIO:
    try:
        not_a_folder(path)
        if path.is_file():
            return path.open("rb")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    raise CheckpointError(f"no checkpoint {path} (current folder: {Path.cwd()})")


def _read(file: BinaryIO, path: Path) -> Any:
    if not file.read(1):
        raise CheckpointError(f"checkpoint {path} is damaged: the file is empty; copy or download it again")
    if problem := fault(file):
        raise CheckpointError(_damaged(path, problem))
    if tarfile.is_tarfile(path):
        raise CheckpointError(f"checkpoint {path} is damaged or a tar archive, which must be unpacked first")
    file.seek(0)
    with _harmless_globals(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old formats
        return torch.load(file, map_location="cpu", weights_only=True)


def not_a_folder(path: Path) -> None:
    """Refuse a folder in place of a checkpoint.

    Raises:
        CheckpointError: names the final student in the folder, if it is a run's folder.
    """
    if path.is_dir():
        student = path / "student_last"
        hint = f"use {student}" if student.is_file() else "name a file in it"
        raise CheckpointError(f"checkpoint {path} is a folder; {hint}")


def _explain_unpickling(path: Path, error: Exception) -> str:
    # torch surrounds the reason with advice to load without the check
    reason = str(error.__context__ or error).split("\n")[0][:300]
    if "Unsupported global" in reason or "GLOBAL" in reason:
        return (
            f"checkpoint {path} holds other objects than tensors, numbers and plain values; loading them may "
            f"execute code, so the file is not loaded ({reason.split('. ')[0]})"
        )
    return _damaged(path)


def _damaged(path: Path, problem: str = "") -> str:
    detail = problem or f"{path.stat().st_size:,} bytes"
    return f"checkpoint {path} is damaged or no checkpoint ({detail}); copy or download it again"


def load_weights(path: StrPath, whole: bool = False) -> dict[str, Tensor]:
    """A model's state dict from a file: ``{"model": state_dict}``, ``{"state_dict": ...}`` or the dict itself.

    The prefix ``module.`` of all keys, which DataParallel writes, is removed. From the file of a distiller (``latest``,
    ``best``) only the student is returned.

    Args:
        path: the file.
        whole: return all of a distiller.

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or the file holds no state dict.
    """
    content = load_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not (isinstance(content, Mapping) and content and all(map(_is_entry, content, content.values()))):
        content = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"checkpoint {path} holds no state dict under 'model'; found: {content}")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    if _has_student(content) and not whole:  # latest, best: a whole distiller
        others = {key.split(".")[0] for key in content} - {"student", "teacher"}
        if others:
            say(f"{path} holds a whole method; only its student is loaded, without {', '.join(sorted(others))}")
        content = {key.removeprefix("student."): v for key, v in content.items() if key.startswith("student.")}
    return dict(content)


def _is_entry(key: Any, value: Any) -> bool:
    """Whether a key and a value are an entry of a state dict: a text and a dense tensor on the CPU."""
    return isinstance(key, str) and isinstance(value, Tensor) and value.is_cpu and value.layout == torch.strided


def _has_student(state: State) -> bool:
    return any(key.startswith("student.") for key in state)


def classes_of(own: State, state: State) -> int | None:
    """The number of classes of a state that differs from a network's in the classifier alone; ``None``: another state.

    Args:
        own: the state dict of the network.
        state: the state dict that was read.
    """
    resized = [key for key in own if key in state and own[key].shape != state[key].shape]
    same_inputs = all(own[key].shape[1:] == state[key].shape[1:] for key in resized)
    return len(state[resized[0]]) if resized and same_inputs and own.keys() == state.keys() else None


def check_weights(own: State, state: State, what: str, advice: Callable[[], str] = str, expected: str = "") -> None:
    """Refuse a state that does not fit a network or is not finite; changes nothing.

    Args:
        own: the state dict of the network, for names and shapes.
        state: the state dict from the file.
        what: names the file and the network in the message.
        advice: called if names or shapes differ; returns the message's advice. Default: none.
        expected: the end of the message for a state that differs in its number of classes only: the source of the
            network's classes, and advice (``"data set digits; take another teacher"``). Empty: no such message.

    Raises:
        CheckpointError: another number of classes, other names or shapes, or values that are not finite.
    """
    # A checkpoint of another data set differs in the classifier only; the message says so instead of listing shapes.
    if expected and (found := classes_of(own, state)):
        number = classes_of(state, own)
        raise CheckpointError(f"{what} has {found} classes, not the {number} of {expected}")
    check_fit(own, state, what, advice)
    if broken := not_finite(state):
        raise CheckpointError(
            f"{what} has values that are not finite, in {_listed(broken)}: its training failed, or the file is "
            "damaged; take another"
        )


def not_finite(state: State) -> list[str]:
    """The names of the tensors with an infinite value or NaN."""
    return [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]


def check_fit(expected: State, state: State, what: str, advice: Callable[[], str] = str) -> None:
    """Compare names, shapes and number types of ``state`` with those of ``expected``; changes nothing.

    Args:
        expected: the state dict of the model that is to load the state.
        state: the state dict from the file.
        what: names the file and the model in the message.
        advice: called if the states differ; returns the message's advice. Default: none.

    Raises:
        CheckpointError: lists missing names, surplus names, and shapes and number types that differ.
    """
    missing = [key for key in expected if key not in state]
    surplus = [key for key in state if key not in expected]
    reshaped = [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(expected[key].shape)}"
        for key in expected
        if key in state and expected[key].shape != state[key].shape
    ]
    retyped = [
        f"{key} is {state[key].dtype}, the model's {expected[key].dtype}"
        for key in expected
        if key in state and expected[key].is_floating_point() and not state[key].is_floating_point()
    ]
    groups = {"missing": missing, "not in the model": surplus, "other shape": reshaped, "other type": retyped}
    problems = [f"{title}: {_listed(keys)}" for title, keys in groups.items() if keys]
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(filter(None, [*problems, advice()]))}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def fingerprint(state: State) -> int:
    """A checksum of a state dict's names and values."""
    checksum = 0
    for key, value in state.items():
        checksum = zlib.crc32(key.encode(), checksum)
        checksum = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum


def load_into(model: nn.Module, path: StrPath, what: str) -> None:
    """Load a file's weights into ``model``. After an error the model is unchanged.

    Args:
        model: loads the weights.
        path: see :func:`load_weights`.
        what: the model's name in messages: ``"teacher resnet20"``.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
    """
    state = load_weights(path, whole=_has_student(model.state_dict()))
    check_fit(model.state_dict(), state, f"checkpoint {path} for {what}")
    model.load_state_dict(state)
