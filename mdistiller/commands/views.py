"""Draw what a data set's images, its views and RandAugment's operations look like.

python tools/views.py -d digits -o views.png
"""

from mdistiller.analysis.sheets import class_sheet, operation_sheet, page, view_sheet
from mdistiller.dataset import load_splits, open_dataset
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import Parser, check_output, user_path
from mdistiller.registry import InputError

SHEETS = {"classes": class_sheet, "views": view_sheet, "operations": operation_sheet}
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("views", __doc__)
    parser.add_argument("-d", "--dataset", required=True, help="a name that tools/list.py shows")
    parser.add_argument(
        "-o", "--out", required=True, type=user_path, metavar="FILE", help="picture to write, .png or .jpg"
    )
    parser.add_argument(
        "-s", "--sheet", choices=SHEETS, action="append", help="sheet to draw; may be repeated; default: all"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings, for example DATASET.IMAGE_SIZE 32")
    args = parser.parse_intermixed_args(arguments)
    check_output(args.out, "-o")
    if args.out.suffix.lower() not in FORMATS:
        raise InputError(f"-o: {args.out} must end in {' or '.join(FORMATS)}")
    cfg = load_config(options=["DATASET.TYPE", args.dataset, *args.opts])
    dataset, split = open_dataset(cfg), load_splits(cfg).train
    picture = page([SHEETS[name](dataset, split) for name in args.sheet or SHEETS])
    try:
        picture.save(args.out, format=FORMATS[args.out.suffix.lower()], quality=90)
    except OSError as error:
        raise InputError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {picture.width}x{picture.height} pixels")
