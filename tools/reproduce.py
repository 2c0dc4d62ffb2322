"""Run a plan (methods x pairs x seeds) and print its table. What is done is not run again.

python tools/reproduce.py --plan configs/plans/demo.yaml
"""

import argparse

from mdistiller.engine.cli import command
from mdistiller.reports import load_plan, run_plan
from mdistiller.reports.report import write_report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", required=True, metavar="FILE", help="see configs/plans/")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs side by side; default: one a core on a CPU, one on a GPU"
    )
    args = parser.parse_args()
    plan = load_plan(args.plan)
    print(plan.title, flush=True)
    report = write_report(plan, run_plan(plan, args.jobs))
    print("\n" + report.text)
    return 0 if report.claims_hold else 1


if __name__ == "__main__":
    command(main)
