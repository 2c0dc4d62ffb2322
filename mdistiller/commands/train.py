"""Train a student, with or without a teacher.

python tools/train.py --cfg configs/digits/kd/res20_res8.yaml [--resume | --overwrite] [KEY VALUE ...]
torchrun --nproc_per_node 2 tools/train.py --cfg configs/digits/kd/res20_res8.yaml [KEY VALUE ...]
"""

from mdistiller.engine.cfg import load_run
from mdistiller.engine.cli import Parser, allow_plugins_option, user_path
from mdistiller.engine.processes import distributed
from mdistiller.engine.run import run
from mdistiller.registry import InputError


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("train", __doc__)
    parser.add_argument("--cfg", type=user_path, metavar="FILE", help="configuration; see configs/ and tools/list.py")
    allow_plugins_option(parser)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the run in the folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="KEY VALUE",
        help="overrides, for example SOLVER.EPOCHS 10 DISTILLER.TYPE KD",
    )
    args, unknown = parser.parse_known_intermixed_args(arguments)
    if unknown:
        raise InputError(
            f"unrecognized arguments: {' '.join(unknown)}; see --help. A flag of another project's train.py is here "
            "the key that its method file reads, as KEY VALUE: KD.TEMPERATURE 2 (docs/migration.md)"
        )
    distributed.start()
    with distributed.same_error():
        cfg = load_run(args.cfg, args.opts, args.allow_plugins)
    run(cfg, resume=args.resume, overwrite=args.overwrite, show=True)
