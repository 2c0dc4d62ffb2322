"""Run plans (methods x pairs x seeds) and print their tables. What is done is not run again.

python tools/reproduce.py --plan configs/plans/demo.yaml
"""

import contextlib

from mdistiller.engine.cli import Parser, allow_plugins_option, check_output, user_path
from mdistiller.messages import command_line
from mdistiller.reports import load_plan, run_plan
from mdistiller.reports.report import write_page, write_report


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("reproduce", __doc__)
    parser.add_argument("--plan", type=user_path, required=True, nargs="+", metavar="FILE", help="see configs/plans/")
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs at the same time; default: one for each CPU core, one on a GPU"
    )
    allow_plugins_option(parser)
    parser.add_argument("--report", type=user_path, metavar="FILE", help="also write all tables to one Markdown page")
    args = parser.parse_args(arguments)
    plans = [load_plan(path, args.allow_plugins) for path in args.plan]  # all are checked before the first one runs
    if args.report:
        with contextlib.suppress(OSError):  # check_output says what is wrong
            args.report.parent.mkdir(parents=True, exist_ok=True)
        check_output(args.report, "--report")
    reports = []
    for plan in plans:
        print(plan.title, flush=True)
        reports.append(write_report(plan, run_plan(plan, args.jobs)))
        print("\n" + reports[-1].text + "\n", flush=True)
    if args.report:
        write_page(args.report, reports, command_line())
        print(f"All tables: {args.report}")
    return 0 if all(report.claims_hold for report in reports) else 1
