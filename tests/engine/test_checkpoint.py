"""Files that come back whole or not at all."""

import errno
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mdistiller.engine.folder import checkpoint
from mdistiller.engine.folder.checkpoint import (
    CheckpointError,
    DiskFullError,
    check_weights,
    load_checkpoint,
    load_into,
    load_weights,
    save_checkpoint,
)


def test_round_trip_and_replacement(tmp_path):
    path = tmp_path / "latest"
    for value in (1.0, 2.0):
        save_checkpoint({"model": {"w": torch.full((3,), value)}, "epoch": 5}, path)
    assert torch.equal(load_checkpoint(path)["model"]["w"], torch.full((3,), 2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_a_failing_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    save_checkpoint({"epoch": 1}, path)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_500_000))
    with pytest.raises(
        DiskFullError, match=r"latest: 4\.0 MB needed, 1\.5 MB free, 2\.5 MB are missing; the earlier latest is intact"
    ):
        save_checkpoint({"epoch": torch.zeros(1_000_000)}, path)
    assert load_checkpoint(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        save_checkpoint({}, tmp_path / "file")
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("damage", ["truncated", "flipped", "zeroed", "empty", "text"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "file"
    save_checkpoint({"model": {"w": torch.randn(1000)}}, path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "flipped":
        content[middle] ^= 4
    elif damage == "zeroed":
        content[middle : middle + 100] = bytes(100)
    else:
        content = {"truncated": content[:middle], "empty": b"", "text": b"hello"}[damage]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="file is damaged"):
        load_checkpoint(path)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_file_that_would_execute_code_is_not_executed(tmp_path, write):
    write({"model": Bomb(tmp_path / "pwned")}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"not loaded|no checkpoint"):
        load_checkpoint(tmp_path / "file")
    assert not (tmp_path / "pwned").exists()


def test_old_format_is_read(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert torch.equal(load_checkpoint(tmp_path / "old")["model"]["w"], torch.ones(2))


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}, "epoch": 240, "accuracy": torch.tensor(70.0)},
        {"state_dict": {"weight": torch.ones(2, 2), "bias": torch.ones(2)}},
        {"module.weight": torch.ones(2, 2), "module.bias": torch.ones(2)},
        {"model": {"student.weight": torch.ones(2, 2), "student.bias": torch.ones(2), "teacher.w": torch.ones(1)}},
    ],
    ids=["mdistiller", "state_dict", "bare DataParallel", "latest"],
)
def test_forms_of_weights(tmp_path, content):
    save_checkpoint(content, tmp_path / "file")
    model = nn.Linear(2, 2)
    load_into(model, tmp_path / "file", "linear model")
    assert torch.equal(model.bias.detach(), torch.ones(2))


def test_what_does_not_fit_is_listed_and_nothing_changes(tmp_path):
    save_checkpoint({"model": {"weight": torch.ones(3, 2), "extra": torch.ones(1)}}, tmp_path / "file")
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(
        CheckpointError, match=r"missing: bias; not in the model: extra; other shape: weight is \(3, 2\), .* \(2, 2\)"
    ):
        load_into(model, tmp_path / "file", "linear model")
    assert torch.equal(model.weight.detach(), before)


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    save_checkpoint({"epoch": 3}, tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"no state dict .* found: \['epoch'\]"):
        load_weights(tmp_path / "file")


def test_missing_file():
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load_checkpoint("nowhere/latest")


def refusal(state, advice="take another file", classes_of="data set digits; take another teacher"):
    with pytest.raises(CheckpointError) as error:
        check_weights(nn.Linear(2, 10).state_dict(), state, "file", lambda: advice, classes_of)
    return str(error.value)


def test_the_reason_why_a_state_does_not_fit():
    hundred = nn.Linear(2, 100).state_dict()
    assert refusal(hundred) == "file has 100 classes, not the 10 of data set digits; take another teacher"
    other_shape = (
        "file does not fit: other shape: weight is (100, 2), the model's (10, 2), bias is (100,), the model's (10,)"
    )
    assert refusal(hundred, "", "") == other_shape
    assert refusal(hundred, classes_of="") == f"{other_shape}; take another file"
    assert refusal(nn.Linear(3, 10).state_dict()).endswith("(10, 3), the model's (10, 2); take another file")
    assert "not in the model: scale" in refusal({**hundred, "scale": torch.ones(1)})
    check_weights(nn.Linear(2, 10).state_dict(), nn.Linear(2, 10).state_dict(), "file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    broken = {key: torch.full_like(tensor, value) for key, tensor in nn.Linear(2, 10).state_dict().items()}
    assert "file has values that are not finite, in weight, bias: its training failed" in refusal(broken)
    check_weights(nn.BatchNorm1d(2).state_dict(), nn.BatchNorm1d(2).state_dict(), "file")  # holds a whole number
