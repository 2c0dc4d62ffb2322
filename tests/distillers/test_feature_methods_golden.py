"""FitNet, AT, NST, VID, KDSVD, SP, PKT, RKD against the references' values and gradients: losses, whole methods."""

import pytest
import torch
from golden_data import assert_golden_gradients, case_tensors, listed, load_case, loss_cases
from method_cases import config
from torch import nn

from mdistiller.distillers._common import ConvReg
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.FitNet import hint_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.VID import VID, mean_regressor, vid_loss
from mdistiller.engine.build import build_distiller

METHODS = ("fitnet", "at", "nst", "vid", "kdsvd", "sp", "pkt", "rkd")
# mdistiller's KDSVD always computes in float32; and beyond the first directions its value depends on the signs that its
# decomposition happens to return.
REFERENCE_IN_FLOAT32 = ("kdsvd",)
CASES = [case for case in loss_cases(*METHODS) if case.values[0]["hyperparameters"].get("k", 1) == 1]


WHOLE = [case for case in CASES if "LOSS" in case.values[0]["hyperparameters"]]  # a method's section of the config
LOSS_ALONE = [case for case in CASES if case not in WHOLE]


def stages(given):
    return listed(given, "feat_s_"), listed(given, "feat_t_")


def fitnet(case, given, options):
    f_s, f_t = given["feat_s_0"], given["feat_t_0"]
    if "s_shape" in options:
        f_s = load_case(ConvReg(options["s_shape"], options["t_shape"]), given, "param.")(f_s)
    return hint_loss(f_s, f_t)


def vid(case, given, options):
    f_s, f_t = given["feat_s_0"], given["feat_t_0"]
    regressor = load_case(mean_regressor(f_s.shape[1], f_t.shape[1]), given, "param.regressor.")
    return vid_loss(regressor, given["param.log_scale"], f_s, f_t, options["eps"])


def kdsvd(case, given, options):
    maps = stages(given)
    if "RepDistiller" in case["source"]:  # a row for each position, a column for each channel
        maps = [[x.permute(0, 2, 3, 1) for x in side] for side in maps]
    return kdsvd_loss(*maps, options["k"])


LOSSES = {
    "fitnet": fitnet,
    "at": lambda case, given, options: at_loss(*stages(given), options["p"]),
    "nst": lambda case, given, options: nst_loss(*stages(given)),
    "vid": vid,
    "kdsvd": kdsvd,
    "sp": lambda case, given, options: sp_loss(*stages(given)),
    "pkt": lambda case, given, options: pkt_loss(given["pooled_s"], given["pooled_t"], options["eps"]),
    "rkd": lambda case, given, options: rkd_loss(
        given["pooled_s"], given["pooled_t"], options["squared"], options["eps"], options["distance_weight"],
        options["angle_weight"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", LOSS_ALONE)
def test_golden_losses_and_gradients(case, dtype):
    given = case_tensors(case, "in", dtype)
    for name in case["gradients"]:
        given[name].requires_grad_()
    loss = LOSSES[case["method"]](case, given, case["hyperparameters"])
    loss.backward()
    exact = dtype is torch.float64 and case["method"] not in REFERENCE_IN_FLOAT32
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7 if exact else 1e-4)
    if dtype is torch.float64:
        assert_golden_gradients(case, given, rel=1e-6 if exact else 1e-3)


class Given(nn.Module):
    """A network that says what it is told to."""

    def __init__(self, logits, given, side):
        super().__init__()
        self.like = nn.Parameter(logits.new_zeros(()))
        self.logits = logits
        self.features = {
            "feats": listed(given, f"feat_{side}_"),
            "preact_feats": listed(given, f"preact_{side}_"),
            "pooled_feat": given[f"pooled_{side}"],
        }

    def forward(self, x):
        return self.logits, self.features


def leaves(tree, prefix):
    for key, value in tree.items():
        yield from leaves(value, f"{prefix}.{key}") if isinstance(value, dict) else [f"{prefix}.{key}", value]


@pytest.mark.parametrize("case", WHOLE)
def test_golden_whole_methods(case):
    given, method = case_tensors(case, "in"), case["method"].upper()
    for name in case["gradients"]:
        given[name].requires_grad_()
    student, teacher = Given(given["logits_student"], given, "s"), Given(given["logits_teacher"], given, "t")
    cfg = config(method)
    cfg.merge_from_list(list(leaves(case["hyperparameters"], method)))
    distiller = build_distiller(cfg, student, teacher).double().train()
    own = {name.removeprefix("param."): value for name, value in given.items() if name.startswith("param.")}
    with torch.no_grad():
        for name, value in own.items():
            distiller.state_dict()[name].copy_(value)
    _, losses = distiller(image=None, target=given["target"], epoch=25)
    sum(losses.values()).backward()

    rel = 1e-4 if case["method"] in REFERENCE_IN_FLOAT32 else 1e-7
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(
        {name: case["outputs"][name] for name in losses}, rel=rel
    )
    given |= {f"param.{name}": p for name, p in distiller.named_parameters()}
    assert_golden_gradients(case, given, rel=10 * rel)
    for name, value in case_tensors(case, "after").items():
        torch.testing.assert_close(distiller.state_dict()[name], value, rtol=1e-7, atol=0)


@pytest.mark.parametrize("case", [case for case in WHOLE if case.values[0]["method"] == "vid"])
def test_golden_start_of_vids_variances(case):
    """The reference starts where the predicted variance is the configured one."""
    given, cfg = case_tensors(case, "in"), config("VID")
    cfg.merge_from_list(list(leaves(case["hyperparameters"], "VID")))
    distiller = VID(*(Given(given["logits_student"], given, side) for side in "st"), cfg)
    for number, scale in enumerate(distiller.log_scales):
        torch.testing.assert_close(scale.double(), given[f"param.log_scales.{number}"], rtol=1e-6, atol=0)
