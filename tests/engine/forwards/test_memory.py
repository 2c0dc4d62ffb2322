"""The teacher's outputs on the disk: what is read equals what is computed, whatever happens to the files."""

import errno
import hashlib
import json
import os
import random

import pytest
import torch
from runs import make_trainer, same_state, teacher_file, tiny_config

from mdistiller.dataset import cifar100
from mdistiller.dataset.views import Draws, apply_view
from mdistiller.engine.forwards import memory as teacher_memory
from mdistiller.engine.forwards.chain import put
from mdistiller.engine.forwards.rows import RowFile
from mdistiller.registry import InputError

HALF = {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True}


def run(folder, name, disk=True, **values):
    """A finished run of two epochs, and the number of images that its teacher computed while it trained."""
    values = {"SOLVER__EPOCHS": 2, "LOG__EVAL_FREQ": 9, **values}
    memory = {"SOLVER__TEACHER_MEMORY": "disk"} if disk else {}
    given = {"DISTILLER__TEACHER_CKPT": teacher_file(folder), **memory, **values}
    trainer = make_trainer(folder, EXPERIMENT__NAME=name, **given)
    computed = []

    def count(following, images, **kwargs):
        computed.append(len(images))
        return following(images, **kwargs)

    put(trainer.distiller.teacher, "share", count)
    trainer.train()
    return trainer, sum(computed)


def rows_of(folder):
    return sorted((folder / "teacher_memory").glob("*/epoch_*/*.rows"))


def weights(trainer):
    return trainer.distiller.state_dict()


@pytest.mark.parametrize(
    ("method", "half"),
    [("KD", {}), ("KD", HALF), ("VRM", {}), ("VRM", HALF), ("DIST", HALF), ("CRD", {}), ("KD_TWO_VIEWS", HALF)],
    ids=lambda value: value if isinstance(value, str) else "bf16" if value else "float32",
)
def test_read_equals_computed_bit_for_bit(tmp_path, method, half):
    """30 images in batches of 8: the last of 6. A reading run computes the first batch of one view only."""
    values = {"DISTILLER__TYPE": method, **half}
    plain, everything = run(tmp_path, "plain", disk=False, **values)
    filling, filled = run(tmp_path, "filling", **values)
    reading, computed = run(tmp_path, "reading", **values)
    assert same_state(weights(reading), weights(filling))
    torch.testing.assert_close(weights(filling), weights(plain), rtol=1e-4, atol=1e-4)
    assert filled == everything and computed == 8


def test_methods_and_workers_share_the_files(tmp_path):
    run(tmp_path, "filling", DISTILLER__TYPE="VRM")
    plain, _ = run(tmp_path, "plain", disk=False, DISTILLER__TYPE="KD", DISTILLER__ADD_KD=0.5)
    workers = {"DATASET__LOADER": "workers", "DATASET__NUM_WORKERS": 1}
    reading, computed = run(tmp_path, "reading", DISTILLER__TYPE="KD", DISTILLER__ADD_KD=0.5, **workers)
    assert same_state(weights(reading), weights(plain)) and computed == 8
    before = len(rows_of(tmp_path))
    run(tmp_path, "pooled", DISTILLER__TYPE="CRD")  # reads logits that are there, and keeps pooled features
    assert len(rows_of(tmp_path)) > before


def test_damaged_torn_and_misplaced_rows_are_computed_anew(tmp_path):
    expected, _ = run(tmp_path, "filling", DISTILLER__TYPE="KD")
    whole = {path: path.read_bytes() for path in rows_of(tmp_path)}
    dice = random.Random(0)
    for attempt in range(12):
        for number, (path, data) in enumerate(whole.items()):
            data = bytearray(data)
            if attempt % 4 == 0:
                data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
            elif attempt % 4 == 1:
                data = data[: dice.randrange(len(data))]
            elif attempt % 4 == 2:  # rows in each other's places
                size = len(data) // 30
                data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]
            elif number == 0:  # another epoch's file
                data = bytearray(list(whole.values())[1])
            path.write_bytes(data)
        trainer, computed = run(tmp_path, f"again{attempt}", DISTILLER__TYPE="KD")
        assert same_state(weights(trainer), weights(expected)) and 0 < computed < 60
        assert {path: path.read_bytes() for path in rows_of(tmp_path)} == whole  # mended


def test_a_run_that_is_resumed_within_an_epoch(tmp_path):
    values = {"DISTILLER__TYPE": "KD", "LOG__SAVE_EVERY_STEPS": 1, "SOLVER__EPOCHS": 2, "LOG__EVAL_FREQ": 9}
    values |= {"DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__TEACHER_MEMORY": "disk"}
    expected = make_trainer(
        tmp_path, EXPERIMENT__NAME="whole", SOLVER__TEACHER_MEMORY_DIR=str(tmp_path / "memory"), **values
    )
    expected.train()
    stopped = make_trainer(tmp_path, EXPERIMENT__NAME="stopped", **values)

    def stop(output):
        if stopped.step == 6:
            raise KeyboardInterrupt

    stopped.hooks[-1].after_step = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(tmp_path, EXPERIMENT__NAME="stopped", **values)
    resumed.train(resume=True)
    assert same_state(weights(resumed), weights(expected))


def test_a_full_disk_ends_the_writing_and_not_the_run(tmp_path, monkeypatch, capsys):
    expected, _ = run(tmp_path, "plain", disk=False, DISTILLER__TYPE="KD")
    real, written = os.pwrite, []

    def full(*arguments):
        written.append(1)
        if len(written) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    trainer, _ = run(tmp_path, "full", DISTILLER__TYPE="KD")
    assert same_state(weights(trainer), weights(expected)) and len(written) == 21
    said = capsys.readouterr()
    assert (said.out + said.err).count("writing ends, the run goes on: No space left on device") == 1


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    expected, _ = run(tmp_path, "plain", disk=False, DISTILLER__TYPE="KD")
    trainer, _ = run(tmp_path, "run", DISTILLER__TYPE="KD", SOLVER__TEACHER_MEMORY_DIR=str(tmp_path / "file" / "x"))
    assert same_state(weights(trainer), weights(expected))
    said = capsys.readouterr()
    assert "SOLVER.TEACHER_MEMORY: nothing is written" in said.out + said.err


@pytest.mark.parametrize(
    "values",
    [
        {"EXPERIMENT__SEED": 1},
        {"SOLVER__BATCH_SIZE": 10},
        {"DATASET__TRAIN_PER_CLASS": 4},
        {"SOLVER__AMP": "bf16"},
        {"SOLVER__TEACHER_MEMORY_FORMAT": "float16"},
        {"DATASET__MIXUP_ALPHA": 1.0},
        {"DISTILLER__TEACHER_INPUT.SIZE": 16},
        {"SOLVER__FAST_TEACHER": False},
    ],
    ids=lambda values: next(iter(values)),
)
def test_other_settings_have_another_folder(tmp_path, values):
    folders = [
        run(tmp_path, name, SOLVER__EPOCHS=1, DISTILLER__TYPE="KD", **given)[0].teacher_cache.folder
        for name, given in (("a", {}), ("b", values), ("c", {"SOLVER__LR": 0.01, "KD__TEMPERATURE": 2.0}))
    ]
    assert folders[0] == folders[2] != folders[1]
    assert json.loads((folders[1] / "about.json").read_text())["layout"] == 1


def test_another_recipe_has_another_file(tmp_path):
    run(tmp_path, "a", SOLVER__EPOCHS=1, DISTILLER__TYPE="KD")
    run(tmp_path, "b", SOLVER__EPOCHS=1, DISTILLER__TYPE="KD", DATASET__RANDOM_ERASING=0.5)
    first, second = rows_of(tmp_path)
    assert first.parent == second.parent and first.name != second.name


def test_float16_rounds_alike_when_filled_and_when_read(tmp_path):
    values = {"DISTILLER__TYPE": "KD", "SOLVER__TEACHER_MEMORY_FORMAT": "float16"}
    filling, _ = run(tmp_path, "filling", **values)
    reading, computed = run(tmp_path, "reading", **values)
    assert same_state(weights(reading), weights(filling)) and computed == 8


def test_a_mixture_is_part_of_the_identity(tmp_path):
    values = {"DISTILLER__TYPE": "KD", "DATASET__MIXUP_ALPHA": 1.0}
    expected, _ = run(tmp_path, "plain", disk=False, **values)
    run(tmp_path, "filling", **values)
    reading, computed = run(tmp_path, "reading", **values)
    assert same_state(weights(reading), weights(expected)) and computed == 8


def test_files_that_differ_from_the_teacher_are_not_used(tmp_path, monkeypatch, capsys):
    expected, _ = run(tmp_path, "plain", disk=False, DISTILLER__TYPE="KD")
    monkeypatch.setattr(teacher_memory, "fingerprint", lambda state: 0)
    run(tmp_path, "other", DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT=str(other_teacher(tmp_path)))
    trainer, computed = run(tmp_path, "run", DISTILLER__TYPE="KD")
    assert same_state(weights(trainer), weights(expected)) and computed >= 60
    said = capsys.readouterr()
    assert "differ from what the teacher computes here" in said.out + said.err


def other_teacher(folder):
    state = torch.load(teacher_file(folder), weights_only=True)
    state["model"]["fc.bias"] += 1
    torch.save(state, folder / "other")
    return folder / "other"


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("DIST_PLUS", "DIST_PLUS trains a part of its teacher, so its teacher computes in every step"),
        ("OFD", "OFD runs its teacher on the statistics of the batch, so its teacher computes in every step"),
        ("AT", "AT reads the teacher's maps, which are computed in every step"),
    ],
)
def test_who_is_not_served_is_told_why(tmp_path, capsys, method, reason):
    expected, _ = run(tmp_path, "plain", disk=False, DISTILLER__TYPE=method, SOLVER__EPOCHS=1)
    trainer, computed = run(tmp_path, "disk", DISTILLER__TYPE=method, SOLVER__EPOCHS=1)
    assert same_state(weights(trainer), weights(expected)) and computed >= 30
    assert capsys.readouterr().out.count(reason) == 1


def test_one_place_is_chosen(tmp_path):
    with pytest.raises(InputError, match=r"SOLVER\.CACHE_TEACHER True is TEACHER_MEMORY memory"):
        tiny_config(tmp_path, DISTILLER__TYPE="KD", SOLVER__CACHE_TEACHER=True, SOLVER__TEACHER_MEMORY="disk")
    with pytest.raises(InputError, match=r"SOLVER\.CACHE_TEACHER needs equal images in every epoch"):
        tiny_config(tmp_path, DISTILLER__TYPE="KD", SOLVER__TEACHER_MEMORY="memory")


def test_rows_of_a_large_file_are_read_one_by_one(tmp_path, monkeypatch):
    values = torch.arange(40, dtype=torch.uint8).view(5, 8).numpy()
    file = RowFile(tmp_path / "epoch" / "a.rows", "identity", 8)
    file.write([3, 1, 7, 0, 9], values)
    monkeypatch.setattr("mdistiller.engine.forwards.rows.READ_AHEAD", 0)
    found, valid = RowFile(tmp_path / "epoch" / "a.rows", "identity", 8).read([9, 2, 3])
    assert valid.tolist() == [True, False, True] and (found[[0, 2]] == values[[4, 0]]).all()
    assert not RowFile(tmp_path / "epoch" / "a.rows", "another", 8).read([9])[1].any()


def test_the_draws_are_those_of_the_version_in_the_identity():
    """If this hash changes, stored outputs belong to other images: raise ``DRAWS`` in forwards/memory.py."""
    images = torch.arange(4 * 3 * 32 * 32).remainder(251).to(torch.uint8).view(4, 3, 32, 32)
    view = cifar100.CIFAR100.views["weak"]
    found = apply_view(view, images, Draws.of_view("weak", 3, 5, torch.tensor([0, 7, 40000, 2])))
    digest = hashlib.sha256(found.contiguous().numpy().tobytes()).hexdigest()[:16]
    assert (teacher_memory.DRAWS, digest) == (1, "a9ed7d440fb7219c")
