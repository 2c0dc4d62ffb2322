"""Score a network on the test split of a data set, and compare its predictions with another's.

python tools/eval.py -m resnet8x4 -c output/.../student_last -d cifar100
python tools/eval.py -m resnet8x4 -c output/.../student_last -d cifar100 --against resnet32x4
"""

import argparse
from typing import Any

import torch
from torch import nn

from mdistiller.analysis.consistency import (
    KINDS,
    nontarget_class_consistency,
    prediction_correlation,
    target_class_consistency,
)
from mdistiller.dataset import build_loaders, open_dataset
from mdistiller.dataset.subsets import check_class_numbers
from mdistiller.engine.build import build_student, build_teacher, load_network, model_table
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import Parser, user_path
from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.task import task_of
from mdistiller.registry import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("eval", __doc__)
    parser.add_argument(
        "-m", "--model", required=True, help="a name as DISTILLER.STUDENT takes: resnet8, timm:NAME, ..."
    )
    parser.add_argument(
        "-c",
        "--ckpt",
        default="pretrain",
        help="a checkpoint, or 'pretrain' for the model's public weights (default)",
    )
    parser.add_argument("--against", default="", metavar="MODEL", help="compare with this network's predictions")
    parser.add_argument("--against-ckpt", default="", metavar="CKPT", help="weights of --against, as for -c")
    parser.add_argument("-d", "--dataset", default="cifar100", help="data set; default: cifar100")
    parser.add_argument("-bs", "--batch-size", type=int, default=64, help="images of a batch; default: 64")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="further settings, for example SOLVER.DEVICE cpu")
    args = parser.parse_intermixed_args(arguments)
    if args.against_ckpt and not args.against:
        raise InputError("--against-ckpt without --against would do nothing; name its network by --against MODEL")

    cfg = config_of(args, args.model)
    precision, task = Precision.from_cfg(cfg), task_of(cfg)
    model = network(cfg, args.ckpt, "-c")
    other = network(config_of(args, args.against), args.against_ckpt, "--against-ckpt") if args.against else None
    images = build_loaders(cfg, precision.device).test
    score = task.evaluate(precision.place(model), images, precision)
    print(f"{args.model} on {score.count} test images of {args.dataset}: {task.line(score.values)}")
    if other is not None:
        outputs = [zip(*task.outputs(precision.place(net), images, precision), strict=True) for net in (model, other)]
        compare(args, *(tuple(torch.cat(parts).cpu() for parts in of_one) for of_one in outputs))


def config_of(args: argparse.Namespace, model: str) -> Any:
    """The configuration for one of the networks."""
    given = {"DATASET.TYPE": args.dataset, "DATASET.TEST.BATCH_SIZE": args.batch_size,
             "DISTILLER.STUDENT": model, "DISTILLER.TEACHER": model}  # fmt: skip
    return load_config(options=[part for pair in given.items() for part in pair] + args.opts)


def network(cfg: Any, checkpoint: str, option: str) -> nn.Module:
    """The network with its weights; ``option`` is what names their file."""
    num_classes = open_dataset(cfg).num_classes
    name = cfg.DISTILLER.STUDENT
    model_table(cfg)[name]  # an unknown name comes from the command line here, not from a key of the configuration
    if checkpoint in ("", "pretrain"):
        return build_teacher(cfg, num_classes, option)
    checkpoint = user_path(checkpoint)
    model = build_student(cfg, num_classes)
    load_network(model, checkpoint, f"model {name}", cfg, "name the data set that it was trained on with -d")
    return model


def compare(args: argparse.Namespace, one: tuple, other: tuple) -> None:
    """Print how alike two networks' predictions are; each given as logits and targets."""
    (logits, target), (others, _) = one, other
    check_class_numbers(target, "--against")
    print(
        f"against {args.against}: target-class consistency {target_class_consistency(logits, others, target):.4f}, "
        f"non-target-class consistency {nontarget_class_consistency(logits, others, target):.4f}"
    )
    for axis in ("inter", "intra"):
        found = [f"{kind} {prediction_correlation(logits, others, kind, axis):.4f}" for kind in KINDS]
        print(f"{axis}-class correlation: {', '.join(found)}")
