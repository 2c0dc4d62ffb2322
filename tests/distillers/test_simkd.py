"""SimKD: its loss against ``oracles/simkd.py`` and the reference's values, and the network that predicts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, maps
from golden_data import assert_golden, case_leaves, case_tensors, load_case, loss_cases
from method_cases import build, config, make_batch
from oracles import simkd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.SimKD import Predictor, SimKD, projector, simkd_loss
from mdistiller.functional import pool_to_common
from mdistiller.models import cifar_model_dict


def test_equals_the_formula():
    f_s, f_t = maps((3, 3), side=2)
    assert_agree(lambda s: simkd_loss(s, f_t.to(s.dtype)), lambda s: oracle.simkd_loss(s, f_t.tolist()), f_s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("simkd"))
def test_golden_values_gradients_and_predictions(case, dtype):
    given, expected = case_leaves(case, dtype), case_tensors(case, "out", dtype)["pred"]
    f_s, f_t = given["feat_s_0"], given["feat_t_0"]
    project = projector(f_s.shape[1], f_t.shape[1], case["hyperparameters"]["factor"])
    load_case(project, given, "param.proj.transfer.")
    classifier = load_case(nn.Linear(f_t.shape[1], expected.shape[1]), given, "param.cls_t.")
    projected, logits = Predictor(nn.Identity(), project, classifier, f_t.shape[2:]).head(f_s)
    torch.testing.assert_close(logits, expected)
    assert_golden(case, given, simkd_loss(*pool_to_common(projected, f_t)))
    for name, value in case_tensors(case, "after", dtype).items():
        torch.testing.assert_close(project.state_dict()[name.removeprefix("proj.transfer.")], value)


def test_student_projector_and_classifier_predict():
    distiller, batch = build("SIMKD"), make_batch("SIMKD")
    logits, losses = distiller(**batch, epoch=1)
    projected = distiller.projector(distiller.student(batch["image"])[1]["feats"][-1])
    torch.testing.assert_close(logits, distiller.teacher.fc(projected.mean((2, 3))), rtol=1e-4, atol=1e-5)
    f_t = distiller.teacher(batch["image"])[1]["feats"][-1]
    torch.testing.assert_close(losses["loss_kd"], F.mse_loss(projected, f_t))
    assert losses["loss_ce"] == 0
    distiller.eval()
    network = copy.deepcopy(distiller.deployed())
    assert {key.split(".")[0] for key in network.state_dict()} == {"student", "projector", "classifier"}
    torch.testing.assert_close(network(batch["image"]), distiller(image=batch["image"]))


def test_a_perfect_projection_predicts_as_the_teacher():
    distiller, images = build("SIMKD").eval(), make_batch("SIMKD")["image"]
    logits, features = distiller.teacher(images)
    network = Predictor(nn.Identity(), nn.Identity(), distiller.classifier, features["feats"][-1].shape[2:])
    torch.testing.assert_close(network.head(features["feats"][-1])[1], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [("MobileNetV2", "wrn_16_1"), ("resnet8", "vgg8")])
def test_maps_of_two_sizes_and_of_a_teacher_that_pools_another_map(student, teacher):
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in (student, teacher))
    distiller = SimKD(student, teacher, config("SIMKD")).train()
    logits, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    assert logits.shape == (2, 10) and torch.isfinite(losses["loss_kd"])


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"FACTOR": 4}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 1.0}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("SIMKD", values) == changed
