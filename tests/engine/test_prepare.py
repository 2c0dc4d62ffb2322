"""A method's stage before training: when it runs, what its file is worth, and what a run makes of it."""

import json

import pytest
from runs import make_trainer, same_state, teacher_file, tiny_config

from mdistiller.dataset import Digits, Split
from mdistiller.engine.folder.checkpoint import fingerprint, load_checkpoint, save_checkpoint
from mdistiller.engine.folder.run_folder import run_folder
from mdistiller.engine.prepare import FOLDER, PreparationError, prepare
from mdistiller.engine.run import run

FAST = {"MDR__SM_EPOCHS": 2, "MDR__SM_LR_DECAY_STAGES": [1], "MDR__SM_WIDTH": 16}


def mdr(folder, name="a", **values):
    values = {"DISTILLER__TYPE": "MDR", "DISTILLER__TEACHER_CKPT": teacher_file(folder), **FAST, **values}
    return make_trainer(folder, EXPERIMENT__NAME=name, **values)


def files(folder):
    return sorted((folder / FOLDER).iterdir())


def prepared(folder, **values):
    """What the stage leaves in the method, and what the run reports of it."""
    trainer = mdr(folder, **values)
    prepare(trainer)
    state = {k: v.clone() for k, v in trainer.distiller.teacher_modules.state_dict().items()}
    return state, trainer.results["preparation"]


def test_three_students_pay_for_it_once(tmp_path):
    first, paid = prepared(tmp_path)
    second, shared = prepared(tmp_path, DISTILLER__STUDENT="resnet14")
    assert same_state(first, second)
    assert (paid["from_file"], shared["from_file"]) == (False, True)
    assert {k: v for k, v in paid.items() if k != "from_file"} == {k: v for k, v in shared.items() if k != "from_file"}
    assert paid["seconds"] > 0 and len(paid["smp"]) == len(paid["accuracy"]) == 3
    assert len(files(tmp_path)) == 1


def test_it_trains_and_computing_it_again_gives_the_same(tmp_path):
    (tmp_path / "other").mkdir()
    first, _ = prepared(tmp_path)
    second, paid = prepared(tmp_path / "other")
    assert same_state(first, second) and not paid["from_file"]
    assert not same_state(first, mdr(tmp_path).distiller.teacher_modules.state_dict())


def test_other_images_under_the_same_settings_have_another_file(tmp_path, monkeypatch):
    prepared(tmp_path)
    load = Digits.load

    def brighter(self):
        train, test = load(self)
        return Split(train.images.pixels() // 2 + 100, train.targets), test

    monkeypatch.setattr(Digits, "load", brighter)
    _, facts = prepared(tmp_path)
    assert not facts["from_file"] and len(files(tmp_path)) == 2


@pytest.mark.parametrize(
    "other",
    [{"EXPERIMENT__SEED": 1}, {"MDR__SM_EPOCHS": 3}, {"DATASET__TRAIN_PER_CLASS": 4}, {"SOLVER__BATCH_SIZE": 10},
     {"MDR__AUGMENT": "rotation"}, {"SOLVER__AMP": "bf16"}],
)  # fmt: skip
def test_what_it_depends_on_has_another_file(tmp_path, other):
    prepared(tmp_path)
    _, facts = prepared(tmp_path, **other)
    assert not facts["from_file"] and len(files(tmp_path)) == 2


def test_another_training_set_of_drawn_images_has_another_file(tmp_path):
    """Modules that 400 images had trained were once taken for a run on 200 of them."""
    shapes = {
        "DATASET__TYPE": "shapes", "DATASET__TRAIN_PER_CLASS": 1, "DATASET__SHAPES__TEST_SIZE": 100,
        "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path, classes=100), "SOLVER__BATCH_SIZE": 100,
    }  # fmt: skip
    for size in (200, 100):
        _, facts = prepared(tmp_path, DATASET__SHAPES__TRAIN_SIZE=size, **shapes)
        assert not facts["from_file"]
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("other", [{"SOLVER__LR": 0.01}, {"MDR__ANGLE_WEIGHT": 30.0}, {"SOLVER__EPOCHS": 5}])
def test_what_it_does_not_depend_on_shares_the_file(tmp_path, other):
    prepared(tmp_path)
    _, facts = prepared(tmp_path, **other)
    assert facts["from_file"]


def test_another_teachers_weights_have_another_file(tmp_path):
    prepared(tmp_path)
    path = tmp_path / "resnet8_10"
    state = load_checkpoint(path)
    state["model"]["conv1.weight"] += 0.01
    save_checkpoint(state, path)
    _, facts = prepared(tmp_path)
    assert not facts["from_file"] and len(files(tmp_path)) == 2


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:1000])


def change(**parts):
    def changed(path):
        content = load_checkpoint(path)
        save_checkpoint({**content, **parts}, path)

    return changed


def change_a_weight(path):
    content = load_checkpoint(path)
    next(iter(content["model"].values())).view(-1)[0] += 1
    save_checkpoint(content, path)


def write_what_is_not_finite(path):
    content = load_checkpoint(path)
    next(iter(content["model"].values())).view(-1)[0] = float("nan")
    save_checkpoint({**content, "fingerprint": fingerprint(content["model"])}, path)


def drop_facts(path):
    content = load_checkpoint(path)
    del content["facts"]
    save_checkpoint(content, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, "damaged"),
        (truncate, "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (change(settings={}), "made with other settings"),
        (change(model={"w": 1}), "w of model of"),
        (change_a_weight, "do not match its checksum"),
        (write_what_is_not_finite, "has values that are not finite"),
        (drop_facts, "does not hold"),
    ],
)
def test_a_file_that_is_no_good_is_computed_again(tmp_path, capsys, damage, message):
    first, _ = prepared(tmp_path)
    damage(*files(tmp_path))
    capsys.readouterr()
    second, facts = prepared(tmp_path)
    said = capsys.readouterr().out
    assert "WARNING" in said and message in said and "computing it again" in said
    assert same_state(first, second) and not facts["from_file"]
    _, facts = prepared(tmp_path)
    assert facts["from_file"]


def test_a_kill_in_the_stage_leaves_nothing_and_the_run_starts_it_again(tmp_path, monkeypatch):
    trainer = mdr(tmp_path)
    step = trainer.distiller._prepare_step
    monkeypatch.setattr(
        trainer.distiller,
        "_prepare_step",
        lambda batch, epoch, *rest: step(batch, epoch, *rest) if epoch < 2 else 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not (tmp_path / FOLDER).exists() and not (trainer.folder / "latest").exists()
    mdr(tmp_path, SOLVER__EPOCHS=1, SOLVER__LR_DECAY_STAGES=[]).train()


def test_a_stage_that_diverges_stops_the_run_and_is_not_kept(tmp_path):
    with pytest.raises(PreparationError, match="not finite; lower its learning rate"):
        prepared(tmp_path, MDR__SM_LR=1e30)
    assert not (tmp_path / FOLDER).exists()


def test_a_run_resumes_without_it(tmp_path):
    """The result is part of ``latest``: the stage isn't repeated, even with its file gone, and the bits agree."""
    whole = mdr(tmp_path, "whole")
    whole.train()
    part = mdr(tmp_path, "part", SOLVER__EPOCHS=2)
    part.train()
    for path in files(tmp_path):
        path.unlink()
    rest = mdr(tmp_path, "part")
    rest.train(resume=True)
    assert not files(tmp_path)
    assert rest.results["preparation"]["from_file"]
    assert same_state(whole.distiller.state_dict(), rest.distiller.state_dict())


def test_results_and_log_of_a_run(tmp_path):
    cfg = tiny_config(
        tmp_path, DISTILLER__TYPE="MDR", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path), SOLVER__EPOCHS=1,
        SOLVER__LR_DECAY_STAGES=[], **FAST
    )  # fmt: skip
    folder = run_folder(cfg)
    run(cfg)
    results = json.loads((folder / "results.json").read_text())
    assert results["preparation"]["seconds"] > 0 and not results["preparation"]["from_file"]
    assert "monitor/smp_teacher_1" in (folder / "metrics.csv").read_text()


@pytest.mark.parametrize(
    "values",
    [{"DISTILLER__TYPE": "KD"}, {"MDR__SM_TRAINING": "none"}, {"MDR__ANGLE_WEIGHT": 0.0, "MDR__LENGTH_WEIGHT": 0.0}],
)
def test_where_there_is_nothing_to_prepare(tmp_path, values):
    trainer = mdr(tmp_path, **values)
    prepare(trainer)
    assert "preparation" not in trainer.results and not (tmp_path / FOLDER).exists()


def test_a_method_without_a_result_to_keep(tmp_path, monkeypatch):
    trainer = mdr(tmp_path)
    monkeypatch.delattr(type(trainer.distiller), "preparation")
    prepare(trainer)
    assert trainer.results["preparation"]["from_file"] is False
    assert not (tmp_path / FOLDER).exists()


def test_something_else_of_that_name_is_left_alone(tmp_path):
    trainer = mdr(tmp_path)

    class Other(type(trainer.distiller)):
        def prepare(self, feat):
            raise AssertionError

    trainer.distiller.__class__ = Other
    prepare(trainer)
    assert "preparation" not in trainer.results
