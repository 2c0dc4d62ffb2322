"""The baseline sees the same images and computes the same losses as our own loop."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

from mdistiller.bench import old_loop
from mdistiller.dataset import Split, dataset_dict
from mdistiller.dataset.loader import BatchedImages
from mdistiller.dataset.views import Draws, Rotate90
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.batch import to_batch
from mdistiller.registry import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from runs import make_trainer, teacher_file


def drawn(seed: int, epoch: int):
    """Our draws for the baseline, image by image."""
    return lambda name, index: Draws.of_view(name, seed, epoch, torch.tensor([index]))


def as_pictures(data: BatchedImages, kind, epoch: int) -> old_loop.Pictures:
    return old_loop.Pictures(data.split, data.views, kind.mean, kind.std, drawn(data.seed, epoch))


@pytest.mark.parametrize("method", ["KD", "KD_TWO_VIEWS"])
@pytest.mark.parametrize("kind", ["digits", "shapes"])
def test_the_same_images(tmp_path, kind, method):
    options = {"DATASET__TYPE": kind, "DISTILLER__TYPE": method, "DISTILLER__TEACHER_CKPT": ""}
    if kind == "shapes":
        options |= {"DATASET__SHAPES__TRAIN_SIZE": 200, "DATASET__SHAPES__TEST_SIZE": 100, "DATASET__IMAGE_SIZE": 32}
        options |= {"DATASET__TRAIN_PER_CLASS": 0}
    classes = dataset_dict[kind].num_classes
    trainer = make_trainer(tmp_path, **options | {"DISTILLER__TEACHER_CKPT": teacher_file(tmp_path, classes=classes)})
    data = trainer.train_loader.dataset
    pictures = as_pictures(data, dataset_dict[kind], epoch=2)
    index = torch.arange(len(data))[:200]
    images, target, positions = default_collate([pictures[i] for i in index.tolist()])
    batch = data[2, index]
    assert torch.equal(target, batch["target"]) and torch.equal(positions, batch["index"])
    for field, image in images.items():
        torch.testing.assert_close(image, batch[field], rtol=1e-5, atol=1e-5)


def old_run(trainer, method_batches, epochs=1):
    """The baseline's losses, from the trainer's own start."""
    optimizer = torch.optim.SGD(
        trainer.distiller.get_learnable_parameters(),
        lr=trainer.cfg.SOLVER.LR,
        momentum=trainer.cfg.SOLVER.MOMENTUM,
        weight_decay=trainer.cfg.SOLVER.WEIGHT_DECAY,
    )
    return old_loop.train_epoch(trainer.distiller, method_batches, optimizer, epoch=1)


@pytest.mark.parametrize("method", ["KD", "KD_TWO_VIEWS", "VRM", "DCD"])
def test_five_steps_give_the_losses_of_our_loop(tmp_path, method):
    options = {"DISTILLER__TYPE": method, "DATASET__TRAIN_PER_CLASS": 4, "DATASET__IMAGE_SIZE": 16}
    options["DISTILLER__TEACHER_CKPT"] = teacher_file(tmp_path)
    ours, theirs = make_trainer(tmp_path / "a", **options), make_trainer(tmp_path / "b", **options)
    ours.distiller.train()
    own = [ours.run_step(to_batch(item, ours.precision)).total.item() for item in ours.train_loader]
    data = theirs.train_loader.dataset
    pictures = as_pictures(data, dataset_dict["digits"], epoch=1)
    order = [index.tolist() for _, index in theirs.train_loader.sampler]
    batches = DataLoader(pictures, batch_sampler=order)
    assert len(own) == 5
    assert old_run(theirs, batches) == pytest.approx(own, rel=2e-4)


def test_five_steps_of_kd_equal_the_loop_written_out(tmp_path):
    options = {
        "DISTILLER__TYPE": "KD",
        "DATASET__TRAIN_PER_CLASS": 4,
        "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path),
    }
    one, other = make_trainer(tmp_path / "a", **options), make_trainer(tmp_path / "b", **options)
    pictures = as_pictures(one.train_loader.dataset, dataset_dict["digits"], epoch=1)
    batches = list(DataLoader(pictures, batch_size=8))
    student, teacher, solver = other.distiller.student.train(), other.distiller.teacher, other.cfg.SOLVER
    velocity, expected = {}, []
    for images, target, _ in batches:
        logits = student(images["image"])[0]
        with torch.no_grad():
            logits_teacher = teacher(images["image"])[0]
        loss = 0.1 * F.cross_entropy(logits, target) + 0.9 * kd_loss(logits, logits_teacher, 4.0)
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        with torch.no_grad():
            for p, g in zip(student.parameters(), gradients, strict=True):
                g = g + solver.WEIGHT_DECAY * p
                velocity[p] = solver.MOMENTUM * velocity[p] + g if p in velocity else g
                p -= solver.LR * velocity[p]
        expected.append(loss.item())
    assert old_run(one, batches) == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_ours(tmp_path):
    trainer = make_trainer(tmp_path, DISTILLER__TYPE="NONE")
    kind, data = dataset_dict["digits"], trainer.val_loader.dataset
    tests = DataLoader(old_loop.Pictures(data.split, {"image": ("test", ())}, kind.mean, kind.std), 300)
    evaluate = next(hook for hook in trainer.hooks if type(hook).__name__ == "Evaluate")
    own = evaluate.score(trainer.distiller, trainer.val_loader)
    assert old_loop.validate(trainer.distiller, tests) == pytest.approx(own.headline, abs=1e-3)


def test_without_our_draws_pictures_differ_from_time_to_time():
    view = dataset_dict["shapes"].views["strong"]
    split = Split(torch.arange(3 * 32 * 32).view(1, 3, 32, 32).remainder(251).to(torch.uint8), torch.zeros(1))
    pictures = old_loop.Pictures(split, {"image": ("strong", view)}, (0.5,) * 3, (0.2,) * 3)
    seen = [pictures[0][0]["image"] for _ in range(4)]
    assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_a_view_that_pillow_was_not_taught_is_named():
    with pytest.raises(InputError, match="not Rotate90"):
        old_loop.view_of(None, (Rotate90(1),), old_loop.Numbers())
