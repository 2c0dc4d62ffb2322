"""Safe unpacking of untrusted tars."""

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
MAX_BYTES = 4 << 30  # of one member of a tar, and of all members together
MAX_MEMBERS = 10_000
BLOCK = 512  # bytes; a tar is a sequence of blocks


class ArchiveError(InputError):
    """A tar that cannot be unpacked completely."""


class BadArchiveError(ArchiveError):
    """A tar that is damaged, unsafe, or not the expected tar. Another copy is needed."""


def unpack(
    tar: StrPath,
    folder: StrPath,
    wanted: Collection[str] | None = None,
    *,
    overwrite: bool = False,
    check: Check = lambda path, name: None,
) -> dict[str, str]:
    """Unpack an untrusted plain (uncompressed) tar.

    All members are checked before a file is written. The whole tar is refused if one member has an absolute path,
    ``..`` in its path or a size above the tar's, or is a link or a device. Each file is written under a temporary
    name, checked and renamed.

    Args:
        tar: the archive.
        folder: the members' paths are relative to this folder; it is created if it is missing.
        wanted: the paths of the members to unpack; ``None``: all.
        overwrite: replace existing files that differ.
        check: called with the path of each file (its temporary name, or the existing file that is not replaced) and
            its path in the tar; an ``InputError`` refuses the file.

    Returns:
        For each path ``"new"``, ``"same"`` (the file exists and is equal), ``"replaced"`` or ``"kept"`` (the file
        exists and differs).

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
                raise ArchiveError(f"another process is unpacking {tar} already")
            with tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
    except InputError:
        raise
    except OSError as error:
        raise ArchiveError(f"cannot read {tar}: {error}") from None
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise BadArchiveError(f"{tar} is damaged or no (uncompressed) tar: {error}") from None


def _safe_members(archive: tarfile.TarFile, tar: Path) -> dict[str, tarfile.TarInfo]:
    """The files of a tar by path.

    Raises:
        BadArchiveError: names the first unsafe member.
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
            problem = "the tar holds this path twice"
        if problem is not None:
            raise BadArchiveError(f"{tar} is refused, nothing was unpacked: member {member.name[:200]!r}: {problem}")
        end = member.offset_data
        if member.isfile():
            members[str(path)] = member
            end += -(-member.size // BLOCK) * BLOCK
    archive.fileobj.seek(end)  # tarfile treats a damaged header as the end of the tar
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise BadArchiveError(f"{tar} is damaged or cut short at byte {end}; nothing was unpacked")
    return members


def _problem(member: tarfile.TarInfo, path: PurePosixPath, size_of_tar: int) -> str | None:
    """The fault in a member's header; ``None``: the member is safe."""
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
            # relative to a path without files, since links in the user's folder are not the tar's
            tarfile.data_filter(member, os.devnull)
        except tarfile.FilterError as error:
            return str(error)
    return None


def temporary_of(target: Path) -> Path:
    """The temporary name of a file that is being unpacked. A killed process leaves this file."""
    return target.with_name(f".{target.name}.tmp")


def _place(
    archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, name: str, overwrite: bool, check: Check
) -> str:
    """Unpack one file; see :func:`unpack` for the arguments and the result."""
    target = folder / name
    exists = target.is_file()
    if exists:
        with archive.extractfile(member) as source:
            same = target.stat().st_size == member.size and file_sha256(target) == sha256(source)
        if same or not overwrite:
            _approve(target, target, name, check)
            return "same" if same else "kept"
    temporary = temporary_of(target)  # no other process writes it, since this process has locked the tar
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
    return "replaced" if exists else "new"


def _approve(path: Path, target: Path, name: str, check: Check) -> None:
    """Check the file ``path``.

    Raises:
        ArchiveError: ``check`` refuses the file; the message names ``target``.
    """
    try:
        check(path, name)
    except InputError as error:
        raise ArchiveError(str(error).replace(str(path), str(target))) from None


def _prune(path: Path, folder: Path) -> None:
    """Remove ``path`` and its parents below ``folder`` while they are empty."""
    with suppress(OSError):
        while path != folder:
            path.rmdir()
            path = path.parent
