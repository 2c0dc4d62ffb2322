"""Helpers of the registry-wide tests: build a method, make its batches, switch its terms on and off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from mdistiller.contract import contract_of
from mdistiller.dataset.negatives import Negatives
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG, check_config
from mdistiller.models import cifar_model_dict
from mdistiller.options import options_in
from mdistiller.registry import distiller_dict

CLASSES, SIZE, IMAGES, NEGATIVES = 10, 16, 8, 4
METHODS = sorted({cls: name for name, cls in reversed(distiller_dict.items())}.values())  # without second names
TEACHER_METHODS = [name for name in METHODS if contract_of(distiller_dict[name]).teacher]

# With which a few steps show that a method's own terms fall, where a weight of 1 does not.
FALLING = {
    # Banks start as noise, which is easily told from an embedding: it takes some steps to learn otherwise.
    "CRD": {"CRD.NCE.TEMPERATURE": 0.2, "CRD.NCE.MOMENTUM": 0.9, "CRD.NCE.K": 64}
    | {"SOLVER.BATCH_SIZE": 10, "SOLVER.EPOCHS": 30, "SOLVER.LR": 0.05},
    "CRLD": {"CRLD.TAU_WEAK": 0.0, "CRLD.TAU_STRONG": 0.0},  # a teacher of random weights is not sure
    "CRCD": {"CRCD.NCE.TEMPERATURE": 0.2, "CRCD.NCE.MOMENTUM": 0.9, "CRCD.NCE.K": 16, "CRCD.GRADIENT": "off"},
    "DKD": {"DKD.WARMUP": 0},
    "MDR": {"MDR.SM_EPOCHS": 2},  # as many as need be
    "NKD": {"NKD.GAMMA": 0.0},  # the other classes' cross-entropy is mostly the teacher's entropy
    "MGD": {"MGD.LOSS.FEAT_WEIGHT": 1e-3},  # a sum over all entries of a map
    "PKT": {"PKT.LOSS.FEAT_WEIGHT": 30000.0},  # a mean of differences of probabilities, 10^-5 at first
    "REVIEWKD": {"REVIEWKD.WARMUP_EPOCHS": 0},
    "SDD_NKD": {"SDD_NKD.GAMMA": 0.0, "SDD_NKD.WARMUP": 0},  # as NKD
    "SP": {"SP.LOSS.FEAT_WEIGHT": 300.0},  # a mean of squared differences of cosines, 10^-3 at first
    "WSLD": {"WSLD.T": 0.2},  # at 4 the cross-entropy is mostly the teacher's entropy
    "VID": {"VID.INIT_PRED_VAR": 0.1},  # from 5, most of the loss is the variance's logarithm
}


def config(method: str, values: dict[str, Any] | None = None) -> CfgNode:
    """Defaults for ``method``, with ``{"KD.TEMPERATURE": 2.0}`` merged, checked."""
    cfg = CFG.clone()
    cfg.merge_from_list(["DISTILLER.TYPE", method])
    cfg.merge_from_list([part for item in (values or {}).items() for part in item])
    check_config(cfg)
    return cfg


def build(method: str, values: dict[str, Any] | None = None, seed: int = 0) -> nn.Module:
    """The method on a small student and teacher with settled BatchNorm statistics, in training mode."""
    torch.manual_seed(seed)
    student, teacher = (cifar_model_dict[name][0](num_classes=CLASSES) for name in ("resnet8", "resnet14"))
    with torch.no_grad():
        for _ in range(5):
            teacher(torch.randn(32, 3, SIZE, SIZE))
    further = {name: cifar_model_dict["resnet8"][0](num_classes=CLASSES) for name in distiller_dict[method].networks}
    return build_distiller(config(method, values), student, teacher, IMAGES, further).train()


def make_batch(
    method: str, images: int = IMAGES, seed: int = 1, dtype: torch.dtype = torch.float32, size: int = SIZE
) -> dict[str, Tensor]:
    """A batch with random images in every view and all further fields of the method."""
    generator = torch.Generator().manual_seed(seed)
    batch = {
        field: torch.randn(images, 3, size, size, generator=generator).to(dtype)
        for field in contract_of(distiller_dict[method]).views
    }
    batch["target"] = torch.arange(images) % CLASSES
    batch["index"] = torch.arange(images)
    if contract_of(distiller_dict[method]).negatives:
        batch["contrastive_index"] = Negatives(torch.arange(IMAGES), NEGATIVES).draw(1, batch["index"])
    return batch


def total(distiller: nn.Module, batch: dict[str, Tensor], epoch: int = 1) -> Tensor:
    """The loss that a step minimises."""
    _, losses = distiller(**batch, epoch=epoch)
    return sum(loss.mean() for loss in losses.values())


def weights(method: str, ce: float, own: float) -> dict[str, float]:
    """Values for all weights of a method: of the cross-entropies, and of its own terms.

    Weights are the options of that kind; the keys of plain values that end in ``_WEIGHT``; and those that the method
    was registered with as ``weights``. Those of cross-entropies begin with ``CE``.
    """
    cls = distiller_dict[method]
    found = {}
    for key, option in options_in(cls.defaults or {}).items():
        last = key.split(".")[-1]
        if option.is_weight or last.endswith("_WEIGHT") or key in cls.weights:
            found[f"{cls.section}.{key}"] = ce if last.startswith("CE") else own
    return found
