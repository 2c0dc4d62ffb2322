"""SRRL: its losses against ``oracles/srrl.py`` and the references' values, its connector, and its edges."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_float32_under_autocast, changed_by, embeddings
from golden_data import assert_golden, case_leaves, load_case, loss_cases
from method_cases import build, make_batch
from oracles import srrl as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.SRRL import connector, srrl_losses
from mdistiller.functional import spatial_mean


def test_equals_the_formula():
    assert_agree(srrl_losses, oracle.srrl_losses, *embeddings((4, 4, 3, 3)), wrt=(0, 1, 2, 3))
    assert_float32_under_autocast(lambda *given: sum(srrl_losses(*given)), embeddings((4, 4, 3, 3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("srrl"))
def test_golden_losses_and_gradients(case, dtype):
    """One reference takes the pooled features, the other one the map."""
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    (prefix,) = {name[: -len("0.weight")] for name in given if name.endswith("0.weight")}
    last = given["feat_s_0"] if "feat_s_0" in given else given["pooled_s"][:, :, None, None]
    pooled_t = given["feat_t_0"].mean((2, 3)) if "feat_t_0" in given else given["pooled_t"]
    connect = load_case(connector(last.shape[1], pooled_t.shape[1]), given, prefix)
    classes, width = given["param.cls_t.weight"].shape
    classifier = load_case(nn.Linear(width, classes), given, "param.cls_t.")
    pooled = spatial_mean(connect(last))
    feat, logit = srrl_losses(pooled, pooled_t, classifier(pooled), given["logits_teacher"])
    assert_golden(case, given, options.get("alpha", 1.0) * feat + options.get("beta", 1.0) * logit)


@pytest.mark.parametrize("kind", ["map", "pooled"])
def test_losses_are_the_parts(kind):
    distiller, batch = build("SRRL", {"SRRL.CONNECTOR": kind}), make_batch("SRRL")
    logits, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    _, of_student = distiller.student(batch["image"])
    logits_t, of_teacher = distiller.teacher(batch["image"])
    last = of_student["feats"][-1] if kind == "map" else of_student["pooled_feat"][:, :, None, None]
    pooled = distiller.connector(last).mean((2, 3))
    torch.testing.assert_close(losses["loss_feat"], F.mse_loss(pooled, of_teacher["pooled_feat"]))
    torch.testing.assert_close(losses["loss_logit"], F.mse_loss(distiller.teacher.fc(pooled), logits_t))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


def test_the_teacher_itself_has_no_loss():
    distiller, batch = build("SRRL"), make_batch("SRRL")
    logits, features = distiller.teacher(batch["image"])
    pooled = features["pooled_feat"]
    assert sum(srrl_losses(pooled, pooled, distiller.teacher.fc(pooled), logits)) < 1e-10


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"CONNECTOR": "pooled"}, {"loss_feat", "loss_logit"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_feat"}),
        ({"LOSS.LOGIT_WEIGHT": 5.0}, {"loss_logit"}),
    ],
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("SRRL", values) == changed
