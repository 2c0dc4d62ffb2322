"""Checksums and locks of files, and messages for files that cannot be written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from .registry import InputError

StrPath = str | os.PathLike[str]
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers: the disk, the user's quota, a file's size


def sha256(file: BinaryIO, size: int = sys.maxsize) -> str:
    """The SHA-256 of an open file from its position to its end, or of the next ``size`` bytes, in hexadecimal."""
    digest = hashlib.sha256()
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        size -= len(chunk)
    return digest.hexdigest()


def file_sha256(path: StrPath) -> str:
    """The SHA-256 of a file, in hexadecimal.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return sha256(file)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


_locked: weakref.WeakSet[IO] = weakref.WeakSet()  # by this process


def _close_in_child() -> None:
    for file in _locked:
        file.close()


if hasattr(os, "register_at_fork"):  # a loader's worker may outlive this process and would keep its locks
    os.register_at_fork(after_in_child=_close_in_child)


def lock(file: IO) -> bool:
    """Lock an open file for this process, until the file is closed or this process ends.

    Forked children of this process close the file.

    Returns:
        ``False`` if another process holds the lock or has just removed the file. ``True`` if this process holds the
        lock, and if the system has no locks (Windows, some network disks).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locked.add(file)
        return os.fstat(file.fileno()).st_ino == os.stat(file.name).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks
        return True


def no_space(path: Path, needed: int = 0) -> str:
    """The start of a message: ``path`` cannot be written, since the disk is full or the quota is used up.

    Args:
        path: the file.
        needed: number of bytes to write; 0: not known.
    """
    free = shutil.disk_usage(path.parent).free
    figures = f"{free / 1e6:.1f} MB free"
    if needed:
        missing = f"{(needed - free) / 1e6:.1f} MB are missing" if needed > free else "a quota or limit is reached"
        figures = f"{needed / 1e6:.1f} MB needed, {figures}, {missing}"
    return f"no space left to write {path}: {figures}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a message that says what to do.

    Raises:
        InputError: the disk is full, or the path cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise InputError(f"{no_space(path)}; make room and run the command again") from None
        raise InputError(f"cannot write {error.filename or path}: {error.strerror or error}") from None
