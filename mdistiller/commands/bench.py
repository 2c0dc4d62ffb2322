"""Time losses, steps, data, teachers and whole epochs, as ratios of alternatives that run in turns.

python tools/bench.py step --methods VRM --cfg configs/digits/vrm/res20_res8.yaml
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mdistiller.bench.commands import COMMANDS, TRAIN_VARIANTS, Settings, check, render, run_command
from mdistiller.bench.profile import draw
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import Parser, allow_plugins_option, check_output, user_path
from mdistiller.engine.utils import pyplot
from mdistiller.registry import InputError

ABOUT = "\n".join(f"  {name:8} {function.__doc__}" for name, function in COMMANDS.items())


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("bench", f"{__doc__}\nWhat can be timed:\n{ABOUT}")
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--cfg", type=user_path, metavar="FILE", help="configuration with networks, data, precision")
    allow_plugins_option(parser)
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="default: all methods with a teacher")
    parser.add_argument(
        "--variants", nargs="+", default=[], metavar="NAME", help=f"for train: {', '.join(TRAIN_VARIANTS)}"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each case, taken in turns; default: 7")
    parser.add_argument("--steps", type=int, default=3, help="steps in a sample; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on the CPU; default: 1")
    parser.add_argument("--compile", action="store_true", help="for teacher: also measure torch.compile")
    parser.add_argument("--json", type=user_path, metavar="FILE", help="also write all timings to FILE")
    parser.add_argument("--picture", type=user_path, metavar="FILE", help="for profile: also draw the parts, as PNG")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="settings, as for tools/train.py")
    args = parser.parse_args(arguments)
    for option in ("json", "picture"):
        if getattr(args, option) is not None:
            check_output(getattr(args, option), f"--{option}")
    if not 1 <= args.threads <= 1024:
        raise InputError(f"--threads must be from 1 to 1024, got {args.threads}")
    torch.set_num_threads(args.threads)
    given = ["DATASET.NUM_WORKERS", "0", *args.set] if args.what != "train" else args.set
    settings = Settings(
        load_config(args.cfg, given, allow_plugins=args.allow_plugins),
        tuple(args.methods),
        args.rounds,
        args.steps,
        tuple(args.variants),
        args.compile,
    )
    check(settings)
    if args.picture is not None:
        if args.what != "profile":
            raise InputError(f"--picture draws what profile measures, not {args.what}; leave it out")
        pyplot("pictures")  # rather now than after the measurement
    report = run_command(args.what, settings)
    print(render(report))
    if args.json is not None:
        written(args.json, lambda: args.json.write_text(json.dumps(report, indent=1) + "\n"))
    if args.picture is not None:
        written(args.picture, lambda: draw(report, args.picture))


def written(path: Path, write: Callable[[], Any]) -> None:
    try:
        write()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None
