"""Checksums, locks, and messages for files that cannot be written."""

import fcntl
import hashlib
import os
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from mdistiller.files import file_sha256, lock, no_space, writing
from mdistiller.registry import InputError


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 10_000)
    return path


def test_digest_in_blocks(path):
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_holds_a_lock(path):
    with path.open() as first, path.open() as second:
        assert lock(first)
        assert not lock(second)
    with path.open() as third:
        assert lock(third)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_that_its_holder_has_removed_is_not_locked(path, replaced):
    """Otherwise two processes would hold locks of one name: of the removed file and of the new file."""
    with path.open() as file:
        path.unlink()
        if replaced:
            path.touch()
        assert not lock(file)


def test_a_child_that_lives_on_does_not_keep_the_lock(path):
    """A loader's worker notices the death of its parent only after some time."""
    with path.open() as file:
        assert lock(file)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        time.sleep(0.05)
        with path.open() as next_one:
            assert lock(next_one)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_without_locks_everybody_may_write(path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    with path.open() as first, path.open() as second:
        assert lock(first)
        with monkeypatch.context() as patch:
            patch.setattr(fcntl, "flock", refuse)
            assert lock(second)
        monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
        assert lock(second)


def test_a_full_disk_says_how_much_is_missing(path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    assert no_space(path, 4_000_000) == f"no space left to write {path}: 4.0 MB needed, 1.5 MB free, 2.5 MB are missing"
    assert no_space(path, 1_000_000).endswith("1.0 MB needed, 1.5 MB free, a quota or limit is reached")
    assert no_space(path).endswith(": 1.5 MB free")


def test_an_error_of_the_file_system_is_the_users(path):
    with pytest.raises(InputError, match=f"cannot write {path}/file: Not a directory"), writing(path):
        (path / "file").touch()
