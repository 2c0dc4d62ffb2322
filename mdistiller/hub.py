"""The command that downloads public teachers, ``python -m mdistiller.hub``; the code is :mod:`mdistiller.fetch`."""

from .engine.cli import command
from .fetch.archive import ArchiveError, unpack  # noqa: F401
from .fetch.download import DownloadError, download  # noqa: F401
from .fetch.teachers import COLLECTIONS, check_teacher, fetch_teachers, main, teacher_files, verify_teachers  # noqa: F401

if __name__ == "__main__":
    command(main)
