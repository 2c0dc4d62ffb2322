"""NST: its loss against ``oracles/nst.py``, both forms of its kernel, its edges, and its memory."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from golden_data import rounding
from method_cases import build, make_batch
from oracles import nst as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant
from torch.utils._python_dispatch import TorchDispatchMode

from mdistiller.distillers.NST import kernel_mean, nst_loss, single_stage_nst_loss
from mdistiller.registry import InputError

# The formula


@pytest.mark.parametrize("side", [1, 2, 4], ids=lambda side: f"{side * side} positions")
def test_equals_the_formula(side):
    """With few positions by second moments, with many by products of channels."""
    assert_agree(single_stage_nst_loss, lambda s, t: oracle.nst_loss(s, constant(t)), *maps(side=side), wrt=(0, 1))


@pytest.mark.parametrize("positions", [2, 9])
def test_both_forms_of_the_kernel(positions):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, c, positions, generator=generator, dtype=torch.float64) for c in (4, 6))
    expected = [oracle.kernel_mean(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert kernel_mean(a, b).item() == pytest.approx(sum(expected) / 3, rel=1e-12)


@pytest.mark.parametrize("side", [1, 3])
def test_gradient(side):
    f_s, f_t = maps(side=side)
    assert torch.autograd.gradcheck(lambda x: nst_loss([x], [f_t]), (f_s.requires_grad_(),))


# The formula: what it does not depend on, and where it is simple


def test_the_teacher_is_constant():
    f_s, f_t = (x.requires_grad_() for x in maps())
    nst_loss([f_s], [f_t]).backward()
    assert f_t.grad is None and f_s.grad.any()


def test_blind_to_order_repetition_scale_and_sign_of_channels():
    f_s, f_t = maps()
    expected = nst_loss([f_s], [f_t])
    torch.testing.assert_close(nst_loss([f_s[:, [2, 0, 1]]], [f_t]), expected)
    torch.testing.assert_close(nst_loss([torch.cat([f_s, f_s], 1)], [f_t]), expected)
    torch.testing.assert_close(nst_loss([f_s * torch.tensor([-2.0, 0.1, 30.0]).view(1, 3, 1, 1)], [f_t]), expected)
    assert expected > 0
    assert abs(nst_loss([f_s], [f_s]).item()) < rounding(f_s.dtype)


def test_of_two_maps_the_larger_is_pooled():
    f_s, f_t = maps()
    small, _ = maps(side=2, seed=3)
    torch.testing.assert_close(nst_loss([f_s], [small]), nst_loss([F.avg_pool2d(f_s, 2)], [small]))
    torch.testing.assert_close(nst_loss([small], [f_t]), nst_loss([small], [F.avg_pool2d(f_t, 2)]))


def test_stages_are_summed_and_must_be_equally_many():
    f_s, f_t = maps()
    torch.testing.assert_close(nst_loss([f_s, f_s], [f_t, f_t]), 2 * nst_loss([f_s], [f_t]))
    with pytest.raises(ValueError, match="longer"):
        nst_loss([f_s], [f_t, f_t])


# At the edges


@pytest.mark.parametrize("side", [1, 4])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_finite_for_maps_of_one_value(value, side):
    _, f_t = (x.float() for x in maps(side=side))
    assert_finite(lambda x: nst_loss([x], [f_t]), torch.full((2, 3, side, side), value), largest=10.0)


def test_a_dead_channel_gets_no_gradient():
    f_s, f_t = (x.float() for x in maps())
    f_s[:, 1] = 0
    f_s.requires_grad_()
    nst_loss([f_s], [f_t]).backward()
    assert not f_s.grad[:, 1].any() and f_s.grad[:, 0].any()


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(lambda f_s, f_t: nst_loss([f_s], [f_t]), maps())


def test_an_unknown_rule_for_stages_is_refused():
    with pytest.raises(InputError, match=r"NST\.STAGES: no choice named 'skip'"):
        build("NST", {"NST.STAGES": "skip"})


# The method


def test_losses_are_the_parts():
    distiller, batch = build("NST"), make_batch("NST")
    logits, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], 50 * nst_loss(feats_s[1:], feats_t[1:]))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"), [({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})], ids=str
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("NST", values) == changed


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize(("channels", "side"), [(96, 4), (6, 16)], ids=["many channels", "many positions"])
def test_nothing_is_as_large_as_all_products_of_pairs_of_channels(channels, side):
    """mdistiller writes out channels x channels x positions for each image."""
    f_s, f_t = (x.float() for x in maps((channels, channels), side=side))
    with LargestTensor() as largest:
        nst_loss([f_s], [f_t])
    assert largest.elements <= f_s.numel()
