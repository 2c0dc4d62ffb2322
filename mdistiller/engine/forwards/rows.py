"""Files of rows that prove themselves, one row for each image: the disk part of ``SOLVER.TEACHER_MEMORY``.

A file holds one output of the teacher on one view of one epoch. Row i, of a fixed length, belongs to image i. Behind
its values stands a CRC-32 that begins with the file's name, the identity of the memory and i. So a row that is missing,
torn, damaged, or of another file is one case: its checksum differs, and the row is computed anew. Files are sparse.
They need no lock and no index: two runs that write one row write the same bytes.

Nothing is written through a memory map, because a full disk would end the process.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

CHECKSUM = 4  # bytes
READ_AHEAD = 1 << 30  # bytes of a file that are read at once; a larger file is read row by row


class RowFile:
    """The rows of one file.

    Args:
        path: of the file; it is created when the first row is written.
        identity: of the memory, which all rows of a valid file were computed with.
        length: of a row's values, in bytes.
    """

    def __init__(self, path: Path, identity: str, length: int) -> None:
        self.path, self.length = path, length
        self.start = zlib.crc32(f"{identity}/{path.parent.name}/{path.name}/{length}".encode())
        self.content = self._read_ahead()

    def read(self, index: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Rows by image.

        Args:
            index: numbers of the images.

        Returns:
            ``(B, length)`` uint8, and ``(B,)`` bool: the rows that are valid.
        """
        found = np.zeros((len(index), self.length + CHECKSUM), np.uint8)
        for place, number in enumerate(index):
            row = self._row(number)
            found[place, : len(row)] = row
        values, checksums = found[:, : self.length], np.ascontiguousarray(found[:, self.length :]).view(np.uint32)[:, 0]
        wanted = [self._checksum(number, row) for number, row in zip(index, np.ascontiguousarray(values), strict=True)]
        return values, checksums == np.array(wanted, np.uint32)

    def write(self, index: list[int], values: np.ndarray) -> None:
        """Write rows.

        Args:
            index: numbers of the images.
            values: ``(B, length)`` uint8.

        Raises:
            OSError: the disk is full or refuses.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for number, row in zip(index, np.ascontiguousarray(values), strict=True):
                data = row.tobytes() + np.uint32(self._checksum(number, row)).tobytes()
                os.pwrite(handle, data, number * len(data))
        finally:
            os.close(handle)

    def _checksum(self, number: int, row: np.ndarray) -> int:
        return zlib.crc32(row, zlib.crc32(number.to_bytes(8, "little"), self.start))

    def _read_ahead(self) -> np.ndarray | None:
        """The file's bytes, read in sequence; ``None``: it is too large."""
        try:
            if self.path.stat().st_size > READ_AHEAD:
                return None
            return np.fromfile(self.path, np.uint8)
        except OSError:  # no such file, or one that cannot be read: no row is valid
            return np.empty(0, np.uint8)

    def _row(self, number: int) -> np.ndarray:
        size = self.length + CHECKSUM
        if self.content is not None:
            return self.content[number * size : (number + 1) * size]
        with self.path.open("rb", buffering=0) as file:
            return np.frombuffer(os.pread(file.fileno(), size, number * size), np.uint8)
