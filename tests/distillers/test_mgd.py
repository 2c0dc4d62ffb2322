"""MGD: its loss against ``oracles/mgd.py`` and the reference's values, and its masks."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, maps
from golden_data import assert_golden, case_leaves, load_case, loss_cases
from method_cases import build, config, make_batch
from oracles import mgd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.MGD import MGD, masked, mgd_loss
from mdistiller.models import cifar_model_dict


def generation(width):
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


def test_equals_the_formula():
    torch.manual_seed(0)
    f_s, f_t = maps((2, 2), side=3)
    draw, layers = torch.tensor([[0.1, 0.9], [0.5, 0.3]], dtype=torch.float64), generation(2).double()
    numbers = [[p.tolist() for p in layer.parameters()] for layer in layers if isinstance(layer, nn.Conv2d)]
    assert_agree(
        lambda s: mgd_loss(layers.to(s.dtype)(masked(s, draw, 0.4)), f_t.to(s.dtype)),
        lambda s: oracle.mgd_loss(s, draw.tolist(), 0.4, numbers, f_t.tolist()),
        f_s,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("mgd"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    f_s, f_t = given["feat_s_0"], given["feat_t_0"]
    if "param.align.weight" in given:
        f_s = load_case(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1), given, "param.align.")(f_s)
    kept = masked(f_s, given["uniform"].flatten(1), options["lambda_mgd"])
    generated = load_case(generation(f_t.shape[1]), given, "param.generation.")(kept)
    assert_golden(case, given, options["alpha_mgd"] * mgd_loss(generated, f_t))


def test_masks_are_functions_of_seed_epoch_and_image():
    distiller = build("MGD")
    images, index = torch.zeros(8, 500, 1, 1), torch.arange(8)
    draw = distiller.draw(images, index, 1)
    assert draw.shape == (8, 500) and abs((draw < 0.15).float().mean() - 0.15) < 0.02
    assert torch.equal(distiller.draw(images[2:4], index[2:4], 1), draw[2:4])
    assert torch.equal(distiller.draw(images, None, 1), draw)
    assert not torch.equal(distiller.draw(images, index, 2), draw)
    assert not torch.equal(build("MGD", {"EXPERIMENT.SEED": 1}).draw(images, index, 1), draw)


def test_a_masked_channel_has_no_gradient():
    f_s, _ = maps((2, 2))
    kept = masked(f_s.requires_grad_(), torch.tensor([[0.1, 0.9], [0.4, 0.3]]), 0.4)
    kept.sum().backward()
    assert f_s.grad.amax((2, 3)).tolist() == [[0, 1], [1, 0]]


def test_losses_are_the_parts():
    distiller, batch = build("MGD"), make_batch("MGD")
    logits, losses = distiller(**batch, epoch=3)
    f_s, f_t = (net(batch["image"])[1]["feats"][-1] for net in (distiller.student, distiller.teacher))
    kept = masked(f_s, distiller.draw(f_s, batch["index"], 3), 0.15)
    torch.testing.assert_close(losses["loss_kd"], 1.2e-3 * mgd_loss(distiller.generation(kept), f_t))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


def test_maps_of_two_sizes():
    """The authors' code takes maps of one size only."""
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("MobileNetV2", "resnet8"))
    distiller = MGD(student, teacher, config("MGD")).train()
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    assert torch.isfinite(losses["loss_kd"])


@pytest.mark.parametrize(
    ("values", "changed"), [({"MASK_RATIO": 0.5}, {"loss_kd"}), ({"LOSS.FEAT_WEIGHT": 1.0}, {"loss_kd"})], ids=str
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("MGD", values) == changed
