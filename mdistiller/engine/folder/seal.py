"""The bytes of a checkpoint: a checksum at the end of the file, and what a file must be before torch reads it.

``torch.load`` checks no checksum. It also takes an entry that the zip directory calls a folder, copies nothing for
that entry and returns what lay in the memory. So the directory is compared with what ``torch.save`` writes: whole
files, stored as they are, each name once. Nothing is unpacked, and a file takes no more memory than it has bytes.
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

MARK = b"mdistiller sha256 "  # begins the zip's comment
DIGEST = 2 * hashlib.sha256().digest_size  # characters
END = b"PK\5\6"  # begins the record that ends a zip, 22 bytes and the comment; the last 2 hold the comment's length
ZIP = b"PK\3\4"  # begins a file of torch.save; any other is of the format before torch 1.6 to torch
ALLOCATES = b"\nbytearray\n"  # in a pickle: memory of any size, for one number; torch allows it
FLAGS = 0x0808  # of an entry: UTF-8 names, sizes behind the data
FOLDER = 0x10  # the attribute
TOO_MUCH = "it asks for memory that it does not fill"


def seal(archive: io.BytesIO) -> None:
    """Append the SHA-256 of what ``torch.save`` wrote. It is the zip's comment, which other readers skip."""
    archive.seek(-2, os.SEEK_END)
    archive.write(struct.pack("<H", len(MARK) + DIGEST) + MARK)
    archive.write(hashlib.sha256(archive.getbuffer()).hexdigest().encode())


def fault(file: BinaryIO) -> str | None:
    """The fault in the bytes of a file of ``torch.save``; ``None`` for a good file.

    A file that :func:`seal` has closed is compared with its checksum. Another one, of an earlier version or of another
    program, is compared with the CRCs of its entries. Files of the old format hold neither.

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
            return "it goes on behind its end, or is cut short"
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
    """Names an entry that ``torch.save`` does not write; ``size``: of the file, bytes."""
    names: set[str] = set()
    for entry in entries:
        name = entry.orig_filename
        plain = not (entry.is_dir() or entry.external_attr & FOLDER or entry.flag_bits & ~FLAGS)
        problems = {
            "compressed": entry.compress_type or entry.compress_size != entry.file_size,
            "no plain file": not plain or name != entry.filename,
            "larger than the file": entry.file_size > size,
            "there twice": name.lower() in names,  # torch ignores the case
        }
        for problem, found in problems.items():
            if found:
                return f"its entry {name[:100]!r} is {problem}"
        names.add(name.lower())
        size -= entry.file_size
    return None
