"""The subjects of timings: a method with its networks and batches, built from a configuration as in a run."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from mdistiller.contract import contract_of
from mdistiller.dataset import Loaders, build_loaders
from mdistiller.engine.batch import to_batch
from mdistiller.engine.build import (
    adapted,
    build_distiller,
    build_student,
    build_teacher,
)
from mdistiller.engine.forwards.chain import linked, networks_of, put
from mdistiller.engine.forwards.listen import listen
from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.registry import distiller_dict, open_dataset

CALIBRATION_STEPS = 3  # forward passes that set the BatchNorm statistics of a teacher without a checkpoint


@dataclass
class Subject:
    """A method ready for steps: its trainer, its loaders, and batches on the device."""

    trainer: BaseTrainer
    loaders: Loaders
    batches: list[dict[str, Tensor]]

    def stepper(self) -> Callable[[], None]:
        """A function that does one training step, on the batches in turn."""
        self.trainer.distiller.train()
        turns = itertools.cycle(self.batches)
        return lambda: self.trainer.run_step(next(turns)) and None


def baseline_of(method: str) -> str:
    """The name of plain KD with as many views as the method."""
    return "KD_TWO_VIEWS" if "image_strong" in contract_of(distiller_dict[method]).views else "KD"


def with_options(cfg: Any, **values: Any) -> Any:
    """A changed copy of a configuration; ``DISTILLER__TYPE="KD"`` sets ``DISTILLER.TYPE``."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([part for key, value in values.items() for part in (key.replace("__", "."), value)])
    cfg.freeze()
    return cfg


def student_and_teacher(cfg: Any) -> tuple[nn.Module, nn.Module | None]:
    """Student and teacher. Without ``DISTILLER.TEACHER_CKPT`` the teacher has fresh weights."""
    classes = open_dataset(cfg).num_classes
    student = build_student(cfg, classes)
    if not contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher:
        return student, None
    if cfg.DISTILLER.TEACHER_CKPT:
        return student, build_teacher(cfg, classes)
    return student, adapted(cfg, "TEACHER", classes)


def build_subject(cfg: Any, folder: Path, num_batches: int = 4) -> Subject:
    """Build the method of ``DISTILLER.TYPE`` as a run does.

    Args:
        cfg: a checked configuration.
        folder: for the trainer's files.
        num_batches: number of the first epoch's batches to keep; fewer if an epoch has fewer.
    """
    cfg = with_options(cfg, LOG__PREFIX=str(folder))
    precision = Precision.from_cfg(cfg)
    student, teacher = student_and_teacher(cfg)
    loaders = build_loaders(cfg, precision.device)
    batches = [to_batch(item, precision) for item in itertools.islice(loaders.train, num_batches)]
    if teacher is not None and not cfg.DISTILLER.TEACHER_CKPT:
        calibrate_batch_norms(precision.place(teacher), batches)
    torch.manual_seed(cfg.EXPERIMENT.SEED)
    distiller = build_distiller(cfg, student, teacher, loaders.num_data)
    loaders.train.set_epoch(1)
    trainer = BaseTrainer("bench", distiller, loaders.train, loaders.val or loaders.test, cfg)
    return Subject(trainer, loaders, batches)


@torch.no_grad()
def calibrate_batch_norms(network: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Set the statistics of a network's BatchNorms from real images."""
    network.train()
    image = next(value for name, value in batches[0].items() if name.startswith("image"))
    for _ in range(CALIBRATION_STEPS):
        network(image)
    network.eval()


def loss_alone(subject: Subject) -> Callable[[], None]:
    """A function that does a step without the networks' forward and backward passes.

    The networks' outputs on one batch are recorded once and reused in each call.
    """
    trainer, batch = subject.trainer, subject.batches[0]
    distiller = trainer.distiller.train()
    frozen = distiller.frozen_networks().values()
    outputs: dict[nn.Module, list[Any]] = {network: [] for network in networks_of(distiller)}
    inputs = trainer.contract.inputs(batch, epoch=1)

    def step() -> None:
        with trainer.precision.autocast():
            _, losses = distiller(**inputs)
        sum(loss.mean() for loss in losses.values()).backward()

    with ExitStack() as stack:
        for network, recorded in outputs.items():
            link = listen(lambda args, kwargs, output, recorded=recorded: recorded.append(output))
            stack.enter_context(linked(network, "listen", link))
        step()
    for network, recorded in outputs.items():
        put(network, "listen", partial(_replay, itertools.cycle(recorded), network not in frozen))
    return step


def _replay(outputs: Iterator[Any], with_gradient: bool, *args: Any, **kwargs: Any) -> Any:
    """A link that returns the next recorded output and computes nothing."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().requires_grad_(with_gradient)

    return tree_map(leaf, next(outputs))


def teacher_variants(cfg: Any, device: torch.device) -> dict[str, tuple[nn.Module, Precision, bool]]:
    """The plain teacher and its variants with speed-ups: network, precision, and whether the network is folded."""
    _, teacher = student_and_teacher(cfg)
    plain = Precision(device)
    last, half = Precision(device, None, True), Precision(device, torch.bfloat16, True)
    teacher.eval().requires_grad_(False)
    variants = {
        "float32": (plain, False),
        "float32, folded": (plain, True),
        "float32, channels last": (last, False),
        "float32, channels last, folded": (last, True),
        "bf16, channels last": (half, False),
        "bf16, channels last, folded": (half, True),
    }
    return {
        name: (precision.place(copy.deepcopy(teacher)), precision, folded)
        for name, (precision, folded) in variants.items()
    }
