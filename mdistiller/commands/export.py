"""Write a run's student as files for use: weights, ONNX, torch.export and a model card.

python tools/export.py output/digits/kd,res20,res8
python tools/export.py output/digits/kd,res20,res8 --formats onnx --int8 --normalize-inside
"""

from mdistiller.engine.cli import Parser, allow_plugins_option, user_path
from mdistiller.export import Request, export_run
from mdistiller.export.formats import FORMATS
from mdistiller.export.student import WEIGHTS

PLAIN = [name for name, form in FORMATS.items() if form.is_exact]


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("export", __doc__)
    parser.add_argument("run", type=user_path, metavar="RUN_FOLDER", help="folder of a run: output/PROJECT/NAME")
    parser.add_argument(
        "--out", type=user_path, metavar="FOLDER", help="folder of the files; default: RUN_FOLDER/export"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=PLAIN, default=PLAIN, help=f"files to write; default: {' '.join(PLAIN)}"
    )
    parser.add_argument(
        "--int8", action="store_true", help="also ONNX of 8 bits, calibrated on training images of the run"
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS, default="last",
        help="last: after the last epoch, default; best: of the best epoch; average: of SOLVER.EMA_DECAY; latest: of a "
        "run that is not finished",
    )  # fmt: skip
    parser.add_argument(
        "--normalize-inside", action="store_true", help="ONNX and torch.export take uint8 images and normalise them"
    )
    parser.add_argument("--no-score", action="store_true", help="do not run the files on the test images")
    allow_plugins_option(parser)
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY VALUE", help="settings of place and speed: DATASET.ROOT FOLDER"
    )
    args = parser.parse_args(arguments)
    export_run(
        Request(
            args.run,
            args.out,
            tuple(dict.fromkeys([*args.formats, *(["int8"] if args.int8 else [])])),
            args.weights,
            args.normalize_inside,
            not args.no_score,
            args.set,
            args.allow_plugins,
        )
    )
