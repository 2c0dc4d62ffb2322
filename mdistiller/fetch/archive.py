"""Unpacking of tars that are not trusted: nothing that they say can do harm."""

from __future__ import annotations

import os
import shutil
import tarfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from mdistiller.files import StrPath, file_sha256, lock, sha256, writing
from mdistiller.registry import InputError

Check = Callable[[Path, str], object]
MAX_BYTES = 4 << 30  # of one member of a tar, and of all of them
MAX_MEMBERS = 10_000
BLOCK = 512  # a tar's unit, bytes


class ArchiveError(InputError):
    """A tar that cannot be unpacked, or not all of it."""


class BadArchiveError(ArchiveError):
    """A tar that is damaged, means harm or is another one than it should be: another copy is needed."""


def unpack(
    tar: StrPath,
    folder: StrPath,
    wanted: Collection[str] | None = None,
    *,
    overwrite: bool = False,
    check: Check = lambda path, name: None,
) -> dict[str, str]:
    """Unpack a plain (uncompressed) tar such that nothing it says can do harm.

    Before anything is written, all members are looked at: one with an absolute path or ``..``, a link, a device,
    a size beyond the tar's own, and the whole tar is refused. Each file is written beside its place, checked,
    and renamed.

    Args:
        tar: the archive.
        folder: what the members' paths are relative to; created where it is missing.
        wanted: the paths to unpack, as the tar names them; others are left in it. ``None``: all.
        overwrite: replace files that are there and differ.
        check: called with each file under its temporary name and its path in the tar; an ``InputError`` of it keeps
            that file out. A file that is there and is not replaced is checked where it is.

    Returns:
        By path: ``"new"``, ``"same"`` (was there), ``"replaced"`` or ``"kept"`` (was there, and differs).

    Raises:
        BadArchiveError: the tar is refused.
        ArchiveError: the tar cannot be read, or another process unpacks it; or ``check`` refused files, after all
            others were unpacked.
        InputError: the disk is full or not writable.
    """
    tar, folder = Path(tar), Path(folder)
    done: dict[str, str] = {}
    refused = []
    with _open_tar(tar) as archive:
        for name, member in _safe_members(archive, tar).items():
            if wanted is not None and name not in wanted:
                continue
            try:
                done[name] = _place(archive, member, folder, name, overwrite, check)
            except ArchiveError as error:
                refused.append(f"{name} in {tar} is refused and not unpacked: {error}")
    if refused:
        raise ArchiveError("\n".join(refused))
    return done


@contextmanager
def _open_tar(tar: Path) -> Iterator[tarfile.TarFile]:
    try:
        with open(tar, "rb") as file:
            if not lock(file):
                raise ArchiveError(f"{tar} is being unpacked already, by another process")
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
    except InputError:
        raise
    except OSError as error:
        raise ArchiveError(f"cannot read {tar}: {error}") from None
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise BadArchiveError(f"{tar} is damaged or no (uncompressed) tar: {error}") from None


def _safe_members(archive: tarfile.TarFile, tar: Path) -> dict[str, tarfile.TarInfo]:
    """The files of a tar by path, if all its members are harmless.

    Raises:
        BadArchiveError: names the first member that is not.
    """
    members: dict[str, tarfile.TarInfo] = {}
    total = end = 0
    for count, member in enumerate(archive, start=1):
        path = PurePosixPath(member.name)
        problem = _problem(member, path, tar.stat().st_size)
        total += member.size
        if problem is None and (total > MAX_BYTES or count > MAX_MEMBERS):
            problem = f"more than {MAX_BYTES / 1e9:.0f} GB or {MAX_MEMBERS} members"
        if problem is None and str(path) in members:
            problem = "it is there twice"
        if problem is not None:
            raise BadArchiveError(f"{tar} is refused, nothing was unpacked: member {member.name[:200]!r}: {problem}")
        end = member.offset_data
        if member.isfile():
            members[str(path)] = member
            end += -(-member.size // BLOCK) * BLOCK
    archive.fileobj.seek(end)  # tarfile takes a damaged header for the end
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise BadArchiveError(f"{tar} is damaged or cut short at byte {end}; nothing was unpacked")
    return members


def _problem(member: tarfile.TarInfo, path: PurePosixPath, size_of_tar: int) -> str | None:
    """The fault of a member, judged by its header; ``None``: it is harmless."""
    if path.is_absolute() or ".." in path.parts:
        return "its path leads out of the folder"
    if member.isfile() and not path.parts:
        return "it has no name"
    if not (member.isfile() or member.isdir()) or member.issparse():
        return "neither file nor folder"
    if member.size > MAX_BYTES:
        return f"{member.size / 1e9:.1f} GB, at most {MAX_BYTES / 1e9:.0f} GB are accepted"
    if member.offset_data + member.size > size_of_tar:
        return "it is cut short"
    if hasattr(tarfile, "data_filter"):  # Python 3.12, 3.11.4, 3.10.12
        try:
            # relative to a path that has nothing below it: links that the user set up are none of the tar's doing
            tarfile.data_filter(member, os.devnull)
        except tarfile.FilterError as error:
            return str(error)
    return None


def temporary_of(target: Path) -> Path:
    """Where a file is unpacked to before it takes its place; a kill leaves it behind."""
    return target.with_name(f".{target.name}.tmp")


def _place(
    archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str, overwrite: bool, check: Check
) -> str:
    """Bring one file into its place; see :func:`unpack` for arguments and for what comes back."""
    target = folder / name
    there = target.is_file()
    if there:
        with archive.extractfile(member) as source:
            same = target.stat().st_size == member.size and file_sha256(target) == sha256(source)
        if same or not overwrite:
            _approve(target, target, name, check)
            return "same" if same else "kept"
    temporary = temporary_of(target)  # this process's, which has locked the tar
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file, archive.extractfile(member) as source:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
        _approve(temporary, target, name, check)
        with writing(target):
            os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        _prune(target.parent, folder)
    return "replaced" if there else "new"


def _approve(path: Path, target: Path, name: str, check: Check) -> None:
    """Have a file checked that lies at ``path``, and call it ``target`` where it is refused.

    Raises:
        ArchiveError: ``check`` refuses it.
    """
    try:
        check(path, name)
    except InputError as error:
        raise ArchiveError(str(error).replace(str(path), str(target))) from None


def _prune(path: Path, folder: Path) -> None:
    """Remove ``path`` and its parents below ``folder``, as far as they are empty."""
    with suppress(OSError):
        while path != folder:
            path.rmdir()
            path = path.parent
