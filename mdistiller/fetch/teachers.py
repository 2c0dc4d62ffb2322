"""Fetch mdistiller's public teachers: download, check, unpack into ``download_ckpts/``.

python -m mdistiller.hub [cifar_teachers ...] [--root DIR] [--list] [--verify] [--overwrite]

An interrupted download continues at its last byte if the server still holds the same file. The downloaded
tar is not trusted: only files of known teachers are unpacked. Each file is read without executing code and
compared with its model before it gets its name. The teachers are files of torch's old format, which has no
checksum. Without a known checksum (KNOWN_SHA256 in mdistiller/fetch/teachers.py), damage that changes only
values, and keeps them finite, is not detected.

``MDISTILLER_CKPT_URL`` is the address of a mirror: a folder that holds the tars.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch

from mdistiller.engine.build import build_model
from mdistiller.engine.folder.checkpoint import CheckpointError, check_weights, load_weights
from mdistiller.files import StrPath, file_sha256, lock
from mdistiller.models import ModelEntry
from mdistiller.models._registration import COLLECTIONS, TEACHER_RELEASE, checkpoint_root, public_file
from mdistiller.registry import MODEL_FAMILIES, InputError

from .archive import ArchiveError, BadArchiveError, temporary_of, unpack
from .download import DownloadError, begun, download

MIRROR_VARIABLE = "MDISTILLER_CKPT_URL"
RELEASE_FILES = TEACHER_RELEASE.replace("/tag/", "/download/")

# By name of a tar or by path under download_ckpts/ of a file in a tar. The release publishes no checksums. Two projects
# published this one independently: one took the file from the release's tar, the other from RepDistiller's server.
KNOWN_SHA256 = {
    "cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth": (
        "22aa12e2b632b19ddde155ccf2388671842ddd304824b3095e0a7fff364beb4f"
    ),
}


def teacher_files(collection: str) -> dict[str, str]:
    """The names of a collection's models, by the path of the model's file under ``download_ckpts/``."""
    table = MODEL_FAMILIES[COLLECTIONS[collection].family]
    files = {public_file(ModelEntry.of(entry).weights): name for name, entry in table.items()}
    return {file: name for file, name in files.items() if file.startswith(f"{collection}/")}


def check_teacher(path: StrPath, collection: str, file: str) -> str:
    """Read a teacher's file and compare it with its model and, if there is one, with its known checksum.

    Args:
        path: of the file to read.
        collection: a key of ``COLLECTIONS``.
        file: the path of the public file under ``download_ckpts/``.

    Returns:
        A line that describes the file.

    Raises:
        CheckpointError: the file is damaged, of another model or other classes, or not the public file.
    """
    path, teachers, name = Path(path), COLLECTIONS[collection], teacher_files(collection)[file]
    checksum = _checksum(path, file, f"checkpoint {path} is not the public teacher {name}", CheckpointError)
    state = load_weights(path)
    with torch.device("meta"):  # shapes without memory
        expected = build_model(MODEL_FAMILIES[teachers.family], name, teachers.num_classes).state_dict()
    check_weights(expected, state, f"checkpoint {path} for {name}", expected=f"{name} of {collection}")
    return f"{name}: {file}, {path.stat().st_size / 1e6:.1f} MB, {teachers.num_classes} classes, {checksum}"


def _checksum(path: Path, name: str, problem: str, error: type[InputError]) -> str:
    """The SHA-256 of a file in words; an error if ``KNOWN_SHA256`` has another one for ``name``."""
    digest, known = file_sha256(path), KNOWN_SHA256.get(name)
    if known not in (None, digest):
        raise error(f"{problem}: its SHA-256 is {digest}, the public file's {known}")
    return f"sha256 {digest} ({'no known checksum' if known is None else 'as published'})"


def default_root() -> Path:
    """The folder in which configurations expect public teachers."""
    return checkpoint_root() / "download_ckpts"


def fetch_teachers(
    collection: str = "cifar_teachers",
    root: StrPath | None = None,
    mirror: str | None = None,
    *,
    overwrite: bool = False,
    **how: Any,
) -> list[Path]:
    """Download, check and unpack a collection's files below ``root``; prints a line for each file.

    Existing files are checked and kept; if all files exist, nothing is downloaded. A tar ``COLLECTION.tar`` that the
    user has put into ``root`` is used and kept. A downloaded tar, ``COLLECTION.downloaded.tar``, is deleted after its
    files are unpacked, or if it is damaged; if its files are refused, it is kept for the next call. The next successful
    call deletes the files that a killed call left.

    Args:
        collection: a key of ``COLLECTIONS``.
        root: gets the collection as a folder; default: :func:`default_root`.
        mirror: address of a folder that holds the tar; default: ``MDISTILLER_CKPT_URL``, else mdistiller's release.
        overwrite: download all files again and replace existing ones.
        how: further arguments of :func:`~mdistiller.fetch.download.download`.

    Returns:
        The teachers' files.

    Raises:
        DownloadError: the tar cannot be downloaded; says how to get it by hand.
        ArchiveError: the tar is refused, or one of its files is no teacher; says where the tar is.
        CheckpointError: an existing file is not the teacher's, and ``overwrite`` is off.
    """
    root = Path(root) if root is not None else default_root()
    files = teacher_files(collection)
    wanted = dict(files)
    if not overwrite and any((root / file).is_file() for file in files):
        verify_teachers(collection, root)
        wanted = {file: name for file, name in files.items() if not (root / file).is_file()}
    downloaded = root / f"{collection}.downloaded.tar"
    if wanted:
        tar = root / f"{collection}.tar"
        if not tar.is_file():
            tar = downloaded
            if overwrite or not tar.is_file():
                _download_tar(collection, tar, mirror, how)
        again = f"delete {tar} and run the command again"
        try:
            _unpack_teachers(collection, tar, root, wanted)
        except BadArchiveError as error:
            if tar == downloaded:
                tar.unlink(missing_ok=True)
                again = "the tar is deleted; run the command again"
            raise ArchiveError(f"{error}\n{again}") from None
        except ArchiveError as error:  # the cause may be this machine; then another download does not help
            raise ArchiveError(
                f"{error}\n{tar} is kept: remove the cause and run the command again, or, for another copy of the tar, "
                f"{again}"
            ) from None
    _tidy(root, collection, files)
    return [root / file for file in files if (root / file).is_file()]


def _tidy(root: Path, collection: str, files: Iterable[str]) -> None:
    """Remove files that this call or a killed call left: the downloaded tar, partial downloads, partly unpacked files.

    Nothing is removed while another process downloads or unpacks, or if the folder is not writable.
    """
    downloaded = root / f"{collection}.downloaded.tar"
    leftovers = [downloaded, *begun(downloaded), *(temporary_of(root / file) for file in files)]
    with suppress(OSError):
        with ExitStack() as stack:
            for path in (root / f"{collection}.tar", downloaded, begun(downloaded)[0]):
                if path.is_file() and not lock(stack.enter_context(path.open("rb"))):
                    return
        for path in leftovers:
            path.unlink(missing_ok=True)


def _unpack_teachers(collection: str, tar: Path, root: Path, wanted: dict[str, str]) -> None:
    """Unpack the files of ``wanted`` and replace existing ones, each only if it is the expected teacher."""

    def check(path: Path, file: str) -> None:
        print(f"good     {check_teacher(path, collection, file)}", flush=True)

    checksum = _checksum(tar, f"{collection}.tar", f"{tar} is not the public file", BadArchiveError)
    print(f"{tar}: {tar.stat().st_size / 1e6:.1f} MB, {checksum}", flush=True)
    done = unpack(tar, root, wanted, overwrite=True, check=check)
    if not done:
        raise BadArchiveError(f"{tar} holds none of {', '.join(wanted)}")
    for file, name in wanted.items():
        if file not in done:
            print(f"missing  {name}: {file} is not in the tar", flush=True)


def _download_tar(collection: str, tar: Path, mirror: str | None, how: dict[str, Any]) -> None:
    """Download a collection's tar to ``tar``, or say how to get it by hand."""
    base, name = mirror or os.environ.get(MIRROR_VARIABLE), f"{collection}.tar"
    megabytes = COLLECTIONS[collection].megabytes
    hint = (
        f"By hand: put {name} at {tar.with_name(name)} and run the command again. "
        f"Or set {MIRROR_VARIABLE} to the address of a folder that holds {name}"
    )
    if not base and not megabytes:
        raise DownloadError(f"mdistiller's release is not known to hold {name} ({TEACHER_RELEASE}). {hint}")
    url = f"{(base or RELEASE_FILES).rstrip('/')}/{name}"
    print(f"downloading {url}{f' ({megabytes} MB)' if megabytes else ''}", flush=True)
    try:
        download(url, tar, KNOWN_SHA256.get(name), **how)
    except DownloadError as error:
        raise DownloadError(f"{error}\nThe release page: {TEACHER_RELEASE}. {hint}") from None


def verify_teachers(collection: str, root: StrPath | None = None) -> int:
    """Check a collection's existing files; prints a line for each file.

    Args:
        collection: a key of ``COLLECTIONS``.
        root: see :func:`fetch_teachers`.

    Returns:
        The number of existing files.

    Raises:
        CheckpointError: names every file that fails.
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
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        raise CheckpointError("\n".join([*wrong, "to replace it, run the command again with --overwrite"]))
    return count


def _list(root: Path) -> None:
    for collection, teachers in COLLECTIONS.items():
        source = f"{teachers.megabytes} MB, {RELEASE_FILES}/{collection}.tar" if teachers.megabytes else "by hand only"
        print(f"{collection}: {source}")
        for file, name in teacher_files(collection).items():
            print(f"  {name:12}{'there' if (root / file).is_file() else 'missing':9}{root / file}")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code: 0; 130 after a stop from the keyboard."""
    parser = argparse.ArgumentParser(
        prog="python -m mdistiller.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "collections", nargs="*", metavar="COLLECTION", help="collections to download; default: cifar_teachers"
    )
    parser.add_argument(
        "--root", type=Path, metavar="DIR", default=default_root(), help="folder of the files; default: %(default)s"
    )
    parser.add_argument("--list", action="store_true", help="list all files, and the files in --root")
    parser.add_argument("--verify", action="store_true", help="only check the files in --root")
    parser.add_argument("--overwrite", action="store_true", help="download existing files again")
    args = parser.parse_args(arguments)
    collections = args.collections or ["cifar_teachers"]
    for collection in collections:
        teacher_files(collection)  # raises for an unknown name, before anything is downloaded
    if args.list:
        _list(args.root)
        return 0
    if args.verify:
        for collection in collections:
            if not verify_teachers(collection, args.root):
                raise InputError(
                    f"{args.root} holds no file of {collection}; download the files by the command without --verify"
                )
        return 0
    try:
        for collection in collections:
            fetch_teachers(collection, args.root, overwrite=args.overwrite)
    except KeyboardInterrupt:
        print("stopped; the same command continues from here", file=sys.stderr)
        return 130
    return 0
