"""Running a plan: finished runs are kept, interrupted runs are continued, and processes run in parallel."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from mdistiller.engine.config.experiment import same_result
from mdistiller.engine.config.node import read_yaml
from mdistiller.engine.folder.run_folder import changed_settings, holds_run, make_folder
from mdistiller.engine.forwards.precision import resolve_device
from mdistiller.engine.hooks import StopRequested
from mdistiller.engine.run import run
from mdistiller.engine.task import task_of
from mdistiller.engine.utils import cores
from mdistiller.files import file_sha256
from mdistiller.plugins import place_in_file, source_of
from mdistiller.registry import InputError, RunError, distiller_dict

from .plan import Cell, Plan


def run_plan(
    plan: Plan, jobs: int = 0, say: Callable[[str], None] = print
) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Run the unfinished runs of a plan and return all results.

    Args:
        plan: the plan.
        jobs: number of parallel processes; 0: one for each core on a CPU, one on a GPU. The processes share torch's
            default number of threads: the number of cores, or ``OMP_NUM_THREADS``.
        say: called with a line about each run.

    Returns:
        The content of each run's ``results.json``, by (method, pair, seed).

    Raises:
        InputError: ``jobs`` is negative, the plan's folder is not writable, or some runs could not start. The message
            names these runs and their log files. The other runs are kept.
        RunError: some runs failed after their start; the message is the same.
    """
    if jobs < 0:
        raise InputError(f"the number of jobs must be 0 or more, got {jobs}")
    make_folder(plan.output)
    teachers, cells = list(plan.teachers().values()), plan.cells()
    jobs = jobs or _default_jobs(cells[0])
    for stage in (teachers, cells):
        todo = [cell for cell in stage if finished_results(cell) is None]
        if len(todo) < len(stage):
            say(f"{len(stage) - len(todo)} of {len(stage)} runs are done already")
            _say_other_versions([cell for cell in stage if cell not in todo], say)
        _run_all(todo, min(jobs, len(todo)), say)
    return {(cell.method, cell.pair, cell.seed): finished_results(cell) for cell in cells}


def finished_results(cell: Cell) -> dict[str, Any] | None:
    """The results of a cell if its run has finished with the cell's current configuration and teacher."""
    results = _results(cell)
    return results if results.get("status") == "finished" and _same_run(cell) else None


def _say_other_versions(done: list[Cell], say: Callable[[str], None]) -> None:
    """Name the runs whose method's file has changed since the run."""
    changed: dict[str, list[Path]] = {}
    for cell in done:
        before, now = _results(cell).get("method_file"), source_of(distiller_dict[cell.cfg.DISTILLER.TYPE])
        if before and now and before["sha256"] != now["sha256"]:
            changed.setdefault(now["path"], []).append(cell.folder)
    for path, folders in changed.items():
        say(
            f"made with another version of {path}, and kept: {', '.join(map(str, folders))}; to run them again, delete "
            "these folders"
        )


def _results(cell: Cell) -> dict[str, Any]:
    try:
        return json.loads((cell.folder / "results.json").read_text())
    except (OSError, ValueError):
        return {}


def _same_run(cell: Cell) -> bool:
    """Whether the run in the cell's folder, finished or not, has the cell's current configuration and teacher."""
    try:
        before = read_yaml(cell.folder / "config.yaml")
        if changed_settings(cell.folder, cell.cfg):  # settings changed on a resume: no single configuration gives this
            return False
    except (OSError, InputError):
        return False
    if not isinstance(before, dict):
        return False
    if not same_result(before, cell.cfg):
        return False
    teacher, keys = _results(cell).get("teacher", {}), cell.cfg.DISTILLER
    files = ((teacher.get("sha256"), keys.TEACHER_CKPT), (teacher.get("classes_sha256"), keys.TEACHER_CLASSES))
    return all(used is None or not Path(now).is_file() or used == file_sha256(now) for used, now in files)


def _default_jobs(cell: Cell) -> int:
    return cores() if resolve_device(cell.cfg.SOLVER.DEVICE).type == "cpu" else 1


def _run_all(cells: list[Cell], jobs: int, say: Callable[[str], None]) -> None:
    failed, images, start, kind = [], 0, time.perf_counter(), InputError
    if cells:
        say(f"{len(cells)} to run, {jobs} at a time; the .log files show the progress, {cells[0].console} for example")
    for number, (cell, seconds, problem, wrong_input) in enumerate(_in_processes(cells, jobs), start=1):
        place = f"[{number}/{len(cells)}] {cell.method}, {cell.pair}, seed {cell.seed}"
        if problem:
            failed.append(f"{cell.method}, {cell.pair}, seed {cell.seed}: {problem} ({cell.console})")
            say(f"{place}: failed: {problem}")
            kind = kind if wrong_input else RunError
        else:
            results = finished_results(cell)
            images += results.get("images_seen", 0)
            headline = task_of(cell.cfg).headline
            value = headline.with_unit(results["last"][headline.name])
            say(f"{place}: {value} after the last epoch, {seconds:.0f} s")
    if images:
        rate = images / (time.perf_counter() - start)
        say(f"{len(cells) - len(failed)} runs, {jobs} side by side: {rate:,.0f} images a second in total")
    if failed:
        raise kind("some runs failed:\n  " + "\n  ".join(sorted(failed)))


def _move_aside(folder: Path) -> None:
    """Rename the folder of a run that has other settings."""
    if holds_run(folder):
        number = next(n for n in itertools.count(1) if not Path(f"{folder}_old{n}").exists())
        folder.rename(f"{folder}_old{number}")


def _in_processes(cells: list[Cell], jobs: int) -> Iterable[tuple[Cell, float, str, bool]]:
    if not cells:
        return
    threads = max(1, torch.get_num_threads() // jobs)  # torch's number follows OMP_NUM_THREADS or the cores
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    with ProcessPoolExecutor(jobs, context, _start_worker, (threads,)) as pool, _leaving_on_sigterm():
        futures = {pool.submit(_run_cell, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                try:
                    outcome = future.result()
                except (OSError, BrokenExecutor) as error:  # the log cannot be written; the process was killed
                    outcome = 0.0, str(error), False
                yield futures[future], *outcome
        except BaseException as error:  # Ctrl-C, SIGTERM: started runs save their state, the others do not start
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                print("stopped; run the command again to continue", file=sys.stderr)
            raise


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Context in which SIGTERM stops all runs, like Ctrl-C; a second signal kills them.

    A terminal sends Ctrl-C to all processes itself.
    """

    def leave(number: int, frame: Any) -> None:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # Python allows signal handlers in no other thread
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start_worker(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs; a run handles the signal, stops and saves
    torch.set_num_threads(threads)


def _run_cell(cell: Cell) -> tuple[float, str, bool]:
    """Run one cell in a worker process, and write its output to ``cell.console``.

    Returns:
        Seconds; the problem, empty if there is none; whether the problem is a user's mistake.
    """
    cell.console.parent.mkdir(parents=True, exist_ok=True)
    start, same = time.perf_counter(), _same_run(cell)
    if not same:
        _move_aside(cell.folder)
    problem, wrong_input = "", False
    with (
        cell.console.open("a" if same else "w") as console,
        contextlib.redirect_stdout(console),
        contextlib.redirect_stderr(console),
    ):
        try:
            run(cell.cfg, resume=same)
        except StopRequested as stopped:
            print(stopped)
            problem = "interrupted; the next call continues this run"
        except (Exception, SystemExit) as error:  # a failing run must not end the other runs
            traceback.print_exc()
            place = place_in_file(error)
            problem = (str(error).split("\n")[0] or type(error).__name__) + (f" ({place})" if place else "")
            wrong_input = isinstance(error, InputError)
    return time.perf_counter() - start, problem, wrong_input
