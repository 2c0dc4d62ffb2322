"""Train or distil an object detector.

python detection/train_net.py --config-file detection/configs/minicoco/KD.yaml [--engine torchvision|detectron2]
    [--num-gpus N] [--resume | --overwrite | --eval-only] [KEY VALUE ...]
"""

import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.detection import cfg as config
from mdistiller.detection.run import evaluate, run
from mdistiller.engine.cli import Parser, command, user_path
from mdistiller.engine.processes import distributed
from mdistiller.messages import say
from mdistiller.registry import InputError

BUILD = (
    "pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git', or take --engine "
    "torchvision"
)


def main() -> None:
    parser = Parser("train_net", __doc__)
    parser.prog = "python detection/train_net.py"
    parser.add_argument("--config-file", type=user_path, metavar="FILE", required=True, help="see detection/configs")
    parser.add_argument("--engine", choices=("torchvision", "detectron2"), help="without it: detectron2 if installed")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes that train together")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    group.add_argument("--overwrite", action="store_true", help="replace the run in OUTPUT_DIR")
    group.add_argument("--eval-only", action="store_true", help="score MODEL.WEIGHTS, or student_last of OUTPUT_DIR")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="for example SOLVER.MAX_ITER 100")
    args, unknown = parser.parse_known_intermixed_args()
    if unknown:
        raise InputError(f"unrecognized arguments: {' '.join(unknown)}; see --help")
    engine = args.engine or "torchvision"
    if args.engine == "detectron2":
        installed = importlib.util.find_spec("detectron2") is not None
        raise InputError(
            "the engine detectron2 is not written yet; take --engine torchvision"
            if installed
            else f"detectron2 is not installed: {BUILD}"
        )
    if args.num_gpus < 1:
        raise InputError(f"--num-gpus must be at least 1, got {args.num_gpus}")
    if args.num_gpus > 1 and "RANK" not in os.environ:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.num_gpus}"]
        os.execv(sys.executable, [*launcher, *sys.argv])
    distributed.start()
    say(f"engine: {engine}")
    with distributed.same_error():
        cfg = config.load(args.config_file, args.opts)
    if args.eval_only:
        evaluate(cfg)
    else:
        run(cfg, resume=args.resume, overwrite=args.overwrite)


if __name__ == "__main__":
    command(main)
