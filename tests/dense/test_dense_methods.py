"""Every method for detectors on records that are made by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdistiller.dense import DetectorFacts, Record, dense_dict
from mdistiller.dense.record import background_last, labels_background_last, within
from mdistiller.detection.cfg import defaults
from mdistiller.distillers.DIST import dist_loss
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.ReviewKD import hcl_loss
from mdistiller.registry import InputError

WITH_TEACHER = [name for name, method in dense_dict.items() if method.has_teacher]
SIDES = (8, 4, 2, 1, 1)
CLASSES = 3


def record(seed, width=4, boxes=6, labels=None, pictures=2, truth=True):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    anchors = []
    for side in SIDES:
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        centres = (torch.stack([x, y], 2).view(-1, 2) + 0.5) * 32 / side
        anchors.append(torch.cat([centres - 4, centres + 4], 1).double())
    return Record(
        maps=[draw(pictures, width, side, side).requires_grad_() for side in SIDES],
        class_logits=draw(boxes, CLASSES + 1).requires_grad_(),
        box_deltas=draw(boxes, 4 * CLASSES),
        boxes=[torch.rand(boxes // 2, 4)] * 2,
        labels=torch.arange(boxes) % (CLASSES + 1) if labels is None else torch.full((boxes,), labels),
        truth=[torch.tensor([[2.0, 2, 12, 10]]) if truth else torch.zeros(0, 4), torch.zeros(0, 4)],
        anchors=anchors,
        virtual_logits=draw(boxes, CLASSES + 1).requires_grad_(),
    )


def facts(width=4):
    head = nn.Linear(5, CLASSES + 1).double()
    return DetectorFacts(CLASSES, (4, 8, 16, 32, 64), (width,) * 5, head)


def build(name, student=4, teacher=4, **values):
    own = defaults().DISTILLER.get(name)
    for key, value in values.items():
        assert key in own
        own[key] = value
    torch.manual_seed(0)
    return dense_dict[name](own, facts(student), facts(teacher)).double()


def make_identity(method):
    """Let every adapter of equal widths return its input."""
    for module in method.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.dirac_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)
        if hasattr(module, "theta"):
            nn.init.zeros_(module.out.weight)


@pytest.mark.parametrize("name", [name for name in WITH_TEACHER if not name.startswith("REVIEWKD")])
def test_equal_records_give_zero(name):
    own, method = record(0), build(name, **({"WARMUP_ITERS": 0} if name == "FGFI" else {}))
    if name == "FGFI":  # whose adapter ends with a ReLU
        own = record(0)
        for f in own.maps:
            f.data.abs_()
    if name != "VRM":
        make_identity(method)
    losses = method(own, own)
    for term, loss in losses.items():
        if term != "loss_ce_virtual":
            assert loss.item() == pytest.approx(0, abs=1e-4 if name.startswith("DIST") else 1e-14), term


def test_an_adapter_that_returns_the_teachers_map_gives_zero():
    own = record(0)
    assert hcl_loss(own.maps, [f.detach() for f in own.maps]).item() == 0


@pytest.mark.parametrize("name", WITH_TEACHER)
@pytest.mark.parametrize(
    "case", [{}, {"labels": CLASSES}, {"truth": False}, {"boxes": 0}], ids=["", "no-object", "no-truth", "no-box"]
)
def test_gradients_are_finite(name, case):
    student, teacher = record(0, **case), record(1, **case)
    method = build(name, **({"WARMUP_ITERS": 0} if name == "FGFI" else {}))
    losses = method(student, teacher)
    total = sum(losses.values()) + 0 * sum(f.sum() for f in student.maps) + 0 * student.class_logits.sum()
    leaves = [*student.maps, student.class_logits, *(p for p in method.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    assert all(loss.isfinite() and loss.ndim == 0 for loss in losses.values())
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", [n for n in WITH_TEACHER if n not in ("CWD", "PKD")])
def test_other_widths_are_adapted(name):
    losses = build(name, student=3)(record(0, width=3), record(1))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("name", ["CWD", "PKD"])
def test_other_widths_are_refused_where_maps_are_compared_as_they_are(name):
    with pytest.raises(InputError, match=r"student 3, teacher 4; set MODEL.FPN.OUT_CHANNELS 4"):
        build(name, student=3)


def test_methods_on_logits_are_the_librarys_losses():
    student, teacher = record(0), record(1)
    z_s, z_t = student.class_logits, teacher.class_logits
    assert build("KD", TEMPERATURE=2.0, WEIGHT=3.0)(student, teacher)["loss_kd"] == 3 * kd_loss(z_s, z_t, 2.0)
    expected = dkd_loss(z_s, z_t, student.labels, 1.0, 0.25, 1.0)
    assert build("DKD")(student, teacher)["loss_dkd"] == expected
    assert build("REVIEWKD_DKD")(student, teacher)["loss_dkd"] == expected
    inter, intra = dist_loss(z_s, z_t, 1.0)
    losses = build("DIST", INTER_WEIGHT=2.0)(student, teacher)
    assert (losses["loss_inter"], losses["loss_intra"]) == (2 * inter, intra)


def test_mimic_sums_levels():
    student, teacher = record(0), record(1)
    method = build("MIMIC", LEVELS=2, WEIGHT=0.5)
    expected = sum(
        F.mse_loss(F.conv2d(s, conv.weight, conv.bias), t)
        for conv, s, t in zip(method.align, student.maps[:2], teacher.maps, strict=False)
    )
    assert len(method.align) == 2
    assert method(student, teacher)["loss_mimic"].item() == pytest.approx(0.5 * expected.item(), rel=1e-12)
    with pytest.raises(InputError, match=r"DISTILLER\.MIMIC\.LEVELS is 6, and the networks have 5 levels"):
        build("MIMIC", LEVELS=6)


def test_fgfi_begins_after_its_warm_up():
    student, teacher = record(0), record(1)
    method = build("FGFI", WARMUP_ITERS=2)
    values = [method(student, teacher)["loss_fgfi"].item() for _ in range(3)]
    assert values[:2] == [0, 0] and values[2] > 0
    assert method.state_dict()["steps.done"] == 3


def test_the_acclimated_head_is_held_near_its_start():
    method = build("DIST_PLUS", ACCLIMATE_RADIUS=0.1)
    head = method.acclimated
    assert {id(p) for p in head.parameters()} <= {id(p) for p in method.parameters()}
    assert method.parameter_rates(2.0) == [(list(head.parameters()), 0.02)]
    start = copy.deepcopy(head)
    with torch.no_grad():
        head.weight += 1
    method.hold_teacher()
    distance = (head.weight - start.weight).norm() / start.weight.norm()
    assert distance.item() == pytest.approx(0.1)
    assert not any("start" in key for key in method.state_dict())
    assert build("DIST_PLUS", ACCLIMATE_WEIGHT=0.0).parameter_rates(2.0) == []


def test_only_the_acclimated_head_learns_the_acclimation():
    student, teacher = record(0), record(1)
    method = build("DIST_PLUS")
    features = torch.randn(6, 5, dtype=torch.float64)
    logits = method.acclimated(features)
    loss = method(student, Record(**{**vars(teacher), "class_logits": logits}))["loss_acclimation"]
    of_student, of_head = torch.autograd.grad(loss, [student.class_logits, method.acclimated.weight], allow_unused=True)
    assert of_student is None and of_head.any()


def test_background_goes_last():
    assert background_last(torch.tensor([[9.0, 1, 2]])).tolist() == [[1, 2, 9]]
    assert labels_background_last(torch.tensor([0, 1, 2]), 2).tolist() == [2, 0, 1]
    logits, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 0, 2])
    rolled = F.cross_entropy(background_last(logits), labels_background_last(labels, 3))
    assert torch.allclose(rolled, F.cross_entropy(logits, labels), atol=1e-6)


def test_padding_is_cut():
    cut = within(torch.ones(2, 1, 3, 4), [(3, 2), (1, 4)])
    assert cut.sum((1, 2, 3)).tolist() == [6, 4]
