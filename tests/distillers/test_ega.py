"""EGA: its loss against ``oracles/ega.py`` and the reference's values, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, embeddings
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, config, make_batch
from oracles import ega as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.EGA import EGA, ega_loss
from mdistiller.models import cifar_model_dict


@pytest.mark.parametrize(("images", "weights"), [(1, (1.0, 0.3)), (3, (1.0, 0.3)), (4, (0.5, 2.0))])
def test_equals_the_formula(images, weights):
    f_s, f_t = embeddings((5, 5), images)
    assert_agree(
        lambda s: ega_loss(s, f_t.to(s.dtype), *weights), lambda s: oracle.ega_loss(s, f_t.tolist(), *weights), f_s
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("ega"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    loss = ega_loss(given["pooled_s"], given["pooled_t"], options["node_weight"], options["edge_weight"])
    assert_golden(case, given, loss)


def test_blind_to_order_shift_and_scale():
    f_s, f_t = embeddings((6, 6))
    order = torch.tensor([3, 0, 4, 1, 2])
    expected = ega_loss(f_s, f_t)
    torch.testing.assert_close(ega_loss(f_s[order], f_t[order]), expected)
    torch.testing.assert_close(ega_loss(3 * f_s + 1, 0.1 * f_t - 7), expected)
    assert ega_loss(f_s[:1], f_s[:1]).item() == pytest.approx(0, abs=1e-12)
    assert ega_loss(f_s, f_s, node_weight=0.0).item() == 0


def test_of_equal_networks_the_edges_have_no_gradient():
    """A square root has none at 0."""
    f_t = embeddings((6,))[0].float()
    for student in (f_t, torch.ones(5, 6)):
        student = student.clone().requires_grad_()
        loss = ega_loss(student, f_t)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_losses_are_the_parts_and_equal_widths_need_no_layer():
    distiller, batch = build("EGA"), make_batch("EGA")
    logits, losses = distiller(**batch, epoch=1)
    f_s, f_t = (net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], ega_loss(f_s, f_t))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert distiller.get_extra_parameters() == 0
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4"))
    assert isinstance(EGA(student, teacher, config("EGA")).embed, nn.Linear)


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"NODE_WEIGHT": 2.0}, {"loss_kd"}),
        ({"EDGE_WEIGHT": 1.0}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("EGA", values) == changed
