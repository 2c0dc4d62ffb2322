"""The loop and its hooks: what is measured, saved and resumed, on tiny runs.

Belongs here: a property of the loop and its hooks that a whole run in this process shows, of any method.
"""

import copy
import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import make_trainer, same_state, teacher_file, tiny_config
from torch import nn

from mdistiller.distillers import Vanilla
from mdistiller.engine.batch import to_batch
from mdistiller.engine.folder.checkpoint import CheckpointError, load_checkpoint, load_weights
from mdistiller.engine.hooks import Hook, NonFiniteLossError, TrainedTeacher, add_hooks
from mdistiller.engine.task import Classification, Score
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.engine.utils import AverageMeter, accuracy, validate

KD = {"DISTILLER__TYPE": "KD_TWO_VIEWS"}


class StopAfter(Hook):
    """Ends the run in the middle of an epoch, as a crash would, and keeps the state of that moment."""

    def __init__(self, trainer, step):
        super().__init__(trainer)
        self.stop_at, self.saved = step, None

    def after_step(self, output):
        if self.trainer.step == self.stop_at:
            self.saved = self.trainer.state_dict()
            raise KeyboardInterrupt


def outcome(trainer):
    """All that a finished run leaves except times."""
    state = trainer.state_dict()
    state["results"] = {k: v for k, v in state["results"].items() if k not in ("seconds", "images_per_second")}
    state["hooks"].pop("Clock")
    state.pop("config")  # names the folder
    return state


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True},
        {"SOLVER__EMA_DECAY": 0.9, "SOLVER__TYPE": "AdamW"},
        {
            "SOLVER__TYPE": "RMSProp",
            "SOLVER__LR": 1e-3,
            "SOLVER__LR_SCHEDULE": "exponential",
            "SOLVER__EMA_DECAY": 0.99,
            "DATASET__COLOR_JITTER": 0.4,
            "DATASET__RANDAUGMENT": 1,
            "DATASET__RANDOM_ERASING": 0.5,
            "DATASET__MIXUP_ALPHA": 0.8,
            "DATASET__CUTMIX_ALPHA": 1.0,
            "DATASET__LABEL_SMOOTHING": 0.1,
        },
    ],
    ids=["float32", "bf16", "ema-adamw", "strong recipe"],
)
@pytest.mark.parametrize("step", [4, 6], ids=["between epochs", "inside an epoch"])
def test_resumed_run_equals_the_uninterrupted_one_to_the_bit(tmp_path, values, step):
    values = {**KD, **values, "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path)}
    whole = make_trainer(tmp_path / "whole", **values)
    whole.train()

    first = make_trainer(tmp_path / "parts", **values)
    stop = StopAfter(first, step)
    first.hooks.append(stop)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    torch.manual_seed(99)  # another process has other generators
    second = make_trainer(tmp_path / "parts", **values)
    second.load_state(stop.saved)
    second.train()

    assert same_state(outcome(second), outcome(whole))
    assert (second.folder / "metrics.csv").read_bytes() == (whole.folder / "metrics.csv").read_bytes()


def test_what_is_trained_of_the_teacher_is_saved_scored_and_kept_out_of_its_file(tmp_path, capsys):
    path = teacher_file(tmp_path)
    original, content = load_weights(path), Path(path).read_bytes()
    values = {"DISTILLER__TYPE": "DIST_PLUS", "DISTILLER__TEACHER_CKPT": path, "SOLVER__EPOCHS": 2}
    trainer = make_trainer(tmp_path, **values)
    results = trainer.train()
    saved = load_checkpoint(trainer.folder / "latest")["model"]
    of_teacher = {key.removeprefix("teacher."): value for key, value in saved.items() if key.startswith("teacher.")}
    assert sorted(of_teacher) == ["fc.bias", "fc.weight", "layer3.0.downsample.0.weight"]
    assert not any(torch.equal(value, original[key]) for key, value in of_teacher.items())
    assert Path(path).read_bytes() == content
    for key, value in trainer.distiller.teacher.state_dict().items():
        assert torch.equal(value, of_teacher.get(key, original[key])), key
    evaluate = Classification().evaluate
    after = evaluate(trainer.distiller.teacher, trainer.val_loader).values
    assert results["teacher"]["after"] == {"top1": after["top1"], "top5": after["top5"]}
    assert results["teacher"]["top1"] == evaluate(teacher_of(trainer, original), trainer.val_loader).headline
    written = json.loads((trainer.folder / "results.json").read_text())
    assert written["teacher"] == results["teacher"]
    line = f"Teacher after training: top-1 {after['top1']:.2f}, {results['teacher']['top1']:.2f} before"
    assert line in capsys.readouterr().out


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_a_trained_teacher_is_scored_with_the_student_and_its_loss_warned_of_once(
    tmp_path, capsys, monkeypatch, held_out
):
    values = {"DISTILLER__TYPE": "DIST_PLUS", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__EPOCHS": 5}
    trainer = make_trainer(tmp_path, **values, LOG__EVAL_FREQ=2, DATASET__VAL_FRACTION=held_out)
    trainer.results["teacher"]["top1"] = 90.0
    scores = [90.0] * bool(held_out) + [89.5, 88.5, 88.0] + [87.0] * bool(held_out)  # at the end the test images
    scores = iter([Score(value, {"top1": value}, 1) for value in scores])
    monkeypatch.setattr(TrainedTeacher, "_evaluate", lambda hook, loader: next(scores))
    results = trainer.train()
    assert next(scores, None) is None and results["teacher"]["after"] == {"top1": 87.0 if held_out else 88.0}
    with open(trainer.folder / "metrics.csv") as file:
        column = [row[f"{'val' if held_out else 'test'}_acc_teacher"] for row in csv.DictReader(file)]
    assert column == ["", "89.5", "", "88.5", "88.0"]
    output = capsys.readouterr().out
    assert output.count("DIST_PLUS trains the teacher in part; the teacher has") == 1
    assert "the teacher has top-1 88.50 after epoch 4, and had 90.00 before" in output


def teacher_of(trainer, state):
    teacher = copy.deepcopy(trainer.distiller.teacher)
    teacher.load_state_dict(state)
    return teacher


def test_a_frozen_teacher_is_scored_once(tmp_path):
    results = make_trainer(tmp_path, **KD, SOLVER__EPOCHS=1, DISTILLER__TEACHER_CKPT=teacher_file(tmp_path)).train()
    assert "top1" in results["teacher"] and "after" not in results["teacher"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_of_the_device_and_of_workers_train_alike_to_the_bit(tmp_path, channels_last):
    values = {**KD, "SOLVER__CHANNELS_LAST": channels_last, "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path)}
    states = []
    for loader, workers in (("device", 0), ("workers", 1)):
        trainer = make_trainer(tmp_path / loader, **values, DATASET__LOADER=loader, DATASET__NUM_WORKERS=workers)
        trainer.train()
        states.append(outcome(trainer))
    assert same_state(*states)


def test_a_batch_made_on_the_device_is_not_copied(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__CHANNELS_LAST=True)
    item = next(iter(trainer.train_loader))
    batch = to_batch(item, trainer.precision)
    assert all(batch[key].data_ptr() == item[key].data_ptr() for key in item)


def test_resume_from_the_file_goes_on_after_the_last_epoch(tmp_path):
    make_trainer(tmp_path, SOLVER__EPOCHS=2).train()
    resumed = make_trainer(tmp_path, SOLVER__EPOCHS=3)
    resumed.train(resume=True)
    with (resumed.folder / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    assert resumed.step == 12


def test_averages_are_over_images_not_batches(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=1, SOLVER__LR=1e-30)
    trainer.train()
    student = trainer.distiller.student.train()
    trainer.train_loader.set_epoch(1)
    losses, hits, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in trainer.train_loader:
            logits = student(batch["image"])[0]
            losses += F.cross_entropy(logits, batch["target"], reduction="sum").item()
            hits += (logits.argmax(1) == batch["target"]).sum().item()
            count += len(logits)
    assert trainer.row["train_loss"] == pytest.approx(losses / count, rel=1e-5)
    assert trainer.row["train_acc"] == pytest.approx(100 * hits / count)
    assert trainer.row["loss/ce"] == pytest.approx(trainer.row["train_loss"])
    assert trainer.results["images_seen"] == count == 30


class Watched(Vanilla):
    """Watches the number of images of each step."""

    def forward_train(self, image, target, **kwargs):
        self.monitors = {"images": torch.tensor(float(len(image)))}
        return super().forward_train(image, target)


def test_what_a_method_monitors_is_logged_and_is_no_loss(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=1)
    trainer.distiller = Watched(trainer.distiller.student)
    trainer.train()
    sizes = [len(batch["target"]) for batch in trainer.train_loader]
    assert trainer.row["monitor/images"] == pytest.approx(sum(n * n for n in sizes) / sum(sizes))
    assert trainer.row["train_loss"] == pytest.approx(trainer.row["loss/ce"])


def test_every_view_counts_as_an_image_seen(tmp_path):
    trainer = make_trainer(tmp_path, **KD, SOLVER__EPOCHS=1, DISTILLER__TEACHER_CKPT=teacher_file(tmp_path))
    trainer.train()
    assert trainer.results["images_seen"] == 60


@pytest.mark.parametrize(("kd_weight", "of_one"), [(2.0, 4), (0.0, 1)])
def test_every_copy_that_the_method_makes_counts_as_an_image_seen(tmp_path, kd_weight, of_one):
    values = {"MDR__ANGLE_WEIGHT": 0.0, "MDR__LENGTH_WEIGHT": 0.0, "MDR__KD_WEIGHT": kd_weight, "SOLVER__EPOCHS": 1}
    trainer = make_trainer(tmp_path, DISTILLER__TYPE="MDR", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path), **values)
    shown = []
    trainer.distiller.student.register_forward_hook(
        lambda module, args, output: shown.append(len(args[0]) * module.training)
    )
    trainer.train()
    assert trainer.results["images_seen"] == of_one * 30 == sum(shown)


def test_non_finite_loss_stops_and_names_step_terms_rate_and_images(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__LR=1e20)
    with pytest.raises(NonFiniteLossError, match=r"step [23] .*ce (nan|inf).*learning rate 1e\+20.*images \["):
        trainer.train()


def non_finite_at(trainer, step):
    """The trainer's loss becomes NaN at that step, whatever the weights are."""
    run_step = trainer.run_step

    def struck(batch):
        output = run_step(batch)
        return dataclasses.replace(output, total=output.total * float("nan")) if trainer.step + 1 == step else output

    trainer.run_step = struck


@pytest.mark.parametrize(
    ("every", "left", "good"),
    [(0, r"latest holds the last good state; continue", 4), (1, r"latest_previous holds the last good state; copy", 5)],
)
def test_the_message_names_the_last_good_state_after_what_happened(tmp_path, every, left, good):
    """A state that was saved right before the bad step leads to it again."""
    trainer = make_trainer(tmp_path, LOG__SAVE_EVERY_STEPS=every)
    non_finite_at(trainer, 7)
    with pytest.raises(NonFiniteLossError, match=rf"(?s)^the loss is not finite at step 7 .*\. /.*{left}.*SOLVER\.LR"):
        trainer.train()
    name = "latest_previous" if every else "latest"
    assert load_checkpoint(trainer.folder / name)["step"] == good


@pytest.mark.parametrize("step", [4, 6], ids=["last of an epoch", "within one"])
def test_weights_that_diverged_are_not_saved(tmp_path, step):
    """The losses up to here are finite; the next one would not be."""

    class Diverge(Hook):
        def after_step(self, output):
            if self.trainer.step == step:
                with torch.no_grad():
                    self.trainer.distiller.student.conv1.weight.mul_(1e30)

    trainer = make_trainer(tmp_path, LOG__SAVE_EVERY_STEPS=2)
    add_hooks(trainer, [Diverge])
    with pytest.raises(
        NonFiniteLossError, match=rf"after step {step} .*student\.conv1\.weight.*latest holds the last good"
    ):
        trainer.train()
    assert load_checkpoint(trainer.folder / "latest")["step"] == step - 2


def test_a_network_whose_score_is_not_finite_is_not_saved(tmp_path):
    """Statistics that training itself does not read may be spoilt."""

    class Spoil(Hook):
        def after_epoch(self):
            if self.trainer.epoch == 2:
                self.trainer.distiller.student.bn1.running_var.fill_(float("nan"))

    trainer = make_trainer(tmp_path)
    add_hooks(trainer, [Spoil])
    trainer.hooks.insert(0, trainer.hooks.pop(next(n for n, h in enumerate(trainer.hooks) if isinstance(h, Spoil))))
    with pytest.raises(NonFiniteLossError, match=r"scored after step 8 \(epoch 2\): nan .*latest holds the last good"):
        trainer.train()
    assert load_checkpoint(trainer.folder / "latest")["epoch"] == 1
    assert json.loads((trainer.folder / "results.json").read_text())["last"]["epoch"] == 1


def test_results_are_valid_json_whatever_a_hook_measures(tmp_path):
    class Measure(Hook):
        def after_epoch(self):
            self.trainer.results["mine"] = {"ratio": float("nan"), "all": [float("inf"), 1.0]}

    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=1)
    add_hooks(trainer, [Measure])
    trainer.train()
    results = json.loads((trainer.folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["mine"] == {"ratio": None, "all": [None, 1.0]}


def test_last_best_and_mean_of_last(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=4, LOG__MEAN_OF_LAST=2)
    results = trainer.train()
    with (trainer.folder / "metrics.csv").open() as file:
        scores = [float(row["test_acc"]) for row in csv.DictReader(file)]
    assert results["last"]["top1"] == scores[-1]
    assert results["best"]["top1"] == max(scores)
    assert results["best"]["split"] == "test"
    assert results["mean_of_last"]["top1"] == pytest.approx(sum(scores[-2:]) / 2)
    assert results["mean_of_last"]["evaluations"] == 2


def test_with_a_validation_split_the_test_split_is_scored_once_at_the_end(tmp_path):
    trainer = make_trainer(tmp_path, DATASET__VAL_FRACTION=0.2)
    seen = []
    original = trainer.test_loader
    trainer.test_loader = _Counting(original, seen)
    results = trainer.train()
    assert len(seen) == 2  # last and best
    assert results["best"]["picked_on"] == "validation"
    assert "val_acc" in trainer.row and "test_acc" not in trainer.row
    best = make_trainer(tmp_path / "again", DATASET__VAL_FRACTION=0.2)
    best.distiller.student.load_state_dict(load_checkpoint(trainer.folder / "student_best")["model"])
    assert results["best"]["top1"] == Classification().evaluate(best.distiller, best.test_loader).headline
    assert results["last"]["top1"] == Classification().evaluate(trainer.distiller, original).headline


class _Counting:
    def __init__(self, loader, seen):
        self.loader, self.seen = loader, seen

    def __iter__(self):
        self.seen.append(1)
        return iter(self.loader)


def test_evaluation_frequency_leaves_cells_empty_and_always_scores_the_last_epoch(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EPOCHS=3, LOG__EVAL_FREQ=2)
    trainer.train()
    with (trainer.folder / "metrics.csv").open() as file:
        assert [bool(row["test_acc"]) for row in csv.DictReader(file)] == [False, True, True]


def test_files_of_a_run(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **KD,
        LOG__SAVE_CHECKPOINT_FREQ=2,
        DISTILLER__TEACHER_CKPT=teacher_file(tmp_path),
        SOLVER__EMA_DECAY=0.5,
    )
    trainer.train()
    names = {path.name for path in trainer.folder.iterdir()}
    assert names == {
        "latest", "best", "epoch_2", "student_latest", "student_best", "student_2", "student_last", "student_ema",
        "latest_previous", "metrics.csv", "worklog.txt", "results.json", "train.events",
    }  # fmt: skip
    latest = load_checkpoint(trainer.folder / "latest")
    assert latest["epoch"] == 3
    assert not any(key.startswith("teacher.") for key in latest["model"])
    for name in ("student_last", "student_latest"):
        assert same_state(load_checkpoint(trainer.folder / name)["model"], dict(trainer.distiller.student.state_dict()))
    results = json.loads((trainer.folder / "results.json").read_text())
    assert results["status"] == "finished"
    assert results["teacher"]["top1"] >= 0
    assert results["ema"]["split"] == "test"


def test_exponential_average_follows_its_formula(tmp_path):
    trainer = make_trainer(tmp_path, SOLVER__EMA_DECAY=0.7, SOLVER__EPOCHS=1)
    trail = []

    class Watch(Hook):
        def after_step(self, output):
            trail.append(trainer.distiller.student.fc.bias.detach().clone())

    trainer.hooks.insert(0, Watch(trainer))
    trainer.train()
    expected = trail[0]  # the average starts at the first weights
    for bias in trail[1:]:
        expected = 0.7 * expected + 0.3 * bias
    average = load_checkpoint(trainer.folder / "student_ema")["model"]["fc.bias"]
    torch.testing.assert_close(average, expected)


def test_a_latest_file_of_mdistiller_resumes(tmp_path):
    """Its model has the prefix of DataParallel and the teacher in it, its best accuracy is a tensor."""
    values = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path)}
    source = make_trainer(tmp_path / "source", **values)
    source.train()
    old = {
        "epoch": 2,
        "model": {f"module.{key}": value for key, value in source.distiller.state_dict().items()},
        "optimizer": source.optimizer.state_dict(),
        "best_acc": torch.tensor([12.0]),
    }
    resumed = make_trainer(tmp_path / "resumed", **values)
    resumed.load_state(old)
    assert (resumed.epoch, resumed.step) == (3, 8)
    assert same_state(dict(resumed.distiller.state_dict()), dict(source.distiller.state_dict()))
    resumed.train()


def test_a_state_of_another_model_is_refused_and_changes_nothing(tmp_path):
    other = make_trainer(tmp_path / "other", DISTILLER__STUDENT="resnet14").state_dict()
    trainer = make_trainer(tmp_path / "mine")
    before = {key: value.clone() for key, value in trainer.distiller.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"another experiment: DISTILLER\.STUDENT was resnet14"):
        trainer.load_state(other)
    del other["config"]  # a file from elsewhere
    with pytest.raises(CheckpointError, match="groups of"):
        trainer.load_state(other)
    other["optimizer"] = trainer.optimizer.state_dict()
    with pytest.raises(CheckpointError, match=r"does not fit: not in the model: student\.layer1\.1"):
        trainer.load_state(other)
    assert same_state(dict(trainer.distiller.state_dict()), before)


class OneElementLosses(Vanilla):
    """Some public methods return losses of shape (1,), and take tuples of mdistiller's loaders."""

    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target)
        return logits, {"loss_ce": losses["ce"].unsqueeze(0)}


def test_mdistillers_way_in_python(tmp_path):
    """Any distiller, loaders with tuples, DataParallel, the trainer by its table; no config file."""
    images, labels = torch.randn(20, 3, 8, 8), torch.arange(20) % 4
    items = [(images[i : i + 10], labels[i : i + 10], torch.arange(i, i + 10)) for i in (0, 10)]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    distiller = nn.DataParallel(OneElementLosses(_WithFeatures(net)))
    cfg = tiny_config(tmp_path, SOLVER__EPOCHS=2)
    trainer = trainer_dict["base"]("mine", distiller, items, [item[:2] for item in items], cfg)
    trainer.train(resume=False)
    assert (tmp_path / "mine" / "student_best").exists()
    top1, top5, loss = validate([item[:2] for item in items], distiller)
    assert top1 == trainer.results["last"]["top1"]
    assert top5 == 100.0
    assert loss > 0
    assert trainer_dict["crd"] is BaseTrainer


class _WithFeatures(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x), {}


def test_accuracy_in_percent_with_fewer_classes_than_k():
    output = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.1], [0.2, 0.3, 0.5]])
    top1, top2, top5 = accuracy(output, torch.tensor([1, 2, 1]), topk=(1, 2, 5))
    assert (top1.item(), top2.item(), top5.item()) == pytest.approx((100 / 3, 200 / 3, 100.0))
    assert top1.shape == (1,)


def test_average_meter_weighs_by_count():
    meter = AverageMeter()
    meter.update(1.0, 3)
    meter.update(5.0, 1)
    assert (meter.val, meter.avg, meter.count) == (5.0, 2.0, 4)


def test_student_learns_real_digits_far_beyond_chance(tmp_path):
    trainer = make_trainer(
        tmp_path, DATASET__TRAIN_PER_CLASS=40, SOLVER__BATCH_SIZE=50, SOLVER__EPOCHS=12, SOLVER__LR_DECAY_STAGES=[8]
    )
    results = trainer.train()
    with (trainer.folder / "metrics.csv").open() as file:
        losses = [float(row["train_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.5 * losses[0]
    assert results["last"]["top1"] > 60  # chance is 10
