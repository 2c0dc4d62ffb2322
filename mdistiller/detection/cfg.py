"""The torchvision engine's configuration: detectron2's YAML with the nodes ``DISTILLER`` and ``TEACHER``.

Keys, types and defaults are detectron2's, with these exceptions: ``SOLVER.OPTIMIZER``, ``DISTILLER`` and ``TEACHER``
are new; ``MODEL.DEVICE`` is ``auto``; ``MODEL.RESNETS.STRIDE_IN_1X1`` is False; ``MODEL.WEIGHTS`` is empty. A key or a
value that torchvision cannot honour is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdistiller.dense import dense_dict
from mdistiller.engine.config.experiment import flatten
from mdistiller.engine.config.node import ConfigNode
from mdistiller.options import MANY, WIDEST, Option, options_in
from mdistiller.registry import InputError, closest

from .data import dataset_names

UNKNOWN = "the torchvision engine does not honour this key; docs/detection.md lists the keys"
ADVICE = {  # keys of mdistiller's detection files
    "KD": "mdistiller's KD.TYPE is DISTILLER.TYPE here; detection/configs has mdistiller's files in this form",
    "TEACHER.MODEL": "TEACHER.CONFIG names the teacher's own file; detection/configs/teachers has two",
    "MODEL.MOBILENETV2": "leave the key out; MODEL.BACKBONE.NAME build_mobilenetv2_fpn_backbone is enough",
    "MODEL.ROI_MASK_HEAD": "leave the key out; there are no masks",
}


def only(default: Any, help: str) -> Option:
    """A key with a single value: what torchvision does."""
    return Option(
        default,
        help,
        holds=(lambda value: value == default, f"{default!r}, the only value that the torchvision engine honours"),
    )


def numbers(count: int) -> tuple[Any, str]:
    return lambda value: len(value) == count, f"{count} numbers"


place = {"role": "place"}
# fmt: off
OPTIONS: dict[str, Option] = {
    "VERSION": only(2, "of detectron2's format"),
    "OUTPUT_DIR": Option("./output", "folder of the run", **place),
    "SEED": Option(-1, "seed of weights, order of pictures, flips and sampling; negative: 0", below=2**63),

    "MODEL.META_ARCHITECTURE": only("GeneralizedRCNN", "the detector"),
    "MODEL.DEVICE": Option("auto", "auto: a GPU if there is one; or cpu, cuda, cuda:1", role="speed"),
    "MODEL.WEIGHTS": Option("", "the first weights: a file, or torchvision://resnet18 and the like (ImageNet, only the "
                            "backbone); empty: random"),
    "MODEL.MASK_ON": only(False, "masks"),
    "MODEL.KEYPOINT_ON": only(False, "keypoints"),
    "MODEL.LOAD_PROPOSALS": only(False, "proposals from files"),
    "MODEL.PIXEL_MEAN": Option([103.530, 116.280, 123.675], "subtracted from the pixels 0 to 255, in the order of "
                               "INPUT.FORMAT", holds=numbers(3)),
    "MODEL.PIXEL_STD": Option([1.0, 1.0, 1.0], "divides the result of the subtraction", above=0, holds=numbers(3)),
    "MODEL.BACKBONE.NAME": Option("build_resnet_fpn_backbone", "the backbone",
                                  one_of=("build_resnet_fpn_backbone", "build_mobilenetv2_fpn_backbone")),
    "MODEL.BACKBONE.FREEZE_AT": Option(2, "number of frozen stages; the stem is the first", at_least=0, at_most=5),
    "MODEL.RESNETS.DEPTH": Option(50, "number of layers",
                                  holds=(lambda depth: depth in (18, 34, 50, 101, 152), "18, 34, 50, 101 or 152")),
    "MODEL.RESNETS.OUT_FEATURES": only(["res2", "res3", "res4", "res5"], "stages for the pyramid"),
    "MODEL.RESNETS.NORM": Option("FrozenBN", "normalisation of the backbone", one_of=("FrozenBN", "BN")),
    "MODEL.RESNETS.NUM_GROUPS": only(1, "groups of the 3x3 convolutions"),
    "MODEL.RESNETS.WIDTH_PER_GROUP": Option(64, "inner width of the first stage's bottlenecks; must be "
                                            "STEM_OUT_CHANNELS", at_least=4, at_most=WIDEST),
    "MODEL.RESNETS.STRIDE_IN_1X1": only(False, "where a bottleneck has its stride"),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": Option(64, "width of the stem", at_least=4, at_most=WIDEST),
    "MODEL.RESNETS.RES2_OUT_CHANNELS": Option(256, "width of the first stage: STEM_OUT_CHANNELS for depths 18 and 34, "
                                              "else 4 times that", at_least=4, at_most=WIDEST),
    "MODEL.FPN.IN_FEATURES": only(["res2", "res3", "res4", "res5"], "stages that the pyramid takes"),
    "MODEL.FPN.OUT_CHANNELS": Option(256, "width of the pyramid", at_least=1, at_most=WIDEST),
    "MODEL.FPN.NORM": only("", "normalisation of the pyramid"),
    "MODEL.FPN.FUSE_TYPE": only("sum", "how levels are merged"),
    "MODEL.PROPOSAL_GENERATOR.NAME": only("RPN", "the proposals"),
    "MODEL.ANCHOR_GENERATOR.SIZES": Option([[32], [64], [128], [256], [512]], "sides of the anchors of each level"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": Option([[0.5, 1.0, 2.0]], "heights over widths, for all levels or each"),
    "MODEL.RPN.IN_FEATURES": only(["p2", "p3", "p4", "p5", "p6"], "levels for the proposals"),
    "MODEL.RPN.IOU_THRESHOLDS": Option([0.3, 0.7], "below: background, above: object", at_least=0, at_most=1,
                                       holds=numbers(2)),
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": Option(256, "sampled anchors", at_least=1, at_most=MANY),
    "MODEL.RPN.POSITIVE_FRACTION": Option(0.5, "largest share of objects among the samples", above=0, at_most=1),
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": Option(2000, "proposals of a level before suppression", at_least=1, at_most=MANY),
    "MODEL.RPN.PRE_NMS_TOPK_TEST": Option(1000, "the same in tests", at_least=1, at_most=MANY),
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": Option(1000, "proposals of a picture", at_least=1, at_most=MANY),
    "MODEL.RPN.POST_NMS_TOPK_TEST": Option(1000, "the same in tests", at_least=1, at_most=MANY),
    "MODEL.RPN.NMS_THRESH": Option(0.7, "IoU above which a proposal is suppressed", above=0, at_most=1),
    "MODEL.ROI_HEADS.NAME": only("StandardROIHeads", "the box head"),
    "MODEL.ROI_HEADS.IN_FEATURES": only(["p2", "p3", "p4", "p5"], "levels for the box head"),
    "MODEL.ROI_HEADS.NUM_CLASSES": Option(80, "number of classes, without background", at_least=1, at_most=WIDEST),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": Option([0.5], "above: object", at_least=0, at_most=1, holds=numbers(1)),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": Option(512, "sampled boxes", at_least=1, at_most=MANY),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": Option(0.25, "largest share of objects among the samples", above=0, at_most=1),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": Option(0.05, "less likely boxes are dropped", at_least=0, below=1),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": Option(0.5, "IoU above which a box is suppressed", above=0, at_most=1),
    "MODEL.ROI_BOX_HEAD.NAME": only("FastRCNNConvFCHead", "the box head's layers"),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": only(0, "number of convolutions of the box head"),
    "MODEL.ROI_BOX_HEAD.NUM_FC": only(2, "number of linear layers of the box head"),
    "MODEL.ROI_BOX_HEAD.FC_DIM": Option(1024, "width of the linear layers", at_least=1, at_most=WIDEST),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": Option(7, "side of a pooled box", at_least=1, at_most=64),
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": Option(0, "points a side of a pooled cell; 0: by size", at_least=0,
                                                       at_most=64),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": Option([10.0, 10.0, 5.0, 5.0], "factors of the box deltas", above=0,
                                                  holds=numbers(4)),

    "INPUT.FORMAT": Option("BGR", "order of the channels", one_of=("BGR", "RGB")),
    "INPUT.MIN_SIZE_TRAIN": Option([800], "shorter side in training; of several one is drawn", at_least=8,
                                   at_most=8192, holds=(len, "one number or more")),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": only("choice", "how the side is drawn"),
    "INPUT.MAX_SIZE_TRAIN": Option(1333, "longest side in training", at_least=8, at_most=8192),
    "INPUT.MIN_SIZE_TEST": Option(800, "shorter side in tests", at_least=8, at_most=8192),
    "INPUT.MAX_SIZE_TEST": Option(1333, "longest side in tests", at_least=8, at_most=8192),
    "INPUT.RANDOM_FLIP": Option("horizontal", "mirror half of the pictures", one_of=("horizontal", "none")),

    "DATASETS.TRAIN": Option([], "names of the training sets", holds=(lambda names: all(type(n) is str for n in names),
                                                                      "names")),
    "DATASETS.TEST": Option([], "name of the test set; of several the first is scored",
                            holds=(lambda names: all(type(n) is str for n in names), "names")),
    "DATALOADER.NUM_WORKERS": Option(4, "processes that read pictures", at_least=0, at_most=1024, role="speed"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": Option(True, "leave out training pictures without boxes"),

    "SOLVER.OPTIMIZER": Option("SGD", "the optimiser; ADAMW is for the torchvision engine", one_of=("SGD", "ADAMW")),
    "SOLVER.LR_SCHEDULER_NAME": Option("WarmupMultiStepLR", "schedule of the rate",
                                       one_of=("WarmupMultiStepLR", "WarmupCosineLR")),
    "SOLVER.MAX_ITER": Option(40000, "number of steps", at_least=1, at_most=10**8, resumable=True),
    "SOLVER.BASE_LR": Option(0.001, "the rate", above=0, resumable=True),
    "SOLVER.MOMENTUM": Option(0.9, "SGD's momentum", at_least=0, below=1, resumable=True),
    "SOLVER.NESTEROV": Option(False, "Nesterov's momentum", resumable=True),
    "SOLVER.WEIGHT_DECAY": Option(0.0001, "weight decay", at_least=0, resumable=True),
    "SOLVER.GAMMA": Option(0.1, "factor of the rate at each of STEPS", above=0, at_most=1, resumable=True),
    "SOLVER.STEPS": Option([30000], "steps after which the rate falls", at_least=1, resumable=True),
    "SOLVER.WARMUP_FACTOR": Option(0.001, "share of the rate at the first step", at_least=0, at_most=1, resumable=True),
    "SOLVER.WARMUP_ITERS": Option(1000, "steps of the warm-up", at_least=0, resumable=True),
    "SOLVER.WARMUP_METHOD": only("linear", "form of the warm-up"),
    "SOLVER.CHECKPOINT_PERIOD": Option(5000, "save every so many steps", at_least=1, **place),
    "SOLVER.IMS_PER_BATCH": Option(16, "pictures of a step, all processes together", at_least=1, at_most=MANY),
    "SOLVER.AMP.ENABLED": Option(False, "half precision: fp16 on a GPU, bf16 on a CPU", resumable=True),
    "TEST.EVAL_PERIOD": Option(0, "score every so many steps; 0: at the end only", at_least=0, **place),
    "TEST.DETECTIONS_PER_IMAGE": Option(100, "most boxes of a picture", at_least=1, at_most=MANY),

    "DISTILLER.TYPE": Option("NONE", "the method; NONE: plain training", one_of=dense_dict),
    "TEACHER.CONFIG": Option("", "the teacher's own configuration, seen from the file that names it"),
    "TEACHER.WEIGHTS": Option("", "the teacher's weights: a file, or torchvision://fasterrcnn_resnet50_fpn (COCO); "
                              "empty: student_last in the OUTPUT_DIR of TEACHER.CONFIG",
                              **place),
    "TEACHER.OPTS": Option([], "further KEY VALUE for the teacher's configuration"),
}
# fmt: on


def all_options() -> dict[str, Option]:
    """The options by dotted key, with those of all methods below ``DISTILLER``."""
    found = dict(OPTIONS)
    for name, method in dense_dict.items():
        found |= options_in(method.defaults, f"DISTILLER.{name}.")
    return found


class DetectionConfig(ConfigNode):
    """The root of the tree."""

    def own_options(self) -> dict[str, Option]:
        return all_options()

    def drops(self, key: str, value: Any) -> bool:
        """
        Raises:
            InputError: always; a key that is unknown here may be detectron2's.
        """
        near = closest(key, all_options())
        advice = ADVICE.get(key) or (f"closest: {', '.join(near)}" if near else "")
        raise InputError("; ".join(filter(None, [f"{key}: {UNKNOWN}", advice])))


def defaults() -> DetectionConfig:
    cfg = DetectionConfig()
    for key, option in all_options().items():
        node, (*sections, last) = cfg, key.split(".")
        for section in sections:
            node = node.setdefault(section, ConfigNode())
        node[last] = copy.deepcopy(option.default)
    return cfg


def load(path: str | Path, options: Sequence[str] = ()) -> DetectionConfig:
    """A checked, frozen configuration: defaults, the file behind its ``_BASE_``, then ``KEY VALUE``.

    Args:
        path: a YAML file, see :func:`find`.
        options: keys and values.

    Raises:
        InputError: no such file; a key or value that the torchvision engine does not honour.
    """
    cfg = defaults()
    cfg.merge_from_file(find(path))
    cfg.merge_from_list(list(options))
    values = flatten(cfg)
    for key, option in all_options().items():
        option.check(key, values[key])
    _check_together(cfg)
    cfg.freeze()
    return cfg


def find(path: str | Path) -> Path:
    """A configuration file, seen from the current folder, from the checkout or from its folder ``detection``."""
    root = Path(__file__).resolve().parents[2]
    places = [Path(path), root / path, root / "detection" / path]
    return next((place for place in places if place.is_file()), Path(path))


def load_teacher(cfg: DetectionConfig) -> tuple[DetectionConfig, Path | str]:
    """The configuration of the teacher, and the file or the public name of the weights.

    Raises:
        InputError: no configuration or no file; the message says how to train the teacher.
    """
    given = cfg.TEACHER
    if not given.CONFIG:
        raise InputError(f"the method {cfg.DISTILLER.TYPE} needs a teacher: TEACHER.CONFIG names its configuration")
    teacher = load(given.CONFIG, given.OPTS)
    if "://" in given.WEIGHTS:
        return teacher, given.WEIGHTS
    path = Path(given.WEIGHTS or Path(teacher.OUTPUT_DIR) / "student_last")
    if not path.is_file():
        raise InputError(
            f"the teacher's weights {path} do not exist (seen from {Path.cwd()}); train the teacher: python "
            f"detection/train_net.py --engine torchvision --config-file {given.CONFIG}; or name a file: "
            "TEACHER.WEIGHTS FILE"
        )
    return teacher, path


def _check_together(cfg: DetectionConfig) -> None:
    """
    Raises:
        InputError: values that contradict each other.
    """
    resnet, names = cfg.MODEL.RESNETS, cfg.DATASETS
    factor = 1 if resnet.DEPTH in (18, 34) else 4
    if cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone":
        if factor * resnet.STEM_OUT_CHANNELS != resnet.RES2_OUT_CHANNELS:
            raise InputError(
                f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnet.RES2_OUT_CHANNELS}; with DEPTH {resnet.DEPTH} and "
                f"STEM_OUT_CHANNELS {resnet.STEM_OUT_CHANNELS} it must be {factor * resnet.STEM_OUT_CHANNELS}"
            )
        if factor == 4 and resnet.WIDTH_PER_GROUP != resnet.STEM_OUT_CHANNELS:
            raise InputError(
                f"MODEL.RESNETS.WIDTH_PER_GROUP is {resnet.WIDTH_PER_GROUP}; the torchvision engine needs the value of "
                f"STEM_OUT_CHANNELS, {resnet.STEM_OUT_CHANNELS}"
            )
    for key in ("TRAIN", "TEST"):
        if not names[key]:
            raise InputError(f"DATASETS.{key} names no data set; known: {', '.join(sorted(dataset_names()))}")
    levels, given = 5, cfg.MODEL.ANCHOR_GENERATOR
    for key, allowed in (("SIZES", (levels,)), ("ASPECT_RATIOS", (1, levels))):
        if len(given[key]) not in allowed or not all(isinstance(e, (list, tuple)) and e for e in given[key]):
            raise InputError(
                f"MODEL.ANCHOR_GENERATOR.{key} must hold {' or '.join(map(str, allowed))} lists of numbers, one for "
                f"each level of the pyramid, got {given[key]}"
            )
    if len(cfg.SOLVER.STEPS) and list(cfg.SOLVER.STEPS) != sorted(cfg.SOLVER.STEPS):
        raise InputError(f"SOLVER.STEPS must rise, got {cfg.SOLVER.STEPS}")
