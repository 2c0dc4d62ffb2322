"""What checkpoints may hold beside tensors, and what is refused."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_files import make_tar

from mdistiller.engine.folder.checkpoint import CheckpointError, load_checkpoint, load_weights


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))


class Call:
    """A pickled call of anything with anything."""

    def __init__(self, function: Callable, *arguments: object, state: object = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple:
        return self.call


FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])


@FORMATS
def test_harmless_contents_are_read(tmp_path: Path, zipped: bool) -> None:
    content = {
        "best_acc": np.float64(72.25),
        "accuracy": torch.tensor(72.5),
        "numbers": [np.float32(0.5), np.int64(-3), np.bool_(True), np.dtype(">i4").type(7)],
        "curve": np.arange(6.0).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
        "empty": np.zeros((0, 3), np.float32),
        "big endian": np.arange(5, dtype=">f4"),
        "large": np.arange(5000),
        "opt": argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180], model="resnet56", acc=np.float32(1.5)),
        "model": collections.OrderedDict(w=torch.ones(2)),
    }
    torch.save(content, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    read = load_checkpoint(tmp_path / "file")
    assert read["best_acc"] == 72.25
    assert isinstance(read["best_acc"], np.float64)
    assert read["numbers"] == content["numbers"]
    for key in ("curve", "fortran", "empty", "big endian", "large"):
        assert read[key].dtype == content[key].dtype.newbyteorder("=")  # numpy swaps the bytes when it reads, too
        assert np.array_equal(read[key], content[key])
    assert read["opt"] == content["opt"]
    assert torch.equal(load_weights(tmp_path / "file")["w"], torch.ones(2))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpy_before_and_since_version_2(tmp_path: Path, module: bytes) -> None:
    buffer = io.BytesIO()
    torch.save({"acc": np.float64(1.5), "a": np.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    for written in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        content = content.replace(b"c" + written + b"\n", b"c" + module + b"\n")
    (tmp_path / "file").write_bytes(content)
    read = load_checkpoint(tmp_path / "file")
    assert read["acc"] == 1.5
    assert read["a"].sum() == 3


scalar, reconstruct = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
# flags 0: "these are no pointers"
FORGED = Call(np.dtype, "O8", False, True, state=(3, "|", None, None, None, -1, -1, 0))
HARMFUL_CONTENT = {
    "call": Bomb(),
    "call inside a namespace": argparse.Namespace(a=Bomb()),
    "builtin": Call(eval, "1"),
    "memory": Call(bytes, 1 << 40),
    "memory that is filled": Call(bytearray, 1 << 33),
    "file": Call(open, "pwned", "w"),
    "argparse file": argparse.FileType("w"),
    "pointers": Call(scalar, FORGED, b"A" * 8),
    "array of pointers": Call(reconstruct, np.ndarray, (0,), b"b", state=(1, (1,), FORGED, False, b"A" * 8)),
    "array of objects": np.array([1, "a"], dtype=object),
    "record": np.zeros(2, dtype=[("a", "f4")]),
    "larger than its bytes": Call(
        reconstruct, np.ndarray, (0,), b"b", state=(1, (1 << 40,), np.dtype("f8"), False, b"A" * 8)
    ),
    "number beyond its bytes": Call(scalar, np.dtype("f8"), b"A"),
    "state of another kind": Call(reconstruct, np.ndarray, (0,), b"b", state=(1, 2)),
}


@FORMATS
@pytest.mark.parametrize("kind", HARMFUL_CONTENT)
def test_harmful_contents_are_not(tmp_path: Path, kind: str, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"model": {"w": torch.ones(1)}, "x": HARMFUL_CONTENT[kind]}, "file", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(CheckpointError) as error:
        load_checkpoint("file")
    assert "weights_only" not in str(error.value)  # torch advises to load without the check
    assert os.listdir() == ["file"]


@FORMATS
def test_an_array_of_any_size_is_empty_until_its_bytes_come(tmp_path: Path, zipped: bool) -> None:
    """numpy.ndarray(shape) takes memory, of any size, with whatever lay in it."""
    torch.save({"a": Call(np.ndarray, (1 << 50,))}, tmp_path / "file", _use_new_zipfile_serialization=zipped)
    assert load_checkpoint(tmp_path / "file")["a"].size == 0


def test_what_a_program_allows_stays_as_it_was(tmp_path: Path) -> None:
    before = torch.serialization.get_safe_globals()
    torch.save({"a": np.float64(1)}, tmp_path / "good")
    torch.save({"a": Bomb()}, tmp_path / "bad")
    mine = {collections.deque, np.dtype, argparse.Namespace}
    torch.serialization.add_safe_globals(list(mine))
    try:
        load_checkpoint(tmp_path / "good")
        with pytest.raises(CheckpointError):
            load_checkpoint(tmp_path / "bad")
        assert set(torch.serialization.get_safe_globals()) == {*before, *mine}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def test_a_tar_is_no_checkpoint(tmp_path: Path) -> None:
    """A tar of teachers that was never unpacked is told from a damaged file."""
    tar = make_tar(tmp_path / "cifar_teachers.tar", {"storages": pickle.dumps(0), "pickle": pickle.dumps(Bomb())})
    with pytest.raises(CheckpointError, match="a tar archive, which must be unpacked first"):
        load_checkpoint(tar)


@FORMATS
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_random_damage_to_a_teacher_raises_nothing_else(tmp_path: Path, zipped: bool) -> None:
    buffer = io.BytesIO()
    content = {"model": {"w": torch.ones(3)}, "acc": np.float64(1), "a": np.ones(2), "opt": argparse.Namespace(a=1)}
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    whole, rng = buffer.getvalue(), random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "file").write_bytes(damaged[: rng.choice([None, rng.randrange(len(damaged))])])
        try:
            load_checkpoint(tmp_path / "file")
        except CheckpointError:
            continue


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "file")
