"""DOT's optimiser against the reference's steps and SGD's, and its trainer."""

import re

import pytest
import torch
from golden_data import case_tensors, listed, loss_cases
from runs import make_trainer, teacher_file

from mdistiller.engine.dot import DistillationOrientedTrainer, is_task
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import InputError


def take_step(optimizer, parameters, kd, task):
    """One step with the given gradients; ``None`` for a parameter that a loss does not reach."""
    for p, gradient in zip(parameters, kd, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step_kd()
    for p, gradient in zip(parameters, task, strict=True):
        p.grad = None if gradient is None else gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("case", loss_cases("dot"))
def test_golden_steps(case):
    given, expected, options = case_tensors(case, "in"), case_tensors(case, "out"), case["hyperparameters"]
    parameters = [torch.nn.Parameter(start) for start in listed(given, "param_")]
    optimizer = DistillationOrientedTrainer(
        parameters,
        lr=options["lr"],
        momentum=options["momentum_task"],
        momentum_kd=options["momentum_kd"],
        dampening=options["dampening"],
        weight_decay=options["weight_decay"],
    )
    unreached = re.findall(r"parameter (\d+) receives no (\w+) gradient", case.get("note", ""))
    for step in range(options["steps"]):
        gradients = {kind: [g[step] for g in listed(given, f"grad_{kind}_")] for kind in ("kd", "task")}
        for i, kind in unreached:
            gradients[kind][int(i)] = None
        take_step(optimizer, parameters, **gradients)
        for i, p in enumerate(parameters):
            torch.testing.assert_close(p.detach(), expected[f"param_{i}"][step], rtol=1e-9, atol=1e-12)


def test_without_a_difference_of_momenta_it_is_sgd():
    torch.manual_seed(0)
    start = torch.randn(5, dtype=torch.float64)
    kd, task = torch.randn(2, 6, 5, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = DistillationOrientedTrainer([ours], lr=0.1, momentum=0.9, momentum_kd=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    for i in range(6):
        take_step(optimizer, [ours], [kd[i]], [task[i]])
        theirs.grad = kd[i] + task[i]
        sgd.step()
        torch.testing.assert_close(ours, theirs)


def test_steady_gradients_end_in_their_momenta():
    """A buffer's limit under a constant gradient g is g / (1 - momentum)."""
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = DistillationOrientedTrainer([p], lr=0.0, momentum=0.8, momentum_kd=0.95)
    for _ in range(500):
        take_step(optimizer, [p], [torch.ones_like(p)], [torch.ones_like(p)])
    state = optimizer.state[p]
    assert (state["momentum_buffer"].item(), state["momentum_kd_buffer"].item()) == pytest.approx((5.0, 20.0))


def test_gradients_of_the_distillation_are_used_once():
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = DistillationOrientedTrainer([p], lr=1.0)
    take_step(optimizer, [p], [torch.ones(1)], [torch.ones(1)])
    optimizer.step()
    assert p.item() == -3.0  # 1 and 1, then the task's 1 alone
    with pytest.raises(ValueError, match="momentum_kd must be 0 or more"):
        DistillationOrientedTrainer([p], lr=1.0, momentum_kd=-1.0)


def test_which_losses_are_the_tasks():
    assert [is_task(name) for name in ("ce", "loss_ce", "loss_ce_virtual", "ce_weak")] == [True] * 4
    assert [is_task(name) for name in ("loss_kd", "loss_cc", "loss_center", "kd_ce")] == [False] * 4


# The trainer


KD = {"SOLVER__TRAINER": "dot", "DISTILLER__TYPE": "KD", "SOLVER__EPOCHS": 1}


def trainer(folder, **values):
    return make_trainer(folder, **{**KD, "DISTILLER__TEACHER_CKPT": teacher_file(folder), **values})


def weights_after(folder, name, **values):
    run = trainer(folder, EXPERIMENT__NAME=name, SOLVER__LR=0.01, **values)
    run.train()
    return run.distiller.student.state_dict()


def test_without_a_difference_it_trains_as_the_usual_loop(tmp_path):
    dot, base, apart = (
        weights_after(tmp_path, name, SOLVER__TRAINER=kind, SOLVER__DOT__DELTA=delta)
        for name, kind, delta in (("a", "dot", 0.0), ("b", "base", 0.0), ("c", "dot", 0.075))
    )
    distance, difference = (
        sum((other[name] - base[name]).abs().sum().item() for name in base) for other in (dot, apart)
    )
    assert distance < 1e-3 * difference


def test_both_momenta_are_saved(tmp_path):
    """The adapters of ReviewKD are reached by the distillation alone."""
    run = trainer(tmp_path, DISTILLER__TYPE="REVIEWKD")
    run.train()
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    saved = run.state_dict()["optimizer"]["state"]
    buffers = {id(p): set(saved[number]) for number, p in enumerate(parameters)}
    assert all(buffers[id(p)] == {"momentum_kd_buffer"} for p in run.distiller.abfs.parameters())
    classifier = run.distiller.student.fc.weight  # ReviewKD's levels end before it
    assert buffers[id(classifier)] == {"momentum_buffer"}
    assert buffers[id(run.distiller.student.conv1.weight)] == {"momentum_buffer", "momentum_kd_buffer"}


def test_names_of_mdistiller_and_what_it_saves(tmp_path):
    run = trainer(tmp_path, SOLVER__TRAINER="crd_dot")
    assert isinstance(run, BaseTrainer) and run.optimizer.param_groups[0]["momentum"] == pytest.approx(0.825)
    assert run.optimizer.param_groups[0]["momentum_kd"] == pytest.approx(0.975)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"SOLVER__TYPE": "AdamW"}, "got SOLVER.TYPE AdamW"),
        ({"SOLVER__NESTEROV": True}, "got SOLVER.TYPE SGD with SOLVER.NESTEROV"),
        ({"SOLVER__DOT__DELTA": 0.2}, r"SOLVER\.DOT\.DELTA must leave"),
        ({"SOLVER__DOT__DELTA": -0.1}, r"SOLVER\.DOT\.DELTA must be at least 0"),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path, values, message):
    with pytest.raises(InputError, match=message):
        trainer(tmp_path, **values)


def test_a_method_without_distillation_is_refused(tmp_path):
    run = trainer(tmp_path, DISTILLER__TYPE="NONE")
    with pytest.raises(InputError, match="needs a method with a cross-entropy and a distillation loss; NONE has ce"):
        run.train()
