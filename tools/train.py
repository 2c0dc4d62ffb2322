"""Train a student, with or without a teacher.

python tools/train.py --cfg configs/digits/kd/res20_res8.yaml [--resume | --overwrite] [KEY VALUE ...]
torchrun --nproc_per_node 2 tools/train.py --cfg configs/digits/kd/res20_res8.yaml [KEY VALUE ...]
"""

import argparse

from mdistiller.engine.cfg import LogitStand, load_config, show_cfg
from mdistiller.engine.cli import command
from mdistiller.engine.processes import distributed
from mdistiller.engine.run import run
from mdistiller.registry import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="", metavar="FILE", help="configuration; see configs/ and tools/list.py")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    logits = parser.add_argument_group("logit standardisation (LSKD); overrides the configuration")
    logits.add_argument("--logit-stand", action="store_true", help="standardise logits: KD, DKD, MLKD, CTKD")
    logits.add_argument("--base-temp", type=float, metavar="T", help="with it, the temperature (default: 2)")
    logits.add_argument(
        "--kd-weight",
        type=float,
        metavar="W",
        help="with it, the weight of the terms on the logits; multiplies DKD's ALPHA and BETA (default: 9)",
    )
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides, for example SOLVER.EPOCHS 10 DISTILLER.TYPE KD",
    )
    args = parser.parse_intermixed_args()
    distributed.start()
    with distributed.same_error():
        cfg = load_config(args.cfg, args.opts, logit_stand_of(args))
    show_cfg(cfg)
    run(cfg, resume=args.resume, overwrite=args.overwrite)


def logit_stand_of(args: argparse.Namespace) -> LogitStand | None:
    """LSKD's flags, which belong together."""
    given = {key: getattr(args, key) for key in ("base_temp", "kd_weight") if getattr(args, key) is not None}
    if args.logit_stand:
        return LogitStand(**given)
    if given:
        flags = " and ".join(f"--{key.replace('_', '-')}" for key in given)
        raise InputError(f"{flags} without --logit-stand would do nothing; give --logit-stand too")
    return None


if __name__ == "__main__":
    command(main)
