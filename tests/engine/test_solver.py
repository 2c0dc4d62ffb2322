"""Learning-rate schedules against numbers by hand; optimisers and their parameter groups."""

import math

import pytest
import torch
from runs import make_trainer, teacher_file, tiny_config
from torch import nn

from mdistiller.distillers import Vanilla
from mdistiller.engine.folder.checkpoint import CheckpointError
from mdistiller.engine.solver import build_optimizer, learning_rate
from mdistiller.registry import InputError


def solver(tmp_path, **values):
    return tiny_config(tmp_path, **{f"SOLVER__{key}": value for key, value in values.items()}).SOLVER


def test_step_decays_after_its_stages(tmp_path):
    s = solver(tmp_path, EPOCHS=240, LR=0.05, LR_DECAY_STAGES=[150, 180, 210])
    rates = {epoch: learning_rate(s, epoch, 0.9) for epoch in (1, 150, 151, 180, 181, 211, 240)}
    assert rates == pytest.approx({1: 0.05, 150: 0.05, 151: 5e-3, 180: 5e-3, 181: 5e-4, 211: 5e-5, 240: 5e-5})


def test_cosine_ends_at_its_minimum(tmp_path):
    s = solver(tmp_path, EPOCHS=10, LR=1.0, LR_MIN=0.1, LR_SCHEDULE="cosine")
    assert learning_rate(s, 1) == 1.0
    assert learning_rate(s, 6) == pytest.approx(0.55)
    assert learning_rate(s, 3, 0.5) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(s, 10, 1.0) == pytest.approx(0.1)


def test_exponential_decays_each_epoch(tmp_path):
    s = solver(tmp_path, EPOCHS=10, LR=2.0, LR_DECAY_RATE=0.5, LR_SCHEDULE="exponential", WARMUP_EPOCHS=1)
    assert [learning_rate(s, epoch, 0.5) for epoch in (2, 3, 4)] == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("schedule", ["step", "cosine", "exponential"])
def test_warm_up_is_linear_and_ends_at_the_rate(tmp_path, schedule):
    s = solver(tmp_path, EPOCHS=10, LR=1.0, LR_SCHEDULE=schedule, WARMUP_EPOCHS=2, WARMUP_LR=0.2, LR_DECAY_STAGES=[9])
    assert [learning_rate(s, *at) for at in ((1, 0.0), (1, 0.5), (2, 0.0), (2, 0.5), (3, 0.0))] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1.0]
    )


@pytest.mark.parametrize(
    ("kind", "cls"), [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW), ("RMSProp", torch.optim.RMSprop)]
)
def test_optimisers_take_their_settings(tmp_path, kind, cls):
    cfg = tiny_config(tmp_path, SOLVER__TYPE=kind, SOLVER__LR=0.3, SOLVER__WEIGHT_DECAY=0.01, SOLVER__MOMENTUM=0.7)
    optimizer = build_optimizer(cfg, Vanilla(nn.Linear(2, 2)))
    (group,) = optimizer.param_groups
    assert type(optimizer) is cls
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
    if kind != "AdamW":
        assert group["momentum"] == 0.7


def test_exponential_decays_every_so_many_epochs(tmp_path):
    """As in EfficientNet's recipe: 0.97 every 2.4 epochs."""
    values = {"SOLVER__LR_SCHEDULE": "exponential", "SOLVER__LR_DECAY_RATE": 0.97, "SOLVER__LR_DECAY_EPOCHS": 2.4}
    solver = tiny_config(tmp_path, SOLVER__EPOCHS=20, SOLVER__LR=1.0, **values).SOLVER
    falls = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4]  # 2.4, 4.8, 7.2, 9.6 epochs are behind at epochs 4, 6, 9, 11
    assert [learning_rate(solver, epoch) for epoch in range(1, 12)] == pytest.approx([0.97**n for n in falls])


def test_groups_keep_their_share_of_the_rate_and_no_parameter_comes_twice(tmp_path):
    class Two(Vanilla):
        def parameter_groups(self, cfg):
            return [{"params": [self.student.weight], "lr": 0.01}, {"params": list(self.student.parameters())}]

    optimizer = build_optimizer(tiny_config(tmp_path, SOLVER__LR=0.1), Two(nn.Linear(2, 2)))
    first, second = optimizer.param_groups
    assert (first["lr"], first["lr_scale"], second["lr_scale"]) == (0.01, pytest.approx(0.1), 1.0)
    assert len(second["params"]) == 1


class NamesItsOwn(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 3))
        self.table_without_name = nn.Parameter(torch.ones(2, 3))
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 1)
        self.head = nn.Linear(4, 2)

    def no_weight_decay(self):
        return {"table", "of_another_version"}


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSProp"])
def test_what_weight_decay_leaves_out(tmp_path, kind):
    class Two(Vanilla):
        def parameter_groups(self, cfg):
            head = list(self.student.head.parameters())
            return [{"params": head, "lr": 0.01}, {"params": list(self.student.parameters()), "weight_decay": 0.3}]

    def decays(method=Two, **values):
        student = NamesItsOwn()
        optimizer = build_optimizer(
            tiny_config(tmp_path, SOLVER__TYPE=kind, SOLVER__LR=0.1, SOLVER__WEIGHT_DECAY=0.2, **values),
            method(nn.Sequential(student) if method is Vanilla else student),
        )
        names = {id(p): name for name, p in student.named_parameters()}
        return [
            (group["lr"], group["weight_decay"], [names[id(p)] for p in group["params"]])
            for group in optimizer.param_groups
        ]

    tables, norm = ["table", "table_without_name"], ["norm.weight", "norm.bias", "conv.bias"]
    assert decays() == [
        (0.01, 0.2, ["head.weight", "head.bias"]),
        (0.1, 0.3, [*tables, "norm.weight", "norm.bias", "conv.weight", "conv.bias"]),
    ]
    assert decays(SOLVER__NO_DECAY="norm_bias") == [
        (0.01, 0.2, ["head.weight"]), (0.01, 0.0, ["head.bias"]),
        (0.1, 0.3, [*tables, "conv.weight"]), (0.1, 0.0, norm),
    ]  # fmt: skip
    assert decays(Vanilla, SOLVER__NO_DECAY="model") == [
        (0.1, 0.2, ["table_without_name", "conv.weight", "head.weight"]), (0.1, 0.0, ["table", *norm, "head.bias"]),
    ]  # fmt: skip


def test_weight_decay_leaves_out_the_same_in_dot_and_after_a_resume(tmp_path):
    values = {"SOLVER__NO_DECAY": "norm_bias", "SOLVER__LR": 0.1, "SOLVER__WEIGHT_DECAY": 0.5}
    for more in (
        {},
        {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__TRAINER": "dot"},
    ):
        trainer = make_trainer(tmp_path, **values, **more)
        state = trainer.state_dict()
        for group in trainer.optimizer.param_groups:
            assert {p.ndim > 1 for p in group["params"]} == {bool(group["weight_decay"])}
        make_trainer(tmp_path, **values, **more).load_state(state)
        with pytest.raises(CheckpointError, match=r"SOLVER\.NO_DECAY was norm_bias, is none"):
            make_trainer(tmp_path, **{**values, "SOLVER__NO_DECAY": "none"}, **more).load_state(state)


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_rates_grow_with_the_batch(tmp_path, rule, factor):
    """Every rate of the schedule does, the groups' own too."""
    values = {"BATCH_SIZE": 256, "EPOCHS": 10, "LR": 0.1, "LR_SCHEDULE": "cosine", "LR_MIN": 0.01, "WARMUP_EPOCHS": 2}
    plain, grown = solver(tmp_path, **values), solver(tmp_path, **values, LR_RULE=rule)
    for at in ((1, 0.5), (3, 0.0), (10, 1.0)):
        assert learning_rate(grown, *at) == pytest.approx(factor * learning_rate(plain, *at))
    cfg = tiny_config(tmp_path, SOLVER__BATCH_SIZE=256, SOLVER__LR=0.1, SOLVER__LR_RULE=rule)
    assert build_optimizer(cfg, Vanilla(nn.Linear(2, 2))).param_groups[0]["lr"] == pytest.approx(0.1 * factor)


def test_an_unknown_rule(tmp_path):
    with pytest.raises(InputError, match=r"SOLVER.LR_RULE: no choice named 'root'"):
        solver(tmp_path, LR_RULE="root")
