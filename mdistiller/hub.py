"""Fetch mdistiller's public teachers: download, check, unpack into ``download_ckpts/``.

python -m mdistiller.hub [cifar_teachers ...] [--root DIR] [--list] [--verify] [--overwrite]

A download is resumed where it broke off, as long as the server still holds the same file. Nothing that it
brought is trusted: a member of the tar is unpacked only if it is the file of a known teacher, and takes its
place only once it has been read without executing anything and compared with its model. The teachers are
files of the old torch format, which carry no checksum: where none is known from elsewhere either
(:data:`KNOWN_SHA256`), damage that leaves names, shapes and finite values alone goes unnoticed.

``MDISTILLER_CKPT_URL`` names a mirror: the address of a folder that holds the tars.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import http.client
import json
import os
import shutil
import socket
import sys
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import torch

import mdistiller.models  # noqa: F401  fills the model tables
from mdistiller.engine.build import TEACHER_RELEASE
from mdistiller.engine.cli import command
from mdistiller.engine.folder.checkpoint import CheckpointError, check_fit, load_weights
from mdistiller.models._registration import checkpoint_root
from mdistiller.registry import MODEL_FAMILIES, InputError, Registry

MIRROR_VARIABLE = "MDISTILLER_CKPT_URL"
RELEASE_FILES = TEACHER_RELEASE.replace("/tag/", "/download/")

MAX_BYTES = 4 << 30  # of a download, of one member of a tar, of all of them; the CIFAR teachers are 364 MB
MAX_MEMBERS = 10_000
BLOCK = 512  # a tar's unit, bytes


class PublicTeachers(NamedTuple):
    """A folder under ``download_ckpts/`` and the tar that it comes from.

    Attributes:
        family: key of ``MODEL_FAMILIES``, whose table names the files.
        num_classes: what the teachers were trained to tell apart.
        megabytes: size of the tar; 0: mdistiller's release is not known to hold one.
    """

    family: str
    num_classes: int
    megabytes: int


COLLECTIONS = Registry(
    "collection of teachers",
    {
        "cifar_teachers": PublicTeachers("cifar", 100, 364),
        "tiny_imagenet_teachers": PublicTeachers("tiny_imagenet", 200, 0),
    },
)

# Of the tars and, by path under download_ckpts/, of the files in them. The release publishes none. This one was
# published, independently, by a project that took the file from the release's tar and by one that took it from
# RepDistiller's server.
KNOWN_SHA256 = {
    "cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth": (
        "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"
    ),
}


class DownloadError(InputError):
    """A file that cannot be had from where it should be."""


class ArchiveError(InputError):
    """A tar that is damaged, not to be trusted, or holds something else than it should."""


def download(
    url: str,
    path: str | os.PathLike[str],
    sha256: str | None = None,
    *,
    timeout: float = 30.0,
    attempts: int = 6,
    pause: float = 2.0,
    max_bytes: int = MAX_BYTES,
) -> str:
    """Download ``url`` to ``path``, going on where an earlier try, or an earlier call, broke off.

    What has come so far lies in ``PATH.part``. It is continued only where the server confirms, by ETag or date,
    that its file is still the same; else it is fetched anew. ``path`` appears when everything is there.

    Args:
        url: http or https; redirects are followed, but not from https to http.
        path: replaced when the download is complete.
        sha256: what the file's SHA-256 must be, in hexadecimal.
        timeout: seconds without a byte after which a connection counts as stalled.
        attempts: tries until giving up; what came so far is kept.
        pause: seconds before the second try; doubles with each, up to 30.
        max_bytes: a larger file is refused.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        DownloadError: the server refused, or kept failing; the file is not the one expected.
        InputError: the disk is full or not writable.
    """
    path = Path(path)
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"cannot download {url!r}: an address that begins with http:// or https:// is needed")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with _Part.locked(path) as part:
        if part.version.get("url") != url:
            part.restart({})
        for attempt in range(1, attempts + 1):
            problem = _attempt(url, part, timeout, max_bytes)
            if problem is None:
                return part.finish(url, sha256)
            if attempt == attempts:
                break
            delay = min(pause * 2 ** (attempt - 1), 30.0)
            print(f"{url}: {problem}; trying again in {delay:g} s", file=sys.stderr, flush=True)
            time.sleep(delay)
        kept = f"; {part.size / 1e6:.1f} MB are kept, a new call goes on from there" if part.resumable else ""
        raise DownloadError(f"cannot download {url}: {problem}, {attempts} times in a row{kept}")


def _attempt(url: str, part: _Part, timeout: float, max_bytes: int) -> str | None:
    """One request. ``None``: the file is complete; else why not, where trying again may help."""
    if part.complete:  # stopped between the last byte and the renaming
        return None
    headers = {"User-Agent": "mdistiller", "Accept-Encoding": "identity"}
    if part.resumable:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": part.version["validator"]}
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(_Redirects).open(request, timeout=timeout) as response:
            problem = _begin(url, response, part, max_bytes)
            if problem is not None:
                return problem
            for chunk in _chunks(response, part, max_bytes, url):
                part.append(chunk)
    except urllib.error.HTTPError as error:
        error.close()
        problem = f"HTTP status {error.code} {' '.join(str(error.msg).split())}"
        if error.code == 416:  # what we have is not a beginning of what is there now
            part.restart({})
        elif error.code < 500 and error.code not in (408, 425, 429):
            raise DownloadError(f"cannot download {url}: {problem}") from None
        return problem
    except http.client.InvalidURL as error:
        raise DownloadError(f"cannot download {url!r}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or str(error) or type(error).__name__
        if _is_unreachable(error) and not part.received:
            raise DownloadError(f"cannot reach {url}: {reason}") from None
        return f"no data for {timeout:g} s" if _is_stall(error) else f"the connection broke ({reason})"
    length = part.version.get("length")
    if length is not None and part.size != length:
        return f"the connection ended after {part.size} of {length} bytes"
    return None


def _begin(url: str, response: Any, part: _Part, max_bytes: int) -> str | None:
    """Compare the answer's header with what is there already; empties ``part`` unless it is being continued."""
    if response.headers.get_content_type() == "text/html":
        raise DownloadError(f"{url} answers with a web page instead of the file (a proxy or a login?)")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url} comes compressed ({response.headers['Content-Encoding']}), which was not asked for")
    version = _version_of(url, response)
    if response.status == 206:
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
        # a mirror's machines need not agree on more than the name of the file
        if start != str(part.size) or version != part.version:
            part.restart({})
            return "the file on the server has changed"
    else:
        part.restart(version)
    length = version["length"]
    if length is not None and length > max_bytes:
        raise DownloadError(f"{url} is {length / 1e6:.0f} MB; at most {max_bytes / 1e6:.0f} MB are accepted")
    part.need(length)
    return None


def _version_of(url: str, response: Any) -> dict[str, Any]:
    """What tells this version of the file from others: address, validator, length in bytes."""
    etag = response.headers.get("ETag")
    if etag is None or etag.startswith("W/"):  # weak: the same meaning, not the same bytes
        etag = response.headers.get("Last-Modified")
    length = response.headers.get("Content-Length")
    if response.status == 206:
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    return {"url": url, "validator": etag, "length": int(length) if length and length.isdigit() else None}


def _chunks(response: Any, part: _Part, max_bytes: int, url: str) -> Iterator[bytes]:
    """The answer's bytes as they come, with a progress bar where somebody watches."""
    from tqdm import tqdm

    length = part.version["length"]
    with tqdm(
        desc=part.path.name,
        total=length,
        initial=part.size,
        unit="B",
        unit_scale=True,
        disable=None,  # nothing where standard error is a file
    ) as bar:
        while part.size != length:
            chunk = response.read1(1 << 18)
            if not chunk:
                return
            if part.size + len(chunk) > max_bytes:
                raise DownloadError(f"{url} is larger than the {max_bytes / 1e6:.0f} MB that are accepted")
            yield chunk
            bar.update(len(chunk))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects (ten at most) to http and https, never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = (urllib.parse.urlsplit(url).scheme for url in (req.full_url, newurl))
        if new not in ("http", "https") or (old, new) == ("https", "http"):
            raise urllib.error.HTTPError(req.full_url, code, f"redirect to {newurl} refused", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_stall(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError)


def _is_unreachable(error: BaseException) -> bool:
    """Whether there is no way to the server at all: no such name, no route, nobody listening."""
    reason = getattr(error, "reason", error)
    unreachable = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return isinstance(reason, socket.gaierror) or getattr(reason, "errno", None) in unreachable


class _Part:
    """The bytes that have come so far, in ``PATH.part``, and in ``PATH.part.json`` which file's they are.

    Attributes:
        path: what the download is to become.
        size: bytes.
        received: bytes of them that came in this call.
        version: see :func:`_version_of`; empty where nothing has come.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file
        self._record = path.with_name(f"{path.name}.part.json")
        self.size = file.seek(0, os.SEEK_END)
        self.received = 0
        self.version: dict[str, Any] = {}
        with suppress(OSError, ValueError, TypeError):
            self.version = dict(json.loads(self._record.read_text()))

    @classmethod
    @contextmanager
    def locked(cls, path: Path) -> Iterator[_Part]:
        """Open what there is for ``path``; a second download of it at the same time is refused."""
        name = path.with_name(f"{path.name}.part")
        with _writing(path):
            # unbuffered: on a full disk, closing would try to write once more
            file = open(name, "a+b", buffering=0)  # noqa: SIM115  closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                busy = os.fstat(file.fileno()).st_ino != os.stat(name).st_ino  # it has just been finished
            except (BlockingIOError, FileNotFoundError):
                busy = True
            except OSError:
                busy = False  # a file system without locks
            if busy:
                raise DownloadError(f"{path} is being downloaded already, by another process")
            part = cls(path, file)
            try:
                yield part
            finally:
                if part.size == 0:
                    name.unlink(missing_ok=True)
                    part._record.unlink(missing_ok=True)

    @property
    def resumable(self) -> bool:
        return self.size > 0 and bool(self.version.get("validator"))

    @property
    def complete(self) -> bool:
        return self.resumable and self.size == self.version.get("length")

    def restart(self, version: dict[str, Any]) -> None:
        """Throw away what has come; what comes next belongs to ``version``."""
        self.version, self.size = version, 0
        with _writing(self.path):
            self._record.unlink(missing_ok=True)  # first, or a crash here would leave it with other bytes
            self._file.truncate(0)
            if version.get("validator"):
                self._record.write_text(json.dumps(version))

    def need(self, length: int | None) -> None:
        """Refuse at once what will not fit on the disk."""
        missing = (length or 0) - self.size
        if missing > shutil.disk_usage(self.path.parent).free:
            raise InputError(_disk_full(self.path, missing))

    def append(self, chunk: bytes) -> None:
        with _writing(self.path):
            rest = memoryview(chunk)
            while rest:
                written = self._file.write(rest)
                rest = rest[written:]
                self.size += written
                self.received += written

    def finish(self, url: str, expected: str | None) -> str:
        """Move the complete file into its place. Returns its SHA-256."""
        with _writing(self.path):
            os.fsync(self._file.fileno())
            self._file.seek(0)
            digest = _sha256(self._file)
            part = Path(self._file.name)
            if expected is not None and digest != expected.lower():
                part.unlink()
                self._record.unlink(missing_ok=True)
                raise DownloadError(f"{url} is not the file expected: its SHA-256 is {digest}, not {expected}")
            os.replace(part, self.path)
            self._record.unlink(missing_ok=True)
        return digest


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into a message that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(_disk_full(path)) from None
        raise InputError(f"cannot write {error.filename or path}: {error.strerror or error}") from None


def _disk_full(path: Path, missing: int = 0) -> str:
    more = f"{missing / 1e6:.0f} MB more are needed and " if missing else ""
    free = shutil.disk_usage(path.parent).free / 1e6
    return f"no space left to write {path}: {more}{free:.0f} MB are free; make room and run the command again"


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def unpack(
    tar: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    wanted: Collection[str] | None = None,
    *,
    overwrite: bool = False,
    check: Callable[[Path, str], object] | None = None,
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
        check: called with each file under its temporary name and its path in the tar; what it raises of
            ``CheckpointError`` keeps that file out. A file that is there and differs is checked where it is.

    Returns:
        By path: ``"new"``, ``"same"`` (was there), ``"replaced"`` or ``"kept"`` (was there, and differs).

    Raises:
        ArchiveError: the tar is refused; or ``check`` refused files, after all others were unpacked.
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
            except CheckpointError as error:
                refused.append(f"{name} in {tar} is refused and not unpacked: {error}")
    if refused:
        raise ArchiveError("\n".join(refused))
    return done


@contextmanager
def _open_tar(tar: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(tar, "r:") as archive:
            yield archive
    except InputError:
        raise
    except OSError as error:
        raise ArchiveError(f"cannot read {tar}: {error}") from None
    except (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, MemoryError) as error:
        raise ArchiveError(f"{tar} is damaged or no (uncompressed) tar: {error}") from None


def _safe_members(archive: tarfile.TarFile, tar: Path) -> dict[str, tarfile.TarInfo]:
    """The files of a tar by path, if all its members are harmless.

    Raises:
        ArchiveError: names the first member that is not.
    """
    size_of_tar = tar.stat().st_size
    members: dict[str, tarfile.TarInfo] = {}
    total = end = 0
    for count, member in enumerate(archive, start=1):
        path = PurePosixPath(member.name)
        problem = _problem(member, path, size_of_tar)
        total += member.size
        if problem is None and (total > MAX_BYTES or count > MAX_MEMBERS):
            problem = f"more than {MAX_BYTES / 1e9:.0f} GB or {MAX_MEMBERS} members"
        if problem is None and str(path) in members:
            problem = "it is there twice"
        if problem is not None:
            raise ArchiveError(f"{tar} is refused, nothing was unpacked: member {member.name[:200]!r}: {problem}")
        end = member.offset_data
        if member.isfile():
            members[str(path)] = member
            end += -(-member.size // BLOCK) * BLOCK
    with open(tar, "rb") as file:  # tarfile takes a damaged header for the end
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise ArchiveError(f"{tar} is damaged or cut short at byte {end}; nothing was unpacked")
    return members


def _problem(member: tarfile.TarInfo, path: PurePosixPath, size_of_tar: int) -> str | None:
    """What is wrong with a member, judged by its header."""
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


def _place(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    folder: Path,
    name: str,
    overwrite: bool,
    check: Callable[[Path, str], object] | None,
) -> str:
    """Bring one file into its place; see :func:`unpack` for arguments and for what comes back."""
    target = folder / name
    there = target.is_file()
    if there:
        with _member_file(archive, member) as source:
            same = target.stat().st_size == member.size and file_sha256(target) == _sha256(source)
        if same or not overwrite:
            if check is not None:
                check(target, name)
            return "same" if same else "kept"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file, _member_file(archive, member) as source:
                shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check(temporary, name)
        with _writing(target):
            os.replace(temporary, target)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(temporary), str(target))) from None
    finally:
        temporary.unlink(missing_ok=True)
        _prune(target.parent, folder)
    return "replaced" if there else "new"


def _member_file(archive: tarfile.TarFile, member: tarfile.TarInfo) -> BinaryIO:
    file = archive.extractfile(member)
    assert file is not None, "a regular file, by _safe_members"
    return file  # type: ignore[return-value]


def _prune(path: Path, folder: Path) -> None:
    """Remove ``path`` and its parents below ``folder``, as far as they are empty."""
    with suppress(OSError):
        while path != folder:
            path.rmdir()
            path = path.parent


def teacher_files(collection: str) -> dict[str, str]:
    """The model's name by the path of its file under ``download_ckpts/``."""
    files = {}
    for name, entry in MODEL_FAMILIES[COLLECTIONS[collection].family].items():
        path = Path(entry[1]) if isinstance(entry, tuple) and entry[1] else None
        if path is not None and collection in path.parts:
            files["/".join(path.parts[path.parts.index(collection) :])] = name
    return files


def check_teacher(path: str | os.PathLike[str], collection: str, file: str) -> str:
    """Read a teacher's file and compare it with its model and with its checksum, where one is known.

    Args:
        path: where it lies now.
        collection: a key of :data:`COLLECTIONS`.
        file: its path under ``download_ckpts/``.

    Returns:
        A line that says what it is.

    Raises:
        CheckpointError: it is damaged, of another model or other classes, or not the public file.
    """
    path, teachers, name = Path(path), COLLECTIONS[collection], teacher_files(collection)[file]
    digest = file_sha256(path)
    known = KNOWN_SHA256.get(file)
    if known is not None and digest != known:
        raise CheckpointError(
            f"checkpoint {path} is not the public teacher {name}: its SHA-256 is {digest}, the public file's {known}"
        )
    state = load_weights(path)
    with torch.device("meta"):  # shapes without memory
        own = MODEL_FAMILIES[teachers.family][name][0](num_classes=teachers.num_classes).state_dict()
    _check_classes(path, own, state, f"{name} of {collection}")
    check_fit(own, state, f"checkpoint {path} for {name}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"checkpoint {path} for {name} holds numbers that are not finite, in {broken[0]}")
    size = path.stat().st_size / 1e6
    return f"{name}: {file}, {size:.1f} MB, {teachers.num_classes} classes, sha256 {digest} ({_standing(known)})"


def _check_classes(path: Path, own: dict[str, Any], state: dict[str, Any], what: str) -> None:
    """Say that a file has other classes, instead of which shapes differ."""
    classifier = [key for key, value in own.items() if value.ndim == 2][-1]
    if classifier in state and state[classifier].shape[1:] == own[classifier].shape[1:]:
        found, expected = len(state[classifier]), len(own[classifier])
        if found != expected:
            raise CheckpointError(f"checkpoint {path} has {found} classes, {what} has {expected}")


def default_root() -> Path:
    """The folder that configurations look for public teachers in."""
    return checkpoint_root() / "download_ckpts"


def fetch_teachers(
    collection: str = "cifar_teachers",
    root: str | os.PathLike[str] | None = None,
    mirror: str | None = None,
    *,
    overwrite: bool = False,
    **how: Any,
) -> list[Path]:
    """Bring a collection's files into ``root``, each of them checked; prints a line for each.

    Files that are there already are checked and kept; where all are, nothing is downloaded. A tar that lies in
    ``root`` already, put there by hand, is used and kept; a downloaded one is deleted in the end.

    Args:
        collection: a key of :data:`COLLECTIONS`.
        root: gets the collection as a folder; default: :func:`default_root`.
        mirror: address of a folder that holds the tar; default: ``MDISTILLER_CKPT_URL``, else mdistiller's release.
        overwrite: fetch all files anew and replace those that are there.
        how: see :func:`download`.

    Returns:
        The teachers' files.

    Raises:
        DownloadError: with how to get the tar by hand.
        ArchiveError: the tar is refused, or something in it is no teacher.
        CheckpointError: a file that was there before is not right, and ``overwrite`` is off.
    """
    root = Path(root) if root is not None else default_root()
    files = teacher_files(collection)
    wanted = dict(files)
    if not overwrite and any((root / file).is_file() for file in files):
        verify_teachers(collection, root)
        wanted = {file: name for file, name in files.items() if not (root / file).is_file()}
    if wanted:
        tar = root / f"{collection}.tar"
        by_hand = tar.is_file()
        if not by_hand:
            _download_tar(collection, tar, mirror, how)
        try:
            _unpack_teachers(collection, tar, root, wanted)
        except ArchiveError as error:
            advice = f"delete {tar} and" if by_hand else "the tar is deleted;"
            raise ArchiveError(f"{error}\n{advice} run the command again") from None
        finally:
            if not by_hand:
                tar.unlink(missing_ok=True)
    return [root / file for file in files if (root / file).is_file()]


def _unpack_teachers(collection: str, tar: Path, root: Path, wanted: dict[str, str]) -> None:
    """Unpack the files of ``wanted``, overwriting them, each only if it is the teacher it should be."""

    def check(path: Path, file: str) -> None:
        print(f"good     {check_teacher(path, collection, file)}", flush=True)

    digest, known = file_sha256(tar), KNOWN_SHA256.get(tar.name)
    print(f"{tar}: {tar.stat().st_size / 1e6:.1f} MB, sha256 {digest} ({_standing(known)})", flush=True)
    if known is not None and digest != known:
        raise ArchiveError(f"{tar} is not the public file: its SHA-256 is {digest}, the public file's {known}")
    done = unpack(tar, root, wanted, overwrite=True, check=check)
    if not done:
        raise ArchiveError(f"{tar} holds none of {', '.join(wanted)}")
    for file, name in wanted.items():
        if file not in done:
            print(f"missing  {name}: {file} is not in the tar", flush=True)


def _standing(known: str | None) -> str:
    return "no known checksum" if known is None else "as published"


def _download_tar(collection: str, tar: Path, mirror: str | None, how: dict[str, Any]) -> None:
    """Download a collection's tar, or say how to get it by hand."""
    base = mirror or os.environ.get(MIRROR_VARIABLE)
    hint = (
        f"By hand: put {tar.name} at {tar} and run the command again. "
        f"Or set {MIRROR_VARIABLE} to the address of a folder that holds {tar.name}"
    )
    if not base and not COLLECTIONS[collection].megabytes:
        raise DownloadError(f"mdistiller's release is not known to hold {tar.name} ({TEACHER_RELEASE}). {hint}")
    url = f"{(base or RELEASE_FILES).rstrip('/')}/{tar.name}"
    size = f" ({COLLECTIONS[collection].megabytes} MB)" if COLLECTIONS[collection].megabytes else ""
    print(f"downloading {url}{size}", flush=True)
    try:
        download(url, tar, KNOWN_SHA256.get(tar.name), **how)
    except DownloadError as error:
        raise DownloadError(f"{error}\nThe release page: {TEACHER_RELEASE}. {hint}") from None


def verify_teachers(collection: str, root: str | os.PathLike[str] | None = None) -> int:
    """Check the files that are there; prints a line for each.

    Args:
        collection: a key of :data:`COLLECTIONS`.
        root: see :func:`fetch_teachers`.

    Returns:
        How many are there.

    Raises:
        CheckpointError: names every file that is not right.
    """
    root = Path(root) if root is not None else default_root()
    wrong, count = [], 0
    for file, name in teacher_files(collection).items():
        if not (root / file).is_file():
            print(f"missing  {name}: {root / file}", flush=True)
            continue
        count += 1
        try:
            print(f"good     {check_teacher(root / file, collection, file)}", flush=True)
        except CheckpointError as error:
            wrong.append(str(error))
    if wrong:
        raise CheckpointError("\n".join([*wrong, "fetch again with --overwrite to replace it"]))
    return count


def _list(root: Path) -> None:
    for collection, teachers in COLLECTIONS.items():
        source = f"{teachers.megabytes} MB, {RELEASE_FILES}/{collection}.tar" if teachers.megabytes else "by hand only"
        print(f"{collection}: {source}")
        for file, name in teacher_files(collection).items():
            print(f"  {name:12}{'there' if (root / file).is_file() else 'missing':9}{root / file}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0; 130 where it was stopped from the keyboard."""
    parser = argparse.ArgumentParser(
        prog="python -m mdistiller.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collections", nargs="*", metavar="COLLECTION", help="default: cifar_teachers")
    parser.add_argument("--root", type=Path, metavar="DIR", help="default: download_ckpts beside the package")
    parser.add_argument("--list", action="store_true", help="what there is, and what of it lies in --root")
    parser.add_argument("--verify", action="store_true", help="only check the files that lie in --root")
    parser.add_argument("--overwrite", action="store_true", help="fetch anew what is there already, and replace it")
    args = parser.parse_args(arguments)
    root = args.root if args.root is not None else default_root()
    collections = args.collections or ["cifar_teachers"]
    for collection in collections:
        teacher_files(collection)  # a name that is not there is said before anything is downloaded
    if args.list:
        _list(root)
        return 0
    if args.verify:
        for collection in collections:
            if not verify_teachers(collection, root):
                raise InputError(f"none of {collection} lies in {root}; without --verify they are fetched")
        return 0
    try:
        for collection in collections:
            fetch_teachers(collection, root, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    command(main)
