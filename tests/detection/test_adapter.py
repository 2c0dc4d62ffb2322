"""torchvision's detectors as records."""

import copy

import pytest
import torch
from detectors import pictures, tiny_config, tiny_detector
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from mdistiller.dense import dense_dict
from mdistiller.detection import adapter
from mdistiller.detection import cfg as config
from mdistiller.detection.adapter import (
    check_pair,
    facts_of,
    normalised,
    other_colours,
    pixels,
    same_input,
    seen_by,
    student_pass,
    teacher_pass,
)
from mdistiller.detection.distiller import DetectionDistiller
from mdistiller.detection.networks import COCO_IDS, build_detector, load_public
from mdistiller.registry import InputError

METHODS = list(dense_dict)


def losses_twice(detector, images, targets):
    """The losses of torchvision's forward and of the recorded pass, from one state of the generator."""
    torch.manual_seed(1)
    expected = detector(images, targets)
    torch.manual_seed(1)
    return expected, student_pass(detector, images, targets)


def test_the_recorded_pass_has_torchvisions_losses_bit_for_bit():
    expected, (record, losses, _) = losses_twice(tiny_detector().train(), *pictures())
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)
    boxes = sum(map(len, record.boxes))
    assert record.class_logits.shape == (boxes, 7) and record.box_deltas.shape == (boxes, 24)
    assert [f.shape[2] for f in record.maps] == [16, 8, 4, 2, 1]
    assert [f.shape for f in record.rpn_logits] == [(2, 1, s, s) for s in (16, 8, 4, 2, 1)]
    assert [len(a) for a in record.anchors] == [256, 64, 16, 4, 1]
    assert record.labels.max() == 6 and {0, 3} <= set(record.labels.tolist())


def test_a_detector_of_torchvision_itself_has_its_losses_too():
    torch.manual_seed(0)
    stock = fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=7, min_size=64, max_size=64
    ).train()
    expected, (_, losses, _) = losses_twice(stock, *pictures())
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def distiller_of(name, teacher=None, **kwargs):
    cfg, student = tiny_config(), tiny_detector()
    teacher = tiny_detector(seed=1) if teacher is None else teacher
    method = dense_dict[name](cfg.DISTILLER.get(name), facts_of(student), facts_of(teacher))
    return DetectionDistiller(student, teacher if method.has_teacher else None, method).train()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_steps_beside_the_detectors_own_losses(name):
    """The teacher stays out of the state and in eval mode; each view passes the student's box head once."""
    distiller, (images, targets) = distiller_of(name), pictures()
    passes = []
    distiller.student.roi_heads.box_head.register_forward_hook(lambda *args: passes.append(1))
    before = copy.deepcopy(distiller.outside)
    torch.manual_seed(1)
    _, losses = distiller(image=images, target=targets)
    sum(losses.values()).backward()
    assert len(passes) == (2 if distiller.method.virtual_view else 1)
    torch.manual_seed(1)
    own = distiller.student(images, targets)
    if name != "VRM":
        assert all(torch.equal(losses[key], own[key]) for key in own)
    assert set(losses) - set(own) or name == "NONE"
    assert all(p.grad is None or p.grad.isfinite().all() for p in distiller.parameters())
    state = distiller.state_dict()
    assert {key.split(".")[0] for key in state} <= {"student", "method"}
    assert not any(key.startswith("method") and "acclimated" not in key for key in state if "cls_score" in key)
    if distiller.outside is not None:
        assert not any(module.training for module in distiller.outside.modules() if module is not acclimated(distiller))
        after = distiller.outside.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.state_dict().items())


def acclimated(distiller):
    return getattr(distiller.method, "acclimated", None)


@pytest.mark.parametrize("name", ["KD", "DKD", "CWD", "PKD", "DIST", "VRM"])
def test_an_equal_teacher_gives_zero(name):
    """Both networks in eval mode, so that BatchNorm is the same function; see tests/dense for the other methods."""
    student = tiny_detector()
    distiller = distiller_of(name, copy.deepcopy(student))
    distiller.student.load_state_dict(student.state_dict())
    for module in distiller.student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    _, losses = distiller(image=pictures()[0], target=pictures()[1])
    for term in losses.keys() - {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}:
        if term != "loss_ce_virtual":
            assert losses[term].item() == pytest.approx(0, abs={"DIST": 1e-4, "VRM": 1e-14}.get(name, 0)), term


BLUE = ("INPUT.FORMAT", "BGR")
STATISTICS = [
    ("INPUT.FORMAT", "RGB"),
    BLUE,
    (*BLUE, "MODEL.PIXEL_MEAN", "[103.53,116.28,123.675]", "MODEL.PIXEL_STD", "[1.0,1.0,1.0]"),
    ("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]", "MODEL.PIXEL_STD", "[58.395,57.12,57.375]"),
]


@pytest.mark.parametrize("of_teacher", STATISTICS)
@pytest.mark.parametrize("of_student", STATISTICS)
def test_a_picture_of_one_colour_goes_through_every_statistic(of_student, of_teacher):
    """The mean of each channel is subtracted from that channel; the padding stays 0."""
    colour = [200.0, 100.0, 50.0]
    images = [torch.tensor(colour).view(3, 1, 1).expand(3, *size) / 255 for size in ((64, 64), (48, 64))]
    student, teacher = (tiny_detector(*options).eval() for options in (of_student, of_teacher))
    batch, _ = student.transform(images)
    seen = seen_by(teacher, student, batch)
    cfg = tiny_config("KD", *of_teacher)
    ordered = colour if cfg.INPUT.FORMAT == "RGB" else colour[::-1]
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    expected = [(c - m) / s for c, m, s in zip(ordered, mean, std, strict=True)]
    for picture, (height, width) in enumerate(seen.image_sizes):
        inside = seen.tensors[picture, :, :height, :width]
        assert inside.amax((1, 2)).tolist() == pytest.approx(expected, abs=1e-3)
        assert inside.amin((1, 2)).tolist() == pytest.approx(expected, abs=1e-3)
        assert not seen.tensors[picture, :, height:].any()
    assert (seen is batch) == same_input(student, teacher) == (of_student == of_teacher)


def test_the_virtual_view_changes_colours_only():
    student = tiny_detector().eval()
    batch, _ = student.transform(pictures()[0])
    image = pixels(student, batch)
    view = other_colours(image)
    assert view.shape == image.shape and view.min() >= 0 and view.max() <= 1 and not torch.equal(view, image)
    again = normalised(student, image, batch.image_sizes)
    assert torch.allclose(again.tensors, batch.tensors, atol=1e-5)
    grey = torch.full((1, 3, 4, 4), 0.5)
    assert other_colours(grey).std((2, 3)).max() < 1e-6


def test_the_teachers_record_is_on_the_students_boxes():
    student, teacher = tiny_detector().train(), tiny_detector(seed=1).requires_grad_(False).eval()
    record, _, batch = student_pass(student, *pictures())
    of_teacher = teacher_pass(teacher, batch, record)
    assert of_teacher.class_logits.shape == record.class_logits.shape
    assert not of_teacher.class_logits.requires_grad and not any(f.requires_grad for f in of_teacher.maps)
    with torch.no_grad():
        _, logits, deltas = adapter.boxes_pass(teacher, batch, record.boxes)
    assert torch.equal(of_teacher.class_logits, logits) and torch.equal(of_teacher.box_deltas, deltas)


def test_a_teacher_of_other_classes_or_strides_is_refused():
    facts = facts_of(tiny_detector())
    assert (facts.classes, facts.strides, facts.widths) == (6, (4, 8, 16, 32, 64), (16,) * 5)
    with pytest.raises(InputError, match="the teacher has 3 classes, the student 6"):
        check_pair(facts, facts_of(tiny_detector("MODEL.ROI_HEADS.NUM_CLASSES", "3")))
    other = type(facts)(6, (8, 16, 32, 64), (16,) * 4, facts.class_head)
    with pytest.raises(InputError, match="have strides"):
        check_pair(facts, other)


def test_torchvisions_detector_for_coco(monkeypatch):
    """Of its 91 outputs the 80 categories are taken, in their order, background last."""
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 64}
    stock = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91, **sizes).eval()
    for module in stock.modules():  # as with its public weights
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 0.0
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **how: stock.state_dict())
    name = "torchvision://fasterrcnn_resnet50_fpn"
    options = ["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"]
    cfg = config.load("configs/teachers/R50-torchvision.yaml", options)
    detector = build_detector(cfg).eval()
    load_public(detector, name, cfg)
    boxes = [torch.tensor([[4.0, 4, 40, 50]]), torch.tensor([[10.0, 2, 30, 40]])]
    with torch.no_grad():
        batch, _ = stock.transform(pictures()[0])
        own, _ = detector.transform(pictures()[0])
        assert torch.allclose(own.tensors, batch.tensors, atol=1e-5)
        _, logits, deltas = adapter.boxes_pass(stock, batch, boxes)
        _, taken, taken_deltas = adapter.boxes_pass(detector, batch, boxes)
    ids = torch.tensor(COCO_IDS)
    assert torch.allclose(taken, torch.cat([logits[:, ids - 1], logits[:, -1:]], 1), atol=1e-6)
    assert torch.allclose(taken_deltas, deltas.view(2, 90, 4)[:, ids - 1].flatten(1), atol=1e-6)
    assert (len(COCO_IDS), COCO_IDS[11], COCO_IDS[-1]) == (80, 13, 90)
    with pytest.raises(InputError, match=r"needs MODEL\.ROI_HEADS\.NUM_CLASSES 80, got 3"):
        load_public(detector, name, config.load("configs/_base_/R50.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "3"]))
    with pytest.raises(InputError, match="no detector torchvision://other"):
        load_public(detector, "torchvision://other", cfg)
