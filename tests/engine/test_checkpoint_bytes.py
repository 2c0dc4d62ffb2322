"""Files whose bytes were damaged or forged: what is read equals what was written, or nothing is read."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGPU
from runs import same_state
from torch import nn

from mdistiller.engine.folder import checkpoint
from mdistiller.engine.folder.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

STATE = {"epoch": 3, "model": {f"layer{i}.weight": torch.randn(20, 20) for i in range(4)}, "step": 12}


def plain(state: object) -> bytes:
    """A file as torch alone writes it, and as earlier versions did: without a checksum of its own."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def sealed(state: object, path: Path) -> bytes:
    save_checkpoint(state, path)
    return path.read_bytes()


def refused(path: Path, content: bytes) -> str | None:
    """Why a file of that content is refused; ``None``: it is read, and holds what was written."""
    path.write_bytes(content)
    try:
        found = load_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    assert same_state(found, STATE)
    return None


def directory_of(content: bytes) -> int:
    return zipfile.ZipFile(io.BytesIO(content)).start_dir


def entries_of(content: bytes) -> list[int]:
    """Where the directory's entries begin."""
    at, found = directory_of(content), []
    while content[at : at + 4] == b"PK\1\2":
        found.append(at)
        at += 46 + sum(struct.unpack("<HHH", content[at + 28 : at + 34]))
    return found


def damaged(content: bytes, kind: str, dice: random.Random) -> bytes:
    data, size = bytearray(content), len(content)
    where = {"header": range(90), "directory": range(directory_of(content), size)}.get(kind, range(size))
    if kind == "truncated":
        return content[: dice.choice([dice.randrange(size), size - dice.randrange(1, 110)])]
    if kind == "extended":
        return dice.choice([content + bytes(dice.choice([1, 22, 512])), content + content[-200:], b"\0" + content])
    block = dice.choice([16, 512, 4096])
    one, other = (dice.randrange(size // block) * block for _ in range(2))
    if kind == "swapped":
        data[one : one + block], data[other : other + block] = (
            content[other : other + block],
            content[one : one + block],
        )
    elif kind == "zeroed":
        data[one : one + block] = bytes(block)
    else:
        for _ in range(dice.choice([1, 1, 4])):
            data[dice.choice(where)] ^= dice.choice([1 << dice.randrange(8), dice.randrange(256)])
    return bytes(data)


DAMAGES = ("anywhere", "header", "directory", "truncated", "extended", "swapped", "zeroed")


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused_or_holds_what_was_written(tmp_path: Path, kind: str) -> None:
    """With a checksum no damage is taken; without one, damage to bytes that carry nothing is."""
    closed, dice = sealed(STATE, tmp_path / "file"), random.Random(kind)
    for content in [closed] * 40 + [plain(STATE)] * 40:
        bad = damaged(content, kind, dice)
        problem = refused(tmp_path / "file", bad)
        assert problem or content != closed or bad == content


def test_a_folder_in_the_directory_of_a_file_without_a_checksum(tmp_path: Path) -> None:
    """torch takes such an entry, and returns what lay in the memory."""
    content = plain(STATE)
    for at in entries_of(content):
        bad = bytearray(content)
        bad[at + 38] ^= 0x10
        assert refused(tmp_path / "file", bad)


def test_files_with_a_checksum_are_read_by_torch_alone_and_files_without_one_are_read_here(tmp_path: Path) -> None:
    sealed(STATE, tmp_path / "file")
    for mmap in (False, True):
        assert same_state(torch.load(tmp_path / "file", mmap=mmap, weights_only=True), STATE)
    assert refused(tmp_path / "file", plain(STATE)) is None


def rezipped(content: bytes, change: Callable[[str, bytes], list[tuple[zipfile.ZipInfo, bytes]]]) -> bytes:
    """The archive written anew; ``change`` gives the entries in the place of each."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w") as new:
        for entry in archive.infolist():
            for info, data in change(entry.filename, archive.read(entry)):
                new.writestr(info, data)
    return buffer.getvalue()


def entry(name: str, **attributes: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


def with_claimed_size(content: bytes) -> bytes:
    """The directory's first entry claims 4 GB."""
    at, forged = entries_of(content)[0], bytearray(content)
    forged[at + 20 : at + 28] = struct.pack("<II", 0xF0000000, 0xF0000000)
    return bytes(forged)


FORGERIES = {
    "compressed": lambda name, data: [(entry(name, compress_type=zipfile.ZIP_DEFLATED), data)],
    "no plain file": lambda name, data: [(entry(name, external_attr=0x10), data)],
    "there twice": lambda name, data: [(entry(name), data), (entry(name.upper()), data)],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("closed", [False, True], ids=["plain", "sealed"])
@pytest.mark.parametrize("kind", [*FORGERIES, "larger than the file"])
def test_what_torch_never_writes_is_refused_before_it_is_unpacked(tmp_path: Path, kind: str, closed: bool) -> None:
    """A checksum can be forged, too."""
    content = plain(STATE)
    assert refused(tmp_path / "file", rezipped(content, lambda name, data: [(entry(name), data)])) is None
    forged = rezipped(content, FORGERIES[kind]) if kind in FORGERIES else with_claimed_size(content)
    if closed:
        buffer = io.BytesIO(forged)
        checkpoint.seal(buffer)
        forged = buffer.getvalue()
    assert f"is {kind}" in refused(tmp_path / "file", forged)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    save_checkpoint(STATE, tmp_path / "file")
    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(CheckpointError, match=r"file cannot be read: Permission denied$"):
        load_checkpoint(tmp_path / "file")


@pytest.mark.filterwarnings("error")
def test_messages_for_old_files_are_in_words_of_this_library(tmp_path: Path) -> None:
    for content in (pickle.dumps(STATE, protocol=4), b"\x80\x02Y.", plain(STATE)[:-500]):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"damaged or no checkpoint .*copy or download it again$") as error:
            load_checkpoint(tmp_path / "file")
        assert not any(word in str(error.value) for word in ("operand", "torch", "Unsupported", "enforce", "aten"))


def test_checkpoints_of_a_gpu_are_written_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a plain ``torch.load`` reads them on a machine without one."""
    gpu, written, archive = FakeGPU(), [], plain({})
    network = gpu.module(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    monkeypatch.setattr(torch, "save", lambda obj, buffer: (written.append(obj), buffer.write(archive)))
    with gpu:
        state = {"model": network.state_dict(), "list": [network[0].weight]}
        assert state["model"]["0.weight"].device.type == "cuda"
        save_checkpoint(state, tmp_path / "file")
    (found,) = written
    assert {x.device.type for x in (*found["model"].values(), *found["list"])} == {"cpu"}
    assert found["model"]._metadata == state["model"]._metadata
    assert state["list"][0].device.type == "cuda"
