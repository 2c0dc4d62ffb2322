"""ICKD: its loss against ``oracles/ickd.py`` and the references' values, its two forms, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from golden_data import assert_golden, case_leaves, case_tensors, load_case, loss_cases
from method_cases import build, make_batch
from oracles import ickd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.ICKD import channel_correlations, ickd_loss

PARTS = {"0.": "conv2d.", "1.": "l2norm."}  # here and in the authors' code


@pytest.mark.parametrize(("form", "exponent"), [("cifar", 1), ("imagenet", 2)])
@pytest.mark.parametrize("images", [1, 3])
def test_equals_the_formula(images, form, exponent):
    f_s, f_t = maps((3, 3), side=2, images=images)
    assert_agree(
        lambda s: ickd_loss(s, f_t.to(s.dtype), form), lambda s: oracle.ickd_loss(s, f_t.tolist(), exponent), f_s
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("ickd"))
def test_golden_values_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    f_s, f_t = given["feat_s_0"], given["feat_t_0"]
    official = "ADLab" in case["source"]
    if official:
        embed = build_embedding(f_s.shape[1], f_t.shape[1], given)
        f_s = embed(f_s)
    assert_golden(case, given, ickd_loss(f_s, f_t, "cifar" if official else "imagenet"))
    if official:
        for name, value in case_tensors(case, "after", dtype).items():
            ours = name.removeprefix("embed_s.").replace("conv2d.", "0.").replace("l2norm.", "1.")
            torch.testing.assert_close(embed.state_dict()[ours], value)


def build_embedding(width_s, width_t, given):
    embed = nn.Sequential(nn.Conv2d(width_s, width_t, 1, bias=False), nn.BatchNorm2d(width_t))
    for ours, theirs in PARTS.items():
        load_case(embed[int(ours[0])], given, f"param.embed_s.{theirs}")
    return embed


def test_blind_to_order_of_positions_sign_and_size_of_the_map():
    f_s, f_t = maps((4, 4))
    expected = ickd_loss(f_s, f_t)
    torch.testing.assert_close(ickd_loss(-30 * f_s.flip(3), f_t.transpose(2, 3)), expected)
    torch.testing.assert_close(ickd_loss(f_s.repeat_interleave(2, 3), f_t), expected)
    assert ickd_loss(f_s, f_s) == 0 and ickd_loss(f_s, 5 * f_s) < 1e-12
    torch.testing.assert_close(ickd_loss(f_s, f_t, "imagenet"), expected / len(f_s))


def test_channels_without_anything_in_common_correlate_with_themselves_only():
    assert torch.equal(channel_correlations(torch.eye(3)[None, :, :, None]), torch.eye(3)[None])


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_finite_for_equal_channels(value):
    _, f_t = (x.float() for x in maps((3, 3)))
    assert_finite(lambda x: ickd_loss(x, f_t), torch.full((2, 3, 4, 4), value), largest=1.0)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(ickd_loss, maps((3, 3)))


def test_losses_are_the_parts():
    distiller, batch = build("ICKD"), make_batch("ICKD")
    logits, losses = distiller(**batch, epoch=1)
    map_s, map_t = (net(batch["image"])[1]["feats"][-1] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], 2.5 * ickd_loss(distiller.embed_s(map_s), map_t))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"FORM": "imagenet"}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 1.0}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("ICKD", values) == changed
