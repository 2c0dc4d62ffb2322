"""Whole methods on whole networks against the reference's losses and gradient norms."""

import functools

import pytest
import torch
from golden_data import change, drawn_alike, filled_value, golden_images, golden_json, move_last_digit

from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG
from mdistiller.models import cifar_model_dict
from mdistiller.registry import distiller_dict

RECORD = golden_json("end_to_end.json")

SPARED = ("contrast.params",)  # CRD's settings and its normalisation, which are no weights
# Its margins follow from the teacher's batch norms as they are when it is built, which was before they were filled; and
# its teacher uses the batch's statistics, so that it cannot repeat what it said.
ON_FRESH_NETWORKS = ("OFD",)

# Beyond what the reference trains: its variances are neither optimised nor saved, and stay at their start.
TRAINED_HERE = {"VID": lambda distiller: sum(scale.numel() for scale in distiller.log_scales)}


def cases():
    for pair in RECORD["pairs"]:
        for method, expected in pair["methods"].items():
            if method in distiller_dict and "error" not in expected:
                yield pytest.param(pair, method, expected, id=f"{method}-{pair['teacher']}-{pair['student']}")


@torch.no_grad()
def fill(module, keys, prefix=""):
    """The reference's weights, at half their scale, of entries that the reference has too."""
    for key, entry in module.state_dict().items():
        if entry.is_floating_point() and (keys is None or key in keys) and key not in SPARED:
            entry.copy_(filled_value(prefix + key, entry.shape, scale=0.5))


def fresh(name):
    return cifar_model_dict[name][0](num_classes=100)


@functools.cache
def networks(student, teacher, moved):
    """Both in float64. The teacher has seen the images and only repeats what it said, which is the same for all."""
    built = {"student": student, "teacher": teacher}
    for role, name in built.items():
        built[role] = fresh(name)
        fill(built[role], None, prefix=f"{role}.")
        built[role].double()
        if moved:
            move_last_digit(built[role])
    images, teacher = golden_images(RECORD["batch"], 32).double(), built["teacher"]
    forward = teacher.eval().forward
    with torch.no_grad():
        remembered = forward(images)
    teacher.forward = lambda x: remembered if torch.equal(x, images) and not teacher.training else forward(x)
    return built["student"], teacher


def step(pair, method, expected, moved=False):
    """The method after its backward pass; its losses, the student's logits and gradient, by name."""
    cfg = CFG.clone()
    cfg.merge_from_list(["DISTILLER.TYPE", method, *expected["config_overrides"]])
    filled = method not in ON_FRESH_NETWORKS
    names = pair["student"], pair["teacher"]
    student, teacher = networks(*names, moved) if filled else map(fresh, names)
    student.zero_grad()
    shapes = dict(expected["extra_state"])
    num_data, _ = shapes.get("contrast.memory_v1", (1, 0))  # CRD's bank has a row for each training image
    distiller = build_distiller(cfg, student, teacher, num_data=num_data)
    fill(distiller, shapes if filled else None)
    distiller = distiller.double().train()
    if moved and not filled:
        move_last_digit(distiller)

    count = RECORD["batch"]
    image, target, index = golden_images(count, 32).double(), (7 * torch.arange(count)) % 100, torch.arange(count)
    negatives = torch.randint(num_data, (count, cfg.CRD.NCE.K), generator=torch.Generator().manual_seed(1))
    batch = {"image": image, "target": target, "index": index}
    batch["contrastive_index"] = torch.cat([index[:, None], negatives], dim=1)
    logits, losses = distiller(**batch, epoch=RECORD["epoch"])
    sum(loss.mean() for loss in losses.values()).backward()
    gradient = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    return distiller, {**losses, "logits": logits.detach(), "gradient": gradient}


@pytest.mark.parametrize(("pair", "method", "expected"), list(cases()))
def test_golden_losses_and_gradients(pair, method, expected):
    distiller, found = step(pair, method, expected)
    rel = dict.fromkeys(found, 1e-6) | {"gradient": 1e-5}
    if not drawn_alike():
        # Ten times what the last digit does. A ReLU that it takes below 0 takes its share of the gradient away.
        _, moved = step(pair, method, expected, moved=True)
        changes = {name: change(moved[name], value) for name, value in found.items()}
        rel = {name: max(rel[name], 10 * changes[name], 10 * changes["logits"]) for name in found}
        rel["gradient"] = max(rel["gradient"], 0.01)

    logits, gradient = found.pop("logits"), found.pop("gradient")
    assert found.keys() == expected["losses"].keys()
    for name, loss in found.items():
        assert loss.item() == pytest.approx(expected["losses"][name], rel=rel[name]), name
    assert logits.abs().sum().item() == pytest.approx(expected["logits_abs_sum"], rel=rel["logits"])
    assert gradient.norm().item() == pytest.approx(expected["student_grad_norm"], rel=rel["gradient"])
    of_reference = distiller.get_extra_parameters() - TRAINED_HERE.get(method, lambda _: 0)(distiller)
    assert of_reference == expected["extra_parameters"]
