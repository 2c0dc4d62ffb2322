"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mdistiller.contract import where
from mdistiller.registry import InputError


def build_optimizer(cfg: Any, distiller: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of ``SOLVER.TYPE`` for all parameters that the method trains.

    A method may define ``parameter_groups(cfg)`` with groups and their ``lr``. The schedule scales the rates of all
    groups by the same factor.
    """
    solver = cfg.SOLVER
    groups = parameter_groups(cfg, distiller)
    common = {"lr": solver.LR * lr_factor(solver), "weight_decay": solver.WEIGHT_DECAY}
    fused = _can_be_fused(groups)
    if solver.TYPE == "SGD":
        nesterov = _nesterov(solver)
        return torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=nesterov, fused=fused, **common)
    if solver.TYPE == "AdamW":
        return torch.optim.AdamW(groups, betas=tuple(solver.BETAS), eps=solver.EPS, fused=fused, **common)
    if solver.TYPE == "RMSProp":
        return torch.optim.RMSprop(groups, momentum=solver.MOMENTUM, alpha=solver.ALPHA, eps=solver.EPS, **common)
    raise InputError(f"SOLVER.TYPE: no optimiser named {solver.TYPE!r}; known: SGD, AdamW, RMSProp")


def _can_be_fused(groups: list[dict[str, Any]]) -> bool:
    """Whether one kernel may update all parameters: the formula is the same, with fewer passes over the memory."""
    parameters = [p for group in groups for p in group["params"]]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _nesterov(solver: Any) -> bool:
    if solver.NESTEROV and not solver.MOMENTUM:
        raise InputError("SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0")
    return solver.NESTEROV


def parameter_groups(cfg: Any, distiller: nn.Module) -> list[dict[str, Any]]:
    """Groups of the parameters that the method trains, without repeats.

    ``lr_scale`` is a group's rate as a share of ``SOLVER.LR``.

    With ``SOLVER.NO_DECAY`` a second group follows each group. The second group has the same settings without weight
    decay and holds the parameters of :func:`without_decay`.
    """
    groups = [dict(group) for group in distiller.parameter_groups(cfg)]
    seen: set[int] = set()
    for group in groups:
        group["params"] = [p for p in group["params"] if not (id(p) in seen or seen.add(id(p)))]
        group["lr_scale"] = group.get("lr", cfg.SOLVER.LR) / cfg.SOLVER.LR
    if not any(p.requires_grad for group in groups for p in group["params"]):
        raise InputError(
            f"{where(type(distiller))}: there is nothing to train; get_learnable_parameters() and "
            "parameter_groups() must return the student's parameters"
        )
    _check_nothing_frozen(distiller, groups)
    if cfg.SOLVER.NO_DECAY == "none":
        return groups
    named = without_decay(distiller, cfg.SOLVER.NO_DECAY)
    split = []
    for group in groups:
        exempt = [p.ndim <= 1 or id(p) in named for p in group["params"]]
        for decays, more in ((True, {}), (False, {"weight_decay": 0.0})):
            params = [p for p, leave_out in zip(group["params"], exempt, strict=True) if leave_out != decays]
            split += [{**group, "params": params, **more}] if params else []
    return split


def without_decay(distiller: nn.Module, rule: str) -> set[int]:
    """Ids of the parameters that ``SOLVER.NO_DECAY`` excludes besides those with at most one dimension.

    Args:
        distiller: the method with its networks.
        rule: ``"norm_bias"``: parameters with the name ``bias``. ``"model"``: also the names that a network's method
            ``no_weight_decay()`` returns, relative to the network, as in timm.
    """
    excluded = {id(p) for name, p in distiller.named_parameters() if name.split(".")[-1] == "bias"}
    if rule == "model":
        for module in distiller.modules():
            names = getattr(module, "no_weight_decay", tuple)()
            if names:
                parameters = dict(module.named_parameters())
                excluded |= {id(parameters[name]) for name in names if name in parameters}
    return excluded


def _check_nothing_frozen(distiller: nn.Module, groups: list[dict[str, Any]]) -> None:
    networks = distiller.frozen_networks().values()
    frozen = {id(p) for network in networks for p in network.parameters() if not p.requires_grad}
    if any(id(p) in frozen for group in groups for p in group["params"]):
        raise InputError(
            f"{type(distiller).__name__} optimises parameters of the teacher, which is frozen; its constructor must "
            "call requires_grad_(True) on them, and teacher_parameters() must return them so that they are saved"
        )


def learning_rate(solver: Any, epoch: int, done: float = 0.0) -> float:
    """The rate of ``SOLVER.LR_SCHEDULE`` at a step.

    Args:
        solver: the ``SOLVER`` section.
        epoch: number of the epoch, from 1.
        done: share of the epoch's finished steps, in [0, 1).

    Returns:
        ``step``: LR * LR_DECAY_RATE^s, s the number of stages below ``epoch`` (mdistiller's rule: the first decayed
        epoch of stage 150 is 151). ``exponential``: LR * LR_DECAY_RATE^n, n the number of times that LR_DECAY_EPOCHS, a
        fraction or not, fits into the finished epochs after the warm-up. ``cosine``: half a cosine from LR to LR_MIN
        over the epochs after the warm-up, step by step. In the first WARMUP_EPOCHS: linear from WARMUP_LR to LR, step
        by step. All rates are multiplied by :func:`lr_factor`.
    """
    return lr_factor(solver) * _scheduled_rate(solver, epoch, done)


def lr_factor(solver: Any) -> float:
    """The factor of ``SOLVER.LR_RULE`` for every rate: the batch size over ``LR_BATCH_SIZE``, or its square root."""
    ratio = solver.BATCH_SIZE / solver.LR_BATCH_SIZE
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[solver.LR_RULE]


def _scheduled_rate(solver: Any, epoch: int, done: float) -> float:
    if epoch <= solver.WARMUP_EPOCHS:
        share = (epoch - 1 + done) / solver.WARMUP_EPOCHS
        return solver.WARMUP_LR + (solver.LR - solver.WARMUP_LR) * share
    if solver.LR_SCHEDULE == "step":
        return solver.LR * solver.LR_DECAY_RATE ** sum(epoch > stage for stage in solver.LR_DECAY_STAGES)
    behind = epoch - 1 - solver.WARMUP_EPOCHS
    if solver.LR_SCHEDULE == "exponential":
        return solver.LR * solver.LR_DECAY_RATE ** math.floor(behind / solver.LR_DECAY_EPOCHS)
    share = (behind + done) / (solver.EPOCHS - solver.WARMUP_EPOCHS)
    return solver.LR_MIN + (solver.LR - solver.LR_MIN) * 0.5 * (1 + math.cos(math.pi * share))
