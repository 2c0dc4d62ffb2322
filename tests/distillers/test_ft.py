"""FT: its loss against ``oracles/ft.py`` and RepDistiller's values, its paraphraser, and its edges."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, make_batch
from oracles import ft as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.FT import ft_loss


@pytest.mark.parametrize("p", [1, 2])
def test_equals_the_formula(p):
    assert_agree(
        lambda s, t: 100 * ft_loss(s, t, p), lambda s, t: 100 * oracle.ft_loss(s, t, p), *maps((3, 5)), wrt=(0, 1)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("ft"))
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    assert case["hyperparameters"]["p1"] == 2
    assert_golden(case, given, ft_loss(given["feat_s_0"], given["feat_t_0"], case["hyperparameters"]["p2"]))


def test_blind_to_size_and_sign_and_finite_for_zeros():
    code_s, code_t = maps((3, 5))
    torch.testing.assert_close(ft_loss(-3 * code_s, code_t), ft_loss(code_s, code_t))
    assert ft_loss(code_s, code_s) == 0
    assert_finite(lambda x: ft_loss(x, code_t.float()), torch.zeros(2, 3, 4, 4), largest=1.0)
    assert_float32_under_autocast(ft_loss, maps((3, 5)))


def test_the_paraphraser_learns_the_teachers_map_alone_and_is_then_frozen():
    distiller, batch = build("FT", {"FT.PREPARE.EPOCHS": 30, "FT.PREPARE.LR": 0.05}), make_batch("FT")
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    last = distiller.teacher(batch["image"])[1]["feats"][-1].detach()
    first = F.mse_loss(distiller.paraphraser(last), last)
    facts = distiller.prepare(lambda epoch: iter([batch]), contextlib.nullcontext)
    assert facts["loss"] < 0.9 * first
    moved = {name.split(".")[0] for name, v in distiller.state_dict().items() if not torch.equal(v, before[name])}
    assert moved == {"paraphraser"}
    assert not any(p.requires_grad for p in distiller.paraphraser.parameters())
    module, settings = distiller.preparation()
    assert module is distiller.paraphraser and settings["LR"] == 0.05


def test_its_start_follows_from_the_seed_alone():
    states = [build("FT", {"EXPERIMENT.SEED": s}, seed=i).paraphraser.state_dict() for i, s in enumerate((0, 0, 1))]
    first, second, other = (state["encoder.0.weight"] for state in states)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_losses_are_the_parts():
    distiller, batch = build("FT"), make_batch("FT")
    _, losses = distiller(**batch, epoch=1)
    last = [net(batch["image"])[1]["feats"][-1] for net in (distiller.student, distiller.teacher)]
    expected = ft_loss(distiller.translator(last[0]), distiller.paraphraser.encoder(last[1]))
    torch.testing.assert_close(losses["loss_kd"], 200 * expected)
    assert distiller.translator[-2].num_features == 32  # half of the teacher's


@pytest.mark.parametrize("values", [{"RATE": 0.25}, {"P": 2}, {"LOSS.FEAT_WEIGHT": 2.0}], ids=str)
def test_keys_change_what_they_name(values):
    assert changed_by("FT", values) == {"loss_kd"}
