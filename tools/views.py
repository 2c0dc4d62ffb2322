"""Draw what a data set's images, its views and RandAugment's operations look like.

python tools/views.py -d digits -o views.png
"""

import argparse
from pathlib import Path

from mdistiller.analysis.sheets import class_sheet, operation_sheet, stacked, view_sheet
from mdistiller.dataset import load_splits, open_dataset
from mdistiller.engine.cfg import load_config
from mdistiller.engine.cli import check_output, command
from mdistiller.registry import InputError

SHEETS = {"classes": class_sheet, "views": view_sheet, "operations": operation_sheet}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", "--dataset", required=True, help="a name that tools/list.py shows")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="FILE", help="picture to write, PNG")
    parser.add_argument("-s", "--sheet", choices=SHEETS, action="append", help="may be repeated; default: all")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="settings, for example DATASET.IMAGE_SIZE 32")
    args = parser.parse_intermixed_args()
    check_output(args.out, "-o")
    cfg = load_config(options=["DATASET.TYPE", args.dataset, *args.opts])
    dataset, split = open_dataset(cfg), load_splits(cfg).train
    picture = stacked([SHEETS[name](dataset, split) for name in args.sheet or SHEETS])
    try:
        picture.save(args.out, format="PNG")
    except OSError as error:
        raise InputError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"{args.out}: {picture.width}x{picture.height} pixels")


if __name__ == "__main__":
    command(main)
