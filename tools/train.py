"""Train a student, with or without a teacher.

python tools/train.py --cfg configs/digits/kd/res20_res8.yaml [--resume | --overwrite] [KEY VALUE ...]
torchrun --nproc_per_node 2 tools/train.py --cfg configs/digits/kd/res20_res8.yaml [KEY VALUE ...]
"""

import argparse

from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import allow_plugins_option, command
from mdistiller.engine.processes import distributed
from mdistiller.engine.run import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default="", metavar="FILE", help="configuration; see configs/ and tools/list.py")
    allow_plugins_option(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides, for example SOLVER.EPOCHS 10 DISTILLER.TYPE KD",
    )
    args = parser.parse_intermixed_args()
    distributed.start()
    with distributed.same_error():
        cfg = load_config(args.cfg, args.opts, allow_plugins=args.allow_plugins)
    run(cfg, resume=args.resume, overwrite=args.overwrite, show=True)


if __name__ == "__main__":
    command(main)
