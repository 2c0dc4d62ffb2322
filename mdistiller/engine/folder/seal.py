"""The bytes of a checkpoint: a checksum at the end of the file, and checks of a file before torch reads it.

``torch.load`` compares no checksum. For an entry that the zip directory marks as a folder, ``torch.load`` copies
nothing and returns uninitialised memory. So only directories as ``torch.save`` writes them are accepted: whole files,
not compressed, each name once. Nothing is unpacked, and the checks need no more memory than the file's size.
"""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import struct
import zipfile
from typing import BinaryIO

from mdistiller.files import sha256

MARK = b"mdistiller sha256 "  # start of the zip's comment
DIGEST = 2 * hashlib.sha256().digest_size  # characters
END = b"PK\5\6"  # start of a zip's last record: 22 bytes, whose last 2 hold the comment's length, and the comment
ZIP = b"PK\3\4"  # start of a file of torch.save; torch reads other files by the format before torch 1.6
ALLOCATES = b"\nbytearray\n"  # in a pickle: one number allocates memory of any size; torch allows it
FLAGS = 0x0808  # allowed flags of an entry: UTF-8 names, sizes after the data
FOLDER = 0x10  # an entry's attribute
TOO_MUCH = "it allocates memory that it does not fill"


def seal(archive: io.BytesIO) -> None:
    """Append the SHA-256 of a file of ``torch.save`` as the zip's comment, which other readers skip."""
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(MARK) + DIGEST) + MARK)
    archive.write(hashlib.sha256(archive.getbuffer()).hexdigest().encode())


def fault(file: BinaryIO) -> str | None:
    """The fault in the bytes of a file of ``torch.save``; ``None`` for a good file.

    A file with the checksum of :func:`seal` is compared with it. A file of an earlier version or of another program is
    compared with the CRCs of its entries. Files of the old format have neither.

    Raises:
        Exception: any that ``zipfile`` raises for damaged bytes.
    """
    file.seek(0)
    if file.read(len(ZIP)) != ZIP:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return None if content.find(ALLOCATES) < 0 else TOO_MUCH
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        file.seek(max(0, size - 22 - len(archive.comment)))
        end = file.read(22)
        if end[:4] != END or end[20:] != struct.pack("<H", len(archive.comment)):
            return "there are bytes after its end, or it is cut short"
        if problem := _strange_entry(archive.infolist(), size):
            return problem
        if not archive.comment:
            if damaged := archive.testzip():
                return f"{damaged} fails its checksum"
        elif not archive.comment.startswith(MARK):
            return "its checksum cannot be read"
        else:
            file.seek(0)
            if archive.comment != MARK + sha256(file, size - DIGEST).encode():
                return "the file fails its checksum"
        pickles = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
        return TOO_MUCH if any(ALLOCATES in archive.read(name) for name in pickles) else None


def _strange_entry(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """The fault of the first entry that ``torch.save`` does not write; ``size`` is the file's, in bytes."""
    names: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        plain = not (entry.is_dir() or entry.external_attr & FOLDER or entry.flag_bits & ~FLAGS)
        problems = {
            "compressed": entry.compress_type or entry.compress_size != entry.file_size,
            "no plain file": not plain or name != entry.filename,
            "larger than the file": entry.file_size > size,
            "there twice": name.lower() in names,  # torch ignores the letter case
        }
        for problem, applies in problems.items():
            if applies:
                return f"its entry {name[:100]!r} is {problem}"
        names.add(name.lower())
        size -= entry.file_size
    return None
