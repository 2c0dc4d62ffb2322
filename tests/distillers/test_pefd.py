"""PEFD: its loss against ``oracles/pefd.py`` and the reference's values, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, changed_by, embeddings
from golden_data import assert_golden, case_leaves, load_case, loss_cases
from method_cases import build, make_batch
from oracles import pefd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.PEFD import pefd_loss


@pytest.mark.parametrize(("projectors", "images"), [(1, 1), (3, 2), (2, 4)])
def test_equals_the_formula(projectors, images):
    (h_t,) = embeddings((5,), images)
    projections = torch.stack([embeddings((5,), images, seed)[0] for seed in range(1, projectors + 1)])
    assert_agree(lambda p: pefd_loss([*p], h_t.to(p.dtype)), lambda p: oracle.pefd_loss(p, h_t.tolist()), projections)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("pefd"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    pooled, h_t = given["pooled_s"], given["pooled_t"]
    projections = [
        load_case(nn.Linear(pooled.shape[1], h_t.shape[1]), given, f"param.r{n}.linear.")(pooled)
        for n in range(1, options["projectors"] + 1)
    ]
    loss = pefd_loss(projections, h_t)
    assert loss.item() == pytest.approx(case["outputs"]["loss_pefd"], rel=1e-7 if dtype == torch.float64 else 1e-4)
    ce = F.cross_entropy(given["logits_student"], given["target"])
    kd = kd_loss(given["logits_student"], given["logits_teacher"], options.get("T", 4.0))
    assert_golden(case, given, options["gamma"] * ce + options["alpha"] * kd + options["beta"] * loss)


def test_only_the_direction_counts():
    (h_t,) = embeddings((5,))
    projections = [embeddings((5,), seed=seed)[0] for seed in (1, 2)]
    expected = pefd_loss(projections, h_t)
    torch.testing.assert_close(pefd_loss([3 * p for p in projections], 0.1 * h_t), expected)
    torch.testing.assert_close(pefd_loss(projections[::-1], h_t), expected)
    assert pefd_loss([h_t.abs()] * 3, h_t.abs()).item() == pytest.approx(0, abs=1e-12)
    assert pefd_loss([h_t.abs()], -h_t.abs()).item() == pytest.approx(2)


def test_dead_projections_have_no_gradient_and_cosine_zero():
    """The authors' code divides by zero."""
    h_t = torch.rand(2, 4)
    assert_finite(lambda p: pefd_loss([p, p], h_t), torch.full((2, 4), -1.0), largest=0.0)
    assert pefd_loss([torch.full((2, 4), -1.0)], h_t) == 1


def test_losses_are_the_parts():
    distiller, batch = build("PEFD"), make_batch("PEFD")
    logits, losses = distiller(**batch, epoch=1)
    h_s, h_t = (net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher))
    expected = 25 * pefd_loss([project(h_s) for project in distiller.projectors], h_t)
    torch.testing.assert_close(losses["loss_kd"], expected)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert len(distiller.projectors) == 3 and distiller.get_extra_parameters() == 3 * (64 * 64 + 64)


@pytest.mark.parametrize(
    ("values", "changed"), [({"PROJECTORS": 1}, {"loss_kd"}), ({"LOSS.FEAT_WEIGHT": 1.0}, {"loss_kd"})], ids=str
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("PEFD", values) == changed
