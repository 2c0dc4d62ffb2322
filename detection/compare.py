"""Train a student by several methods and seeds, and print a table of their scores.

python detection/compare.py --methods NONE KD MIMIC --seeds 0 1 2 [--output output/detection/compare]
    [--configs detection/configs/minicoco] [KEY VALUE ...]

A run that is finished is not run again, a run that was stopped continues.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mdistiller.dense import dense_dict
from mdistiller.detection import cfg as config
from mdistiller.detection.run import run
from mdistiller.engine.cli import Parser, command, user_path
from mdistiller.registry import check_choice


def main() -> None:
    parser = Parser("compare", __doc__)
    parser.prog = "python detection/compare.py"
    parser.add_argument("--methods", nargs="+", default=list(dense_dict), metavar="NAME", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="default: 0")
    folder = Path("detection/configs/minicoco")
    parser.add_argument("--configs", type=user_path, default=folder, help=f"holds NAME.yaml; default: {folder}")
    output = Path("output/detection/compare")
    parser.add_argument("--output", type=user_path, default=output, help=f"folder of the runs; default: {output}")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="for all runs")
    args = parser.parse_intermixed_args()
    for name in args.methods:
        check_choice("--methods", name, dense_dict)
    found: dict[str, list[dict]] = {name: [] for name in args.methods}
    for seed in args.seeds:
        for name in args.methods:
            place = args.output / f"{name}_{seed}"
            if not is_finished(place):
                options = ["SEED", str(seed), "OUTPUT_DIR", str(place), *args.opts]
                run(config.load(args.configs / f"{name}.yaml", options), resume=True)
            found[name].append(json.loads((place / "results.json").read_text()))
    print(table(found))


def is_finished(folder: Path) -> bool:
    path = folder / "results.json"
    return path.is_file() and json.loads(path.read_text()).get("status") == "finished"


def table(found: dict[str, list[dict]]) -> str:
    """Mean and deviation of the last AP over seeds, the gain over ``NONE``, and the seconds of training."""
    mean = {name: statistics.fmean(r["last"]["AP"] for r in results) for name, results in found.items()}
    lines = ["| method | AP | over NONE | AP50 | seeds | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    for name, results in found.items():
        values = [r["last"]["AP"] for r in results]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        gain = f"{mean[name] - mean['NONE']:+.1f}" if name != "NONE" and "NONE" in mean else ""
        ap50 = statistics.fmean(r["last"]["AP50"] for r in results)
        seconds = statistics.fmean(r["seconds"]["train"] for r in results)
        lines.append(f"| {name} | {mean[name]:.1f}{spread} | {gain} | {ap50:.1f} | {len(values)} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    command(main)
