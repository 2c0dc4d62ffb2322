"""X+KD: the added term and its gradient are KD's, for every method, without a second pass of a network."""

import copy
import shlex

import pytest
import torch
import torch.nn.functional as F
from cli_runner import ROOT, run_tool
from method_cases import SIZE, TEACHER_METHODS, build, make_batch
from runs import make_trainer, same_state, teacher_file, tiny_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.distillers import Distiller
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.added_kd import add_kd
from mdistiller.registry import InputError

ADDED = {"DISTILLER.ADD_KD": 0.7, "DISTILLER.ADD_KD_TEMPERATURE": 3.0}


def settled(distiller):
    """In float64 and with BatchNorm in eval mode: what a network says of an image does not depend on its company."""
    for module in distiller.double().student.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return distiller


def gradients(distiller, loss):
    distiller.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


def views_of(batch):
    return [value for name, value in batch.items() if name.startswith("image")]


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_losses_and_gradient_are_the_methods_plus_kd(method):
    batch = make_batch(method, dtype=torch.float64)
    with_kd, without = settled(build(method, ADDED)), settled(build(method))
    logits, losses = with_kd(**batch, epoch=1)
    plain_logits, plain = copy.deepcopy(without)(**batch, epoch=1)
    term = losses.pop("loss_added_kd")
    assert torch.equal(logits, plain_logits)
    assert losses.keys() == plain.keys() and all(torch.equal(losses[name], plain[name]) for name in plain)

    def own_and_kd():
        _, own = without(**batch, epoch=1)
        with torch.no_grad():
            soft = [without.teacher(view)[0] for view in views_of(batch)]
        kd = sum(kd_loss(without.student(view)[0], z, 3.0) for view, z in zip(views_of(batch), soft, strict=True))
        return own, 0.7 * kd

    own, kd = own_and_kd()
    torch.testing.assert_close(term, kd)
    found = gradients(with_kd, sum(loss.mean() for loss in losses.values()) + term)
    expected = gradients(without, sum(loss.mean() for loss in own.values()) + kd)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_no_network_runs_more_often(method):
    counts, batch = [], make_batch(method)
    for values in ({}, ADDED):
        distiller, passes = build(method, values), {"student": [], "teacher": []}
        for role, found in passes.items():

            def count(network, args, output, found=found, role=role):
                in_eval = not any(module.training for module in network.modules())
                found.extend([len(args[0])] * (role == "student" or in_eval))

            getattr(distiller, role).register_forward_hook(count)
        distiller(**batch, epoch=1)
        counts.append(passes)
    without, with_kd = counts
    assert with_kd["student"] == without["student"]
    # A teacher that was never in eval mode is asked once for each view.
    assert with_kd["teacher"] == (without["teacher"] or [len(view) for view in views_of(batch)])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_pass_of_the_teacher_stays_on_the_folded_graph(tmp_path, weight):
    """The teacher's own code, by its first batch norm, runs only where graph and code are compared at the first step.

    A hook on the teacher itself sees what it would see otherwise.
    """
    values = {"DISTILLER__TYPE": "DIST", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__EPOCHS": 1}
    trainer = make_trainer(tmp_path, DISTILLER__ADD_KD=weight, SOLVER__LR_DECAY_STAGES=[], **values)
    teacher, own, answers = trainer.distiller.teacher, [], []
    teacher.register_forward_hook(lambda network, args, output: answers.append(len(output[0])))
    forward = teacher.bn1.forward
    teacher.bn1.forward = lambda x: own.append(len(x)) or forward(x)
    trainer.train()
    assert (own, answers) == ([4], [8, 8, 8, 6])


def test_kd_beside_dcd_and_beside_kd():
    """DCD+KD is DCD with LAMBDA 1; KD beside KD whose own term is at 0 is KD."""
    batch = make_batch("DCD")
    _, by_lambda = build("DCD", {"DCD.LAMBDA": 1.0})(**batch, epoch=1)
    _, added = build("DCD", {"DISTILLER.ADD_KD": 1.0})(**batch, epoch=1)
    torch.testing.assert_close(added["loss_added_kd"], by_lambda["loss_kd"])
    _, own = build("KD_TWO_VIEWS")(**make_batch("KD_TWO_VIEWS"), epoch=1)
    _, added = build("KD_TWO_VIEWS", {"DISTILLER.ADD_KD": 0.9, "KD.LOSS.KD_WEIGHT": 0.0})(
        **make_batch("KD_TWO_VIEWS"), epoch=1
    )
    torch.testing.assert_close(added["loss_added_kd"], own["loss_kd"])


class Toy(Distiller):
    """Calls its networks as ``script`` says: pairs of a role and what it is shown."""

    def __init__(self, *script):
        def net():
            return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 5))

        torch.manual_seed(0)
        super().__init__(net(), net())
        self.script = script

    def forward_train(self, image_weak, image_strong, target):
        weak, strong = image_weak, image_strong
        shown = {
            "weak": weak,
            "strong": strong,
            "both": torch.cat([weak, strong]),
            "swapped": torch.cat([strong, weak]),
            "in turn": torch.stack([weak, strong], 1).flatten(0, 1),
            "turned": weak.rot90(1, (2, 3)),
        }
        for role, view in self.script:
            with torch.set_grad_enabled(role == "student"):
                logits = getattr(self, role)(shown[view])
        return logits, {"ce": F.cross_entropy(self.student(shown["turned"]), target)}


def toy_batch(images=4):
    generator = torch.Generator().manual_seed(1)
    weak, strong = torch.randn(2, images, 3, SIZE, SIZE, generator=generator)
    return {"image_weak": weak, "image_strong": strong, "target": torch.zeros(images, dtype=torch.long)}


@pytest.mark.parametrize(
    ("script", "views"),
    [
        ([("student", "weak"), ("student", "strong"), ("teacher", "both")], ("weak", "strong")),
        ([("student", "both"), ("teacher", "swapped")], ("weak", "strong")),
        ([("student", "in turn"), ("teacher", "strong"), ("teacher", "weak")], ("weak", "strong")),
        ([("student", "weak"), ("student", "strong")], ("weak", "strong")),  # the teacher is asked in addition
        ([("student", "strong"), ("teacher", "weak")], ("strong",)),  # the student never sees the other
        ([("student", "strong"), ("student", "strong"), ("teacher", "strong")], ("strong",)),  # counts once
    ],
    ids=["apart", "together", "in turn", "without the teacher", "one view", "one view twice"],
)
def test_views_are_found_wherever_the_method_shows_them(script, views):
    distiller, batch = Toy(*script).train(), toy_batch()
    add_kd(distiller, 2.0, 4.0)
    for _ in range(2):  # the second time by what was found the first time
        _, losses = distiller(**batch)
        shown = [batch[f"image_{view}"] for view in views]
        expected = 2 * sum(kd_loss(distiller.student(view), distiller.teacher(view), 4.0) for view in shown)
        torch.testing.assert_close(losses["loss_added_kd"], expected)
        assert losses["loss_added_kd"].requires_grad
    _, losses = distiller(**toy_batch(3))  # the last batch of an epoch
    assert torch.isfinite(losses["loss_added_kd"])


def test_a_call_with_a_gradient_comes_first():
    distiller = Toy(("student", "weak")).train()
    add_kd(distiller, 1.0, 4.0)
    inner = distiller.forward_train

    def forward_train(image_weak, **rest):
        with torch.no_grad():
            distiller.student(image_weak)  # to look at, not to learn from
        return inner(image_weak, **rest)

    distiller.forward_train = forward_train
    _, losses = distiller(**toy_batch())
    assert losses["loss_added_kd"].requires_grad


def test_a_student_that_never_sees_the_images_as_they_are_is_refused():
    distiller = Toy(("student", "turned"), ("teacher", "turned")).train()
    add_kd(distiller, 1.0, 4.0)
    with pytest.raises(InputError, match=r"DISTILLER\.ADD_KD: Toy never calls its student"):
        distiller(**toy_batch())
    distiller.script = (("student", "weak"),)  # and the failed step leaves nothing behind
    _, losses = distiller(**toy_batch())
    assert not any({"forward", "_compiled_call_impl"} & vars(net).keys() for net in distiller.modules())
    assert "loss_added_kd" in losses


def test_a_student_in_pieces_counts_by_the_logits_it_gives():
    class Pieces(Distiller):
        def forward_train(self, image, target):
            return self.student[1](self.student[0](image)), {}

    toy = Toy()
    distiller, image = Pieces(toy.student, toy.teacher).train(), toy_batch()["image_weak"]
    add_kd(distiller, 1.0, 4.0)
    _, losses = distiller(image=image, target=None)
    torch.testing.assert_close(losses["loss_added_kd"], kd_loss(toy.student(image), toy.teacher(image), 4.0))


def test_nothing_is_added_in_evaluation_and_nothing_is_left_on_the_networks():
    distiller, batch = build("DIST", ADDED), make_batch("DIST")
    distiller(**batch, epoch=1)
    twin = copy.deepcopy(distiller)  # as the average of the weights copies the student
    assert not any("forward" in vars(network) for both in (distiller, twin) for network in both.modules())
    logits = distiller.eval()(image=batch["image"])
    torch.testing.assert_close(logits, distiller.student(batch["image"])[0])
    assert distiller.state_dict().keys() == build("DIST").state_dict().keys()
    distiller.train(), twin.train()
    assert twin(**batch, epoch=1)[1]["loss_added_kd"] == distiller(**batch, epoch=1)[1]["loss_added_kd"]


def test_it_falls_with_the_methods_losses_and_resumes_to_the_bit(tmp_path):
    values = {
        "DISTILLER__TYPE": "DIST",
        "DISTILLER__ADD_KD": 0.5,
        "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path),
        "LOG__SAVE_EVERY_STEPS": 6,
    }
    whole = make_trainer(tmp_path / "whole", **values)
    whole.train()
    assert "loss/loss_added_kd" in whole.row
    part = make_trainer(tmp_path / "part", **values, SOLVER__EPOCHS=2)
    part.train()
    rest = make_trainer(tmp_path / "part", **values)
    rest.train(resume=True)
    assert same_state(rest.distiller.state_dict(), whole.distiller.state_dict())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"DISTILLER__TYPE": "NONE"}, "DISTILLER.ADD_KD 1.0 needs a teacher, and NONE has none"),
        ({"DISTILLER__TYPE": "NONE_TWO_VIEWS"}, "use KD or KD_TWO_VIEWS"),
        ({"DISTILLER__ADD_KD": -1.0}, "DISTILLER.ADD_KD must be at least 0, got -1.0"),
        ({"DISTILLER__ADD_KD_TEMPERATURE": 0.0}, "DISTILLER.ADD_KD_TEMPERATURE must be above 0, got 0.0"),
    ],
)
def test_what_is_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        tiny_config(tmp_path, **{"DISTILLER__TYPE": "DIST", "DISTILLER__ADD_KD": 1.0, **values})


def test_by_the_command(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    command = (
        "--cfg configs/digits/dcd/res20_res8.yaml DATASET.TRAIN_PER_CLASS 2 SOLVER.BATCH_SIZE 10 SOLVER.EPOCHS 1 "
        f"SOLVER.DEVICE cpu DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {teacher_file(tmp_path)} "
        f"LOG.PREFIX {tmp_path}/output EXPERIMENT.NAME run DISTILLER.ADD_KD 1"
    )
    assert run_tool("train", shlex.split(command)).code == 0
    assert "loss_added_kd" in (tmp_path / "output" / "digits" / "run" / "metrics.csv").read_text()
    changed = run_tool("train", shlex.split(command + ".5 --resume"))
    assert changed.code == 2 and "DISTILLER.ADD_KD was 1.0, is 1.5" in changed.err
