"""mdistiller's public teachers: fetched, checked, refused, and the command."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_runner import ROOT
from file_server import QUICK, Server, status, truncate
from tar_files import contents, make_tar

from mdistiller import hub
from mdistiller.dataset import CIFAR100
from mdistiller.engine.build import build_teacher, teacher_checkpoint
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import command
from mdistiller.engine.folder.checkpoint import CheckpointError, load_weights
from mdistiller.fetch import teachers
from mdistiller.fetch.archive import ArchiveError
from mdistiller.fetch.download import DownloadError
from mdistiller.fetch.teachers import KNOWN_SHA256, fetch_teachers
from mdistiller.files import lock
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError, dataset_dict

RESNET56 = "cifar_teachers/resnet56_vanilla/ckpt_epoch_240.pth"
DOWNLOADED = "cifar_teachers.downloaded.tar"
WRN = "cifar_teachers/wrn_40_2_vanilla/ckpt_epoch_240.pth"


def teacher_file(name: str, num_classes: int = 100, **more: object) -> bytes:
    """A teacher as RepDistiller wrote it: old format, more than the weights."""
    torch.manual_seed(0)
    model = cifar_model_dict[name][0](num_classes=num_classes)
    buffer = io.BytesIO()
    content = {"epoch": 240, "model": model.state_dict(), "accuracy": np.float64(72.5), **more}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def resnet56() -> bytes:
    return teacher_file("resnet56", opt=argparse.Namespace(lr=0.05, lr_decay_epochs=[150, 180, 210], trial="0"))


@pytest.fixture
def mirror(server: Server, tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server of a ``cifar_teachers.tar`` with one teacher and something else; ``MDISTILLER_CKPT_URL`` names it."""
    tar = make_tar(tmp_path / "served.tar", {RESNET56: resnet56, "cifar_teachers/README": b"hello"})
    server.files["/mirror/cifar_teachers.tar"] = tar.read_bytes()
    monkeypatch.setenv(teachers.MIRROR_VARIABLE, f"{server.url}/mirror/")
    return server


def test_fetched_teacher_is_usable(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "download_ckpts"
    monkeypatch.setitem(cifar_model_dict, "resnet56", (cifar_model_dict["resnet56"][0], str(root / RESNET56)))
    cfg = load_config(options=["DATASET.TYPE", "cifar100", "DISTILLER.TEACHER", "resnet56"])
    with pytest.raises(CheckpointError, match=r"sh download_ckpts\.sh cifar_teachers .*releases/tag/checkpoints"):
        teacher_checkpoint(cfg)
    mirror.script = [truncate(1_000_000)]
    assert fetch_teachers("cifar_teachers", root, **QUICK) == [root / RESNET56]
    assert mirror.ranges == [None, "bytes=1000000-"]
    out = capsys.readouterr().out
    assert "good     resnet56: " in out
    assert "100 classes, sha256" in out
    assert "no known checksum" in out
    assert f"missing  wrn_40_2: {WRN} is not in the tar" in out
    assert list(contents(root)) == [RESNET56]  # neither the tar nor what is no teacher

    teacher = build_teacher(cfg, 100)
    assert torch.equal(teacher.fc.weight, load_weights(root / RESNET56)["fc.weight"])


def test_the_command(mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    assert hub.main(["--root", str(root)]) == 0
    assert hub.main(["cifar_teachers", "--root", str(root), "--verify"]) == 0
    assert "good     resnet56: " in capsys.readouterr().out
    assert hub.main(["--root", str(root), "--list"]) == 0
    out = capsys.readouterr().out
    assert f"resnet56    there    {root / RESNET56}" in out
    assert "tiny_imagenet_teachers: by hand only" in out
    with pytest.raises(InputError, match="holds no file of cifar_teachers"):
        hub.main(["--root", str(tmp_path / "other"), "--verify"])
    with pytest.raises(InputError, match="no collection of teachers named 'cifar'; closest"):
        hub.main(["cifar"])


def test_failures_end_the_command_with_2(mirror: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror.script = [status(404)]
    with pytest.raises(SystemExit) as stop:
        command(lambda: hub.main(["--root", str(tmp_path)]))
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: cannot download {mirror.url}/mirror/cifar_teachers.tar: HTTP")


def test_verify_finds_a_truncated_file(mirror: Server, tmp_path: Path, resnet56: bytes) -> None:
    (tmp_path / RESNET56).parent.mkdir(parents=True)
    (tmp_path / RESNET56).write_bytes(resnet56[:-1000])
    with pytest.raises(CheckpointError, match=r"resnet56_vanilla/ckpt_epoch_240.pth is damaged(.|\n)*--overwrite"):
        hub.main(["--root", str(tmp_path), "--verify"])
    with pytest.raises(CheckpointError, match="--overwrite"):
        fetch_teachers(root=tmp_path)
    assert not mirror.paths
    fetch_teachers(root=tmp_path, overwrite=True)
    assert (tmp_path / RESNET56).read_bytes() == resnet56


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda good: good[:-1000], "damaged"),
        (lambda good: b"<html>not found</html>", "damaged or no checkpoint"),
        (lambda good: teacher_file("resnet20"), "does not fit"),
        (lambda good: teacher_file("resnet56", 10), "has 10 classes, not the 100 of resnet56 of cifar_teachers"),
        (lambda good: teacher_file("resnet56", opt=Bomb()), "may execute code, so the file is not loaded"),
    ],
    ids=["truncated", "text", "other model", "other classes", "code"],
)
def test_a_corrupt_teacher_is_refused(
    mirror: Server, tmp_path: Path, resnet56: bytes, content: Callable[[bytes], bytes], message: str
) -> None:
    tar = make_tar(tmp_path / "bad.tar", {RESNET56: content(resnet56), WRN: teacher_file("wrn_40_2")})
    mirror.files["/mirror/cifar_teachers.tar"] = tar.read_bytes()
    root = tmp_path / "root"
    with pytest.raises(ArchiveError, match=f"(?s){RESNET56} in .* is refused .*{message}.*run the command again"):
        fetch_teachers(root=root)
    assert set(contents(root)) == {DOWNLOADED, WRN}


def test_a_tar_that_this_machine_cannot_read_is_kept_and_used_again(
    mirror: Server, tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_old(path: Path) -> None:
        raise CheckpointError(f"checkpoint {path} cannot be read by this version of torch")

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "load_weights", too_old)
        with pytest.raises(ArchiveError, match=f"(?s)this version of torch.*{tmp_path / DOWNLOADED} is kept"):
            fetch_teachers(root=tmp_path)
    assert fetch_teachers(root=tmp_path) == [tmp_path / RESNET56]
    assert len(mirror.paths) == 1
    assert not (tmp_path / DOWNLOADED).exists()
    mirror.files["/mirror/cifar_teachers.tar"] = b""
    (tmp_path / DOWNLOADED).write_bytes(b"kept, but damaged")
    (tmp_path / RESNET56).unlink()
    with pytest.raises(ArchiveError, match="the tar is deleted; run the command again"):
        fetch_teachers(root=tmp_path)
    assert contents(tmp_path).keys() == {"served.tar"}


def test_overwrite_downloads_a_kept_tar_anew(mirror: Server, tmp_path: Path) -> None:
    (tmp_path / DOWNLOADED).write_bytes(b"of another day")
    fetch_teachers(root=tmp_path, overwrite=True)
    assert len(mirror.paths) == 1
    assert not (tmp_path / DOWNLOADED).exists()


def test_stopped_while_unpacking_it_goes_on_from_there(
    mirror: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(teachers, "unpack", stop)
        assert hub.main(["--root", str(tmp_path)]) == 130
    assert hub.main(["--root", str(tmp_path)]) == 0
    assert len(mirror.paths) == 1
    assert not (tmp_path / DOWNLOADED).exists()


def test_what_a_killed_call_left_is_removed_by_the_next(mirror: Server, tmp_path: Path, resnet56: bytes) -> None:
    """Also where nothing is left to be fetched; not while another process is at work."""
    (tmp_path / "served.tar").unlink()
    folder = (tmp_path / RESNET56).parent
    folder.mkdir(parents=True)
    (tmp_path / RESNET56).write_bytes(resnet56)
    for file in teachers.teacher_files("cifar_teachers"):
        if file != RESNET56:
            shutil.copytree(folder, (tmp_path / file).parent)
    left = [DOWNLOADED, f"{DOWNLOADED}.part", f"{DOWNLOADED}.part.json", f"{folder}/.ckpt_epoch_240.pth.tmp"]
    for name in left:
        (tmp_path / name).write_bytes(b"{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "check_teacher", lambda path, collection, file: file)
        with (tmp_path / DOWNLOADED).open("rb") as busy:
            assert lock(busy)
            fetch_teachers(root=tmp_path)
            assert all((tmp_path / name).exists() for name in left)
        fetch_teachers(root=tmp_path)
    assert contents(tmp_path).keys() == teachers.teacher_files("cifar_teachers").keys()
    assert not mirror.paths


@pytest.mark.parametrize("name", ["cifar_teachers.tar", RESNET56])
def test_a_file_that_may_not_be_read_is_one_message(
    mirror: Server, tmp_path: Path, resnet56: bytes, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / RESNET56).parent.mkdir(parents=True)
    (tmp_path / name).write_bytes(resnet56)
    original = open

    def forbidden(path: object, *arguments: object, **named: object) -> object:
        if path == tmp_path / name:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **named)

    monkeypatch.setattr("builtins.open", forbidden)
    with pytest.raises(InputError, match=f"^cannot read {tmp_path / name}: Permission denied"):
        fetch_teachers(root=tmp_path)


def test_weights_that_are_not_finite(mirror: Server, tmp_path: Path) -> None:
    state = cifar_model_dict["resnet56"][0](num_classes=100).state_dict()
    state["layer1.0.bn1.weight"][3] = float("nan")
    path = tmp_path / RESNET56
    path.parent.mkdir(parents=True)
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"not finite, in layer1\.0\.bn1\.weight"):
        hub.verify_teachers("cifar_teachers", tmp_path)


def test_known_checksums(mirror: Server, tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KNOWN_SHA256, RESNET56, "0" * 64)
    with pytest.raises(ArchiveError, match="not the public teacher resnet56: its SHA-256 is"):
        fetch_teachers(root=tmp_path)
    monkeypatch.setitem(KNOWN_SHA256, RESNET56, hashlib.sha256(resnet56).hexdigest())
    monkeypatch.setitem(KNOWN_SHA256, "cifar_teachers.tar", "1" * 64)
    with pytest.raises(DownloadError, match="not the expected file"):
        fetch_teachers(root=tmp_path, overwrite=True)
    (tmp_path / "cifar_teachers.tar").write_bytes(mirror.files["/mirror/cifar_teachers.tar"])
    with pytest.raises(ArchiveError, match="not the public file"):
        fetch_teachers(root=tmp_path)
    monkeypatch.delitem(KNOWN_SHA256, "cifar_teachers.tar")
    assert fetch_teachers(root=tmp_path) == [tmp_path / RESNET56]


def test_known_files_are_teachers() -> None:
    known = {name for collection in hub.COLLECTIONS for name in hub.teacher_files(collection)}
    assert set(KNOWN_SHA256) <= known
    assert len(hub.teacher_files("cifar_teachers")) == 6
    assert hub.teacher_files("tiny_imagenet_teachers") == {
        "tiny_imagenet_teachers/ResNet18_vanilla/ti_res18": "ResNet18"
    }


def test_a_checkout_in_a_folder_named_as_a_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    constructor = cifar_model_dict["resnet56"][0]
    path = f"/home/me/tiny_imagenet_teachers/cifar_teachers/mdistiller/download_ckpts/{RESNET56}"
    monkeypatch.setitem(cifar_model_dict, "resnet56", (constructor, path))
    assert hub.teacher_files("cifar_teachers")[RESNET56] == "resnet56"


def test_how_to_get_a_teacher_that_no_release_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of a run and the command know the same."""

    class TinyImageNet(CIFAR100):
        num_classes = 200
        model_family = "tiny_imagenet"

    monkeypatch.setitem(dataset_dict, "tiny", TinyImageNet)
    cfg = load_config(
        options=["DATASET.TYPE", "tiny", "DISTILLER.TEACHER", "ResNet18", "DISTILLER.STUDENT", "ResNet18"]
    )
    with pytest.raises(CheckpointError, match="mdistiller's release is not known to hold") as error:
        teacher_checkpoint(cfg)
    assert "sh download_ckpts.sh tiny_imagenet_teachers" in str(error.value)
    assert "releases/tag" not in str(error.value)


def test_a_tar_put_there_by_hand(tmp_path: Path, resnet56: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(teachers.MIRROR_VARIABLE, "http://127.0.0.1:1")  # would fail
    tar = make_tar(tmp_path / "cifar_teachers.tar", {RESNET56: resnet56})
    fetch_teachers(root=tmp_path)
    assert tar.exists()
    (tmp_path / RESNET56).unlink()
    make_tar(tar, {RESNET56: resnet56[:1000]})
    with pytest.raises(ArchiveError, match=f"delete {tar} and run the command again"):
        fetch_teachers(root=tmp_path)
    make_tar(tar, {"something": b"else"})
    with pytest.raises(ArchiveError, match="holds none of"):
        fetch_teachers(root=tmp_path)


def test_no_network_says_how_to_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(url: str, *_: object, **__: object) -> None:
        raise DownloadError(f"cannot reach {url}: no such name")

    monkeypatch.delenv(teachers.MIRROR_VARIABLE, raising=False)
    monkeypatch.setattr(teachers, "download", unreachable)
    with pytest.raises(DownloadError) as error:
        fetch_teachers(root=tmp_path)
    message = str(error.value)
    assert "https://github.com/megvii-research/mdistiller/releases/download/checkpoints/cifar_teachers.tar" in message
    assert f"put cifar_teachers.tar at {tmp_path}" in message
    assert "MDISTILLER_CKPT_URL" in message
    with pytest.raises(DownloadError, match=r"not known to hold tiny_imagenet_teachers\.tar"):
        fetch_teachers("tiny_imagenet_teachers", tmp_path)


def test_the_script_from_anywhere(mirror: Server, tmp_path: Path) -> None:
    """In a folder with a package of the same name, as another checkout is."""
    (tmp_path / "mdistiller").mkdir()
    (tmp_path / "mdistiller" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    environment = {**os.environ, "PYTHON": sys.executable}
    call = ["sh", str(ROOT / "download_ckpts.sh"), "cifar_teachers", "--root", "root"]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "good     resnet56" in done.stdout
    assert (tmp_path / "root" / RESNET56).is_file()


def test_the_script_says_what_is_not_installed(tmp_path: Path) -> None:
    bare = tmp_path / "python"  # without the packages of the environment
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(bare), "PYTHONPATH": ""}
    script = ["sh", str(ROOT / "download_ckpts.sh")]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "has no torch" in done.stderr
    assert "pip install -e" in done.stderr


class Bomb:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("pwned",))
