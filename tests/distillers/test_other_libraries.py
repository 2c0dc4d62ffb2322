"""Every method on networks of timm and torchvision: it takes a step, or refuses with the network's name."""

import re

import pytest
import torch
from method_cases import IMAGES, TEACHER_METHODS, config, make_batch

from mdistiller.engine.build import adapted, build_distiller
from mdistiller.registry import InputError

CNN = {"": "timm:test_resnet"}
VIT = {"": "timm:test_vit", "ARGS": {"img_size": 32, "patch_size": 8}}
PAIRS = {
    "CNN to CNN": (CNN, {"": "torchvision:mobilenet_v3_small"}),
    "CNN to ViT": (CNN, VIT),
    "ViT to CNN": (VIT, CNN),
    "zoo to ViT": ({"": "resnet8"}, VIT),
}
OF_POOLED_MAPS = r"must return \(logits, features\) with the map whose mean is features\['pooled_feat'\]"
SIZES = r"takes a student's map to a teacher's that is smaller, equal or twice as large, not \dx\d to \d+x\d+"
REFUSED = {
    **dict.fromkeys(("CATKD", "NORM", "NORM_CRD", "SDD_DKD", "SDD_KD", "SDD_NKD", "SIMKD"), OF_POOLED_MAPS),
    "AB": SIZES,
    "FCFD": r"the student \w+ does not say by get_stages\(\) how its stages run one by one",
    "FSP": "FSP compares Gram matrices, so both networks need maps of equal widths",
    "HSAKD": r"HSAKD repeats the stages of its networks, and the student \w+ does not offer them by get_tails\(\)",
    "OFD": r"the teacher \w+ does not say by get_bn_before_relu\(\)",
    "MDR": r"MDR relates stages one to one, but the student \w+ has \d stages and the teacher \w+ \d",
    "FITNET": SIZES,
}


def network(cfg, role, network):
    options = [f"DISTILLER.{role}", network[""]]
    for name, value in network.get("ARGS", {}).items():
        options += [f"DISTILLER.{role}_ARGS.{name}", value]
    cfg.merge_from_list(options)
    return adapted(cfg, role, 10)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_a_step_of_every_method(method, pair):
    torch.manual_seed(0)
    cfg = config(method, {"DATASET.IMAGE_SIZE": 32})
    teacher, student = (
        network(cfg, role, each) for role, each in zip(("TEACHER", "STUDENT"), PAIRS[pair], strict=True)
    )
    try:
        distiller = build_distiller(cfg, student, teacher, num_data=IMAGES).train()
    except InputError as error:
        assert re.search(REFUSED.get(method, "nothing"), str(error)), error
        return
    batch = make_batch(method, size=32)
    _, losses = distiller(**batch, epoch=1)
    sum(loss.mean() for loss in losses.values()).backward()
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    moved = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
    assert moved and all(torch.isfinite(gradient).all() for gradient in moved)
