"""Reading and writing checkpoints so that neither a crash nor a stranger's file does harm.

A file is written beside its final place, flushed to the disk and renamed, so that a name always holds a whole
checkpoint. Reading checks the CRC of each member of the archive first (``torch.load`` checks none), then
loads with ``weights_only=True``, which executes nothing. Weights are compared with the model, names and
shapes, before anything of the model is changed.
"""

from __future__ import annotations

import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError


class CheckpointError(InputError):
    """A checkpoint that is missing, damaged, not to be trusted or not of this model."""


def save_checkpoint(obj: Any, path: str | os.PathLike[str]) -> None:
    """Write ``obj`` with ``torch.save`` such that ``path`` holds either the old file or the whole new one."""
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Replace the content of ``path``: temporary file in the same folder, fsync, rename."""
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes it readable by the owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # or a power cut may undo the rename
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_checkpoint(path: str | os.PathLike[str]) -> Any:
    """The object that ``torch.save`` wrote to ``path``, on the CPU.

    Files of the archive format (torch 1.6 and later) are checked for damage, byte by byte; older files
    carry no checksum, and only their structure can be checked.

    Raises:
        CheckpointError: no such file, a damaged one, or one that would execute code when loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                bad_member = archive.testzip()
            if bad_member is not None:
                raise CheckpointError(f"checkpoint {path} is damaged: {bad_member} fails its checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain_unpickling(path, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint: {error}") from None


def _explain_unpickling(path: Path, error: Exception) -> str:
    if "Unsupported global" in str(error) or "GLOBAL" in str(error):
        reason = str(error).split("\n")[0][:300]
        return (
            f"checkpoint {path} holds more than tensors and plain values, and loading such a file may execute "
            f"code, so it is not loaded ({reason})"
        )
    return f"checkpoint {path} is damaged or no checkpoint: {str(error)[:300]}"


def load_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """A model's state dict from a file: ``{"model": state_dict}``, ``{"state_dict": ...}`` or the dict itself.

    ``module.`` in front of every key, as DataParallel writes it, is dropped.

    Raises:
        CheckpointError: see :func:`load_checkpoint`; or a file that holds no state dict.
    """
    content = load_checkpoint(path)
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not (isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values())):
        found = sorted(map(str, content))[:8] if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"checkpoint {path} holds no state dict under 'model'; found: {found}")
    if all(key.startswith("module.") for key in content):
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Compare names and shapes of ``state`` with those of the model's ``own``; changes nothing.

    Args:
        own: the state dict of the model that is to take the state.
        state: the state dict that was read.
        what: names the file and the model in the message.

    Raises:
        CheckpointError: lists what is missing, what is too much and which shapes differ.
    """
    missing = [key for key in own if key not in state]
    surplus = [key for key in state if key not in own]
    reshaped = [
        f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    problems = []
    for title, keys in (("missing", missing), ("not in the model", surplus), ("other shape", reshaped)):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            problems.append(f"{title}: {', '.join(keys[:4])}{more}")
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def load_into(model: nn.Module, path: str | os.PathLike[str], what: str) -> None:
    """Load a file's weights into ``model``, all or nothing.

    Args:
        model: takes the weights.
        path: see :func:`load_weights`.
        what: what the model is, for messages: ``"teacher resnet20"``.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
    """
    state = load_weights(path)
    check_fit(model.state_dict(), state, f"checkpoint {path} for {what}")
    model.load_state_dict(state)
