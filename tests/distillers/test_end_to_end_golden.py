"""Whole methods on whole networks against the reference's losses and gradient norms."""

import json

import pytest
import torch
from golden_data import fill_state, golden_dir

from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG
from mdistiller.models import cifar_model_dict
from mdistiller.registry import distiller_dict

SPARED = ("contrast.params",)  # CRD's settings and its normalisation, which are no weights
NUM_DATA, NEGATIVES = 200, 32
RECORD = json.loads((golden_dir() / "end_to_end.json").read_text())


def cases():
    for pair in RECORD["pairs"]:
        for method, expected in pair["methods"].items():
            if method in distiller_dict and "error" not in expected:
                yield pytest.param(pair, method, expected, id=f"{method}-{pair['teacher']}-{pair['student']}")


@pytest.mark.parametrize(("pair", "method", "expected"), list(cases()))
def test_golden_losses_and_gradients(pair, method, expected):
    cfg = CFG.clone()
    cfg.merge_from_list(["DISTILLER.TYPE", method, *expected["config_overrides"]])
    student, teacher = (cifar_model_dict[pair[role]][0](num_classes=100) for role in ("student", "teacher"))
    distiller = build_distiller(cfg, student, teacher, num_data=NUM_DATA)
    fill_state(distiller, scale=0.5, spared=SPARED)
    distiller = distiller.double().train()

    count = RECORD["batch"]
    image = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    target = (7 * torch.arange(count)) % 100
    index = torch.arange(count)
    negatives = torch.randint(0, NUM_DATA, (count, NEGATIVES), generator=torch.Generator().manual_seed(1))
    batch = {"image": image, "target": target, "index": index}
    batch["contrastive_index"] = torch.cat([index[:, None], negatives], dim=1)
    logits, losses = distiller(**batch, epoch=RECORD["epoch"])
    sum(loss.mean() for loss in losses.values()).backward()

    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected["losses"], rel=1e-6)
    assert logits.abs().sum().item() == pytest.approx(expected["logits_abs_sum"], rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(expected["student_grad_norm"], rel=1e-5)
    assert distiller.get_extra_parameters() == expected["extra_parameters"]
