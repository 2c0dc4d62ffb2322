"""Score a network on the test split of a data set.

python tools/eval.py -m resnet8x4 -c output/.../student_last -d cifar100
"""

import argparse

from mdistiller.dataset import build_loaders, dataset_dict
from mdistiller.engine.build import build_student, build_teacher
from mdistiller.engine.cfg import load_config
from mdistiller.engine.checkpoint import load_into
from mdistiller.engine.cli import command
from mdistiller.engine.evaluate import evaluate
from mdistiller.engine.precision import Precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="a name that tools/list.py shows")
    parser.add_argument(
        "-c",
        "--ckpt",
        default="pretrain",
        help="a checkpoint, or 'pretrain' for the model's public weights (default)",
    )
    parser.add_argument("-d", "--dataset", default="cifar100", help="default: cifar100")
    parser.add_argument("-bs", "--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="further settings, for example SOLVER.DEVICE cpu")
    args = parser.parse_intermixed_args()

    given = {"DATASET.TYPE": args.dataset, "DATASET.TEST.BATCH_SIZE": args.batch_size,
             "DISTILLER.STUDENT": args.model, "DISTILLER.TEACHER": args.model}  # fmt: skip
    cfg = load_config(options=[part for pair in given.items() for part in pair] + args.opts)
    precision, num_classes = Precision.from_cfg(cfg), dataset_dict[cfg.DATASET.TYPE].num_classes
    if args.ckpt == "pretrain":
        model = build_teacher(cfg, num_classes)
    else:
        model = build_student(cfg, num_classes)
        load_into(model, args.ckpt, f"model {args.model}")
    result = evaluate(precision.place(model), build_loaders(cfg, precision.device).test, precision)
    print(
        f"{args.model} on {result.count} test images of {args.dataset}: "
        f"top-1 {result.top1:.2f}, top-5 {result.top5:.2f}, loss {result.loss:.4f}"
    )


if __name__ == "__main__":
    command(main)
