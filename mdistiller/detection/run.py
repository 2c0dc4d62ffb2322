"""A run of the torchvision engine, from a configuration to results in a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.dense import dense_dict
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.run_folder import check_folder
from mdistiller.engine.forwards.precision import Precision, resolve_device
from mdistiller.engine.hooks import add_hooks
from mdistiller.engine.processes import distributed
from mdistiller.engine.random_state import seed_everything, seed_process
from mdistiller.engine.run import train_in_folder
from mdistiller.files import file_sha256
from mdistiller.messages import say
from mdistiller.registry import InputError

from .adapter import check_pair, facts_of
from .cfg import DetectionConfig, load_teacher
from .data import Batches, Pictures, TestBatches
from .distiller import DetectionDistiller
from .networks import build_detector, load_detector, load_public, load_start
from .task import Detection, task_of
from .trainer import DetectionTrainer, Iterations, PicturesAtTheEnd

KEYS = {  # the engine's keys in messages, and those of this configuration
    "EXPERIMENT.NAME": "OUTPUT_DIR",
    "LOG.PREFIX": "OUTPUT_DIR",
    "SOLVER.EPOCHS": "SOLVER.MAX_ITER",
    "SOLVER.DEVICE": "MODEL.DEVICE",
}


def run(cfg: DetectionConfig, *, resume: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Train, evaluate and write the folder ``OUTPUT_DIR``; returns the content of ``results.json``.

    Args:
        cfg: see :func:`mdistiller.detection.cfg.load`.
        resume: continue from the folder's ``latest``, or start if there is none.
        overwrite: delete an earlier run's files in the folder.

    Raises:
        InputError: a configuration, data or files with which the run cannot start.
    """
    distributed.start()
    with own_keys():
        distributed.on_first_process(lambda: check_folder(Path(cfg.OUTPUT_DIR), cfg, resume, overwrite))
        trainer, facts = build_run(cfg)
        return train_in_folder(trainer, facts, cfg, resume, overwrite)


def evaluate(cfg: DetectionConfig) -> dict[str, float]:
    """The score of ``MODEL.WEIGHTS``, or of the folder's ``student_last``, on the test pictures."""
    with own_keys():
        settings = engine_settings(cfg)
        precision = Precision.from_cfg(settings)
        path = Path(cfg.MODEL.WEIGHTS or Path(cfg.OUTPUT_DIR) / "student_last")
        student = build_detector(cfg)
        load_detector(student, path, cfg, "student")
        data = test_data(cfg)
        task = task_of(data)
        score = task.evaluate(
            precision.place(student), TestBatches(data, workers=cfg.DATALOADER.NUM_WORKERS), precision
        )
        say(f"{path}: {task.line(score.values)} on {score.count} pictures of {data.name}")
        return score.values


@contextlib.contextmanager
def own_keys() -> Iterator[None]:
    """Messages of the engine name the keys of this configuration."""
    try:
        yield
    except InputError as error:
        text = str(error)
        for key, own in KEYS.items():
            text = text.replace(key, own)
        if text != str(error):
            error.args = (text,)
        raise


def seed_of(cfg: DetectionConfig) -> int:
    return max(cfg.SEED, 0)


def engine_settings(cfg: DetectionConfig) -> Any:
    """The training loop's settings. A round ends with each evaluation, and is an epoch to the loop."""
    solver, folder = cfg.SOLVER, Path(cfg.OUTPUT_DIR)
    device = resolve_device(cfg.MODEL.DEVICE)
    amp = "off" if not solver.AMP.ENABLED else "bf16" if device.type == "cpu" else "fp16"
    values = {
        "EXPERIMENT.PROJECT": str(folder.parent),
        "EXPERIMENT.NAME": folder.name,
        "EXPERIMENT.SEED": seed_of(cfg),
        "SOLVER.EPOCHS": len(rounds(cfg)),
        "SOLVER.BATCH_SIZE": solver.IMS_PER_BATCH,
        "SOLVER.TYPE": {"SGD": "SGD", "ADAMW": "AdamW"}[solver.OPTIMIZER],
        "SOLVER.LR": solver.BASE_LR,
        "SOLVER.MOMENTUM": solver.MOMENTUM,
        "SOLVER.NESTEROV": solver.NESTEROV,
        "SOLVER.WEIGHT_DECAY": solver.WEIGHT_DECAY,
        "SOLVER.DEVICE": cfg.MODEL.DEVICE,
        "SOLVER.AMP": amp,
        "SOLVER.CHANNELS_LAST": "off",
        "LOG.PREFIX": str(folder.parent),
        "LOG.SAVE_CHECKPOINT_FREQ": 0,
        "LOG.SAVE_EVERY_STEPS": solver.CHECKPOINT_PERIOD,
        "LOG.TENSORBOARD_FREQ": 20,
    }
    settings = load_config()
    settings.defrost()
    for key, value in values.items():
        section, name = key.split(".")
        settings[section][name] = value
    settings.freeze()
    return settings


def rounds(cfg: DetectionConfig) -> list[int]:
    """The number of steps of each round: ``TEST.EVAL_PERIOD``, the last one perhaps shorter."""
    most = cfg.SOLVER.MAX_ITER
    length = min(cfg.TEST.EVAL_PERIOD or most, most)
    return [length] * (most // length) + ([most % length] if most % length else [])


def training_data(cfg: DetectionConfig) -> Pictures:
    """The pictures of all sets of ``DATASETS.TRAIN``.

    Raises:
        InputError: sets of different classes.
    """
    first, *others = (Pictures(name, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS) for name in cfg.DATASETS.TRAIN)
    for other in others:
        first.add(other)
    return first


def test_data(cfg: DetectionConfig) -> Pictures:
    """The pictures of ``DATASETS.TEST``.

    Raises:
        InputError: the data set has other classes than the configuration.
    """
    data = Pictures(cfg.DATASETS.TEST[0])
    check_classes(cfg, data)
    return data


def check_classes(cfg: DetectionConfig, data: Pictures) -> None:
    wanted = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if len(data.names) != wanted:
        raise InputError(
            f"{data.name} has {len(data.names)} classes, and MODEL.ROI_HEADS.NUM_CLASSES is {wanted}; set it to "
            f"{len(data.names)}"
        )


def build_run(cfg: DetectionConfig) -> tuple[DetectionTrainer, dict[str, Any]]:
    """Data, networks, method and trainer, and the facts about them for ``results.json``."""
    with distributed.same_error():
        seed, settings, method_class = seed_of(cfg), engine_settings(cfg), dense_dict[cfg.DISTILLER.TYPE]
        distributed.check_device(resolve_device(cfg.MODEL.DEVICE))
        precision = Precision.from_cfg(settings)
        given = load_teacher(cfg) if method_class.has_teacher else None
        seed_everything(seed)
        student = build_detector(cfg)
        load_start(student, cfg)
    share = distributed.rank(), distributed.world_size()
    data = distributed.one_process_per_machine(lambda: training_data(cfg))
    scored = distributed.one_process_per_machine(lambda: test_data(cfg))
    check_classes(cfg, data)
    flip, workers = cfg.INPUT.RANDOM_FLIP == "horizontal", cfg.DATALOADER.NUM_WORKERS
    train = Batches(data, cfg.SOLVER.IMS_PER_BATCH, rounds(cfg), seed, flip, workers, share)
    test, task = TestBatches(scored, workers=workers, share=share), task_of(scored)
    facts: dict[str, Any] = {
        "engine": "torchvision",
        "experiment": cfg.OUTPUT_DIR,
        "method": cfg.DISTILLER.TYPE,
        "student": description(cfg),
        "dataset": ", ".join(cfg.DATASETS.TRAIN),
        "seed": seed,
        "training_images": len(data),
    }
    teacher = method = None
    if given is not None:
        teacher, facts["teacher"] = build_teacher(*given, cfg, precision, task, test)
        with distributed.same_error():
            precision.place(student)
            of_student, of_teacher = facts_of(student), facts_of(teacher)
            check_pair(of_student, of_teacher)
            torch.manual_seed(seed)  # a method's own modules do not depend on the teacher's size
            method = method_class(cfg.DISTILLER[cfg.DISTILLER.TYPE], of_student, of_teacher)
    torch.manual_seed(seed)  # nor does what is sampled depend on the method
    distiller = DetectionDistiller(student, teacher, method)
    facts["extra_parameters"] = distiller.get_extra_parameters()
    trainer = DetectionTrainer(str(Path(cfg.OUTPUT_DIR).name), distiller, train, test, settings, cfg, task)
    add_hooks(trainer, [Iterations, PicturesAtTheEnd])
    if distributed.rank():  # what is sampled differs between processes
        seed_process(seed, distributed.rank())
    return trainer, facts


def build_teacher(
    teacher_cfg: DetectionConfig,
    path: Path | str,
    cfg: DetectionConfig,
    precision: Precision,
    task: Detection,
    test: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher on its device, and its score before the first step: a wrong file shows there."""
    if teacher_cfg.MODEL.ROI_HEADS.NUM_CLASSES != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        raise InputError(
            f"the teacher ({cfg.TEACHER.CONFIG}) has {teacher_cfg.MODEL.ROI_HEADS.NUM_CLASSES} classes, the student "
            f"{cfg.MODEL.ROI_HEADS.NUM_CLASSES}; take a teacher that was trained on the same classes"
        )
    teacher = build_detector(teacher_cfg)
    if isinstance(path, str):
        load_public(teacher, path, teacher_cfg)
    else:
        load_detector(teacher, path, teacher_cfg, "teacher")
    teacher.requires_grad_(False)
    score = task.evaluate(precision.place(teacher).eval(), test, precision)
    name = description(teacher_cfg)
    say(f"Teacher {name} ({path}): {task.line(score.values)} on {score.count} test pictures")
    digest = None if isinstance(path, str) else file_sha256(path)
    return teacher, {"name": name, "checkpoint": str(path), "sha256": digest, **score.values}


def description(cfg: DetectionConfig) -> str:
    """``"Faster R-CNN R18"``, with the width of the stem where it is not 64."""
    if cfg.MODEL.BACKBONE.NAME == "build_mobilenetv2_fpn_backbone":
        return "Faster R-CNN MV2"
    width = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    return f"Faster R-CNN R{cfg.MODEL.RESNETS.DEPTH}" + (f" of width {width}" if width != 64 else "")
