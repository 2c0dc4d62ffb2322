"""The commands of ``tools/bench.py``. Each function returns the rows of its table."""

from __future__ import annotations

import copy
import datetime
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from mdistiller.contract import contract_of
from mdistiller.dataset import open_dataset
from mdistiller.engine.cfg import load_config
from mdistiller.engine.forwards.compile import check_compiler
from mdistiller.engine.forwards.fold import Folding
from mdistiller.engine.forwards.precision import Precision
from mdistiller.messages import command_line
from mdistiller.registry import InputError, distiller_dict, suggestion

from . import old_loop
from .epochs import OLD, PLAIN, OldRun, OwnRun, with_epochs
from .measure import Sample, Spread, interleaved, machine, ratios
from .profile import parts_of_steps, table_of_parts
from .subjects import (
    baseline_of,
    build_subject,
    calibrate_batch_norms,
    loss_alone,
    student_and_teacher,
    teacher_variants,
    with_options,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        cfg: the configuration of all cases.
        methods: names of methods; empty: the command's default.
        rounds: number of samples of each case.
        steps: number of steps (passes, batches) in a sample.
        variants: for ``train``: names in :data:`TRAIN_VARIANTS`.
        compiled: also measure with torch.compile.
    """

    cfg: Any
    methods: tuple[str, ...] = ()
    rounds: int = 7
    steps: int = 3
    variants: tuple[str, ...] = ()
    compiled: bool = False

    @property
    def precision(self) -> Precision:
        return Precision.from_cfg(self.cfg)

    @property
    def clock(self) -> str:
        """The clock of the ratio: CPU seconds on a CPU, since other processes may use it too; else wall seconds."""
        return "cpu" if self.precision.device.type == "cpu" else "wall"


def step(settings: Settings, folder: Path) -> list[Row]:
    """A whole training step of each method, compared with plain KD with as many views."""
    rows = []
    for baseline in ("KD", "KD_TWO_VIEWS"):
        methods = [name for name in _methods(settings) if baseline_of(name) == baseline and name != baseline]
        if methods:
            cases = {
                name: _repeated(
                    build_subject(with_options(settings.cfg, DISTILLER__TYPE=name), folder).stepper(), settings
                )
                for name in [baseline, *methods]
            }
            rows += _rows(_timed(cases, settings), baseline, settings, per=settings.steps)
    return rows


def loss(settings: Settings, folder: Path) -> list[Row]:
    """Each method without its networks: losses, own modules and their backward pass; compared with plain KD's."""
    cases = {}
    for name in dict.fromkeys(["KD", *_methods(settings)]):
        subject = build_subject(with_options(settings.cfg, DISTILLER__TYPE=name), folder, num_batches=1)
        cases[name] = _repeated(loss_alone(subject), settings)
    return _rows(_timed(cases, settings), "KD", settings, per=settings.steps)


def teacher(settings: Settings, folder: Path) -> list[Row]:
    """The teacher's forward pass, with one more speed-up in each row."""
    cfg = with_options(settings.cfg, DISTILLER__TYPE="KD", SOLVER__AMP="off")
    subject = build_subject(cfg, folder, num_batches=1)
    cases = {}
    for name, (network, precision, folded) in teacher_variants(cfg, settings.precision.device).items():
        batch = {key: precision.place_tensor(value) for key, value in subject.batches[0].items()}
        if not cfg.DISTILLER.TEACHER_CKPT:
            calibrate_batch_norms(network, [batch])
        twin = (Folding(network, batch["image"].shape[2:]).twin if folded else None) or network
        cases[name] = _forward(network, precision, batch["image"], settings)
        if folded and settings.compiled and precision.autocast_dtype is not None:
            check_compiler(precision.device)
            cases[f"{name}, compiled"] = _forward(torch.compile(twin), precision, batch["image"], settings)
    return _rows(_timed(cases, settings), "float32", settings, per=settings.steps)


def _forward(network: Callable, precision: Precision, image: torch.Tensor, settings: Settings) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad(), precision.autocast():
            network(image)

    return _repeated(once, settings)


def data(settings: Settings, folder: Path) -> list[Row]:
    """An epoch's batches with each method's views in one process: image by image with Pillow, and by our loader."""
    rows = []
    for name in settings.methods or ("KD", "KD_TWO_VIEWS"):
        cfg = with_options(settings.cfg, DISTILLER__TYPE=name, DATASET__LOADER="device")
        subject = build_subject(cfg, folder, num_batches=1)
        loader, kind = subject.loaders.train, open_dataset(cfg)
        pictures = old_loop.Pictures(loader.dataset.split, loader.dataset.views, *kind.normalisation)
        batches = [index.tolist() for _, index, *_ in loader.sampler]

        def with_pillow(pictures=pictures, batches=batches) -> None:
            for positions in batches:
                default_collate([pictures[position] for position in positions])

        def batched(loader=loader) -> None:
            loader.set_epoch(1)
            for _ in loader:
                pass

        pillow, ours = f"{name}: Pillow", f"{name}: batched"
        cases = {pillow: _repeated(with_pillow, settings), ours: _repeated(batched, settings)}
        per, images = settings.steps * len(batches), sum(map(len, batches)) / len(batches)
        rows += _rows(_timed(cases, settings), pillow, settings, per=per, images=images)
    return rows


def layout(settings: Settings, folder: Path) -> list[Row]:
    """The student's forward and backward pass with both memory layouts (SOLVER.CHANNELS_LAST off and on)."""
    batch = build_subject(with_options(settings.cfg, DISTILLER__TYPE="NONE"), folder, num_batches=1).batches[0]
    student, _ = student_and_teacher(settings.cfg)
    cases = {}
    for name in ("off", "on"):
        precision = Precision.from_cfg(with_options(settings.cfg, SOLVER__CHANNELS_LAST=name))
        network = precision.place(copy.deepcopy(student)).train()
        image = precision.place_tensor(batch["image"])

        def once(network=network, image=image, precision=precision) -> None:
            with precision.autocast():
                logits, _ = network(image)
            logits.float().square().mean().backward()
            network.zero_grad()

        cases[name] = _repeated(once, settings)
    return _rows(_timed(cases, settings), "off", settings, per=settings.steps)


TRAIN_VARIANTS: dict[str, dict[str, Any]] = {
    "float32": PLAIN,
    "bf16": {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True},
    # For methods with one view and DATASET.VIEW_WEAK plain; the pass that fills the cache is not timed.
    "bf16, cached teacher": {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True, "SOLVER__CACHE_TEACHER": True},
    "bf16, compiled teacher": {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True, "SOLVER__COMPILE": "teacher"},
    "bf16, compiled": {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True, "SOLVER__COMPILE": "all"},
}


def train(settings: Settings, folder: Path) -> list[Row]:
    """Whole epochs with evaluation and checkpoint, compared with a common training loop."""
    rows = []
    variants = settings.variants or ("float32", "bf16")
    for number, name in enumerate(settings.methods or (settings.cfg.DISTILLER.TYPE,)):
        cfg = with_epochs(settings.cfg, name, settings.rounds + 2)
        old = OldRun(cfg, folder / f"{number}_old")
        runs = {v: OwnRun(with_options(cfg, **TRAIN_VARIANTS[v]), folder / f"{number}_{v}") for v in variants}
        cases = {f"{name}: {OLD}": old.epoch, **{f"{name}: {v}": run.epoch for v, run in runs.items()}}
        try:
            samples = _timed(cases, settings)
        finally:
            for run in runs.values():
                run.close()
        images = old.images_per_epoch
        of_method = _rows(samples, f"{name}: {OLD}", settings, images=images)
        for row, run in zip(of_method[1:], runs.values(), strict=True):
            row["outside_steps"] = round(run.outside_steps, 4)
            row["waiting_for_data"] = round(run.waiting_for_data, 4)
        rows += of_method
    return rows


def profile(settings: Settings, folder: Path) -> list[Row]:
    """The time of each part of a step, in a common training loop and in ours."""
    rows = []
    for number, name in enumerate(settings.methods or (settings.cfg.DISTILLER.TYPE,)):
        cfg = with_epochs(settings.cfg, name, settings.rounds + 2)
        rows += parts_of_steps(cfg, folder / str(number), settings.rounds, settings.clock)
    return rows


def memory(settings: Settings, folder: Path) -> list[Row]:
    """Memory in MB that a method's steps add to a process (CPU), or the peak of the device's memory (GPU)."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for name in dict.fromkeys(["KD", *_methods(settings)]):
        cfg = with_options(settings.cfg, DISTILLER__TYPE=name)
        with context.Pool(1) as pool:
            peak = pool.apply(_peak_megabytes, (cfg.dump(), str(folder), settings.steps, torch.get_num_threads()))
        rows.append({"name": name, "megabytes": round(peak, 1)})
    for row in rows:
        row["baseline"], row["ratio"] = "KD", asdict(Spread.of([row["megabytes"] / max(rows[0]["megabytes"], 0.1)]))
    return rows


def _peak_megabytes(config: str, folder: str, steps: int, threads: int) -> float:
    """Called in a new process, since a process has one peak for its whole life."""
    torch.set_num_threads(threads)
    path = Path(folder) / "memory.yaml"
    path.write_text(config)
    subject = build_subject(load_config(str(path), allow_plugins=True), Path(folder), num_batches=2)
    device = subject.trainer.precision.device
    take = subject.stepper()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = _resident_megabytes(device)
    for _ in range(steps):
        take()
    subject.trainer.precision.synchronize()
    return _resident_megabytes(device) - before


def _resident_megabytes(device: torch.device) -> float:
    """The peak so far. On a GPU nothing is subtracted: the networks are part of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:
        raise InputError("memory on a CPU cannot be measured on Windows: Python has no module resource there") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


COMMANDS = {
    "loss": loss,
    "step": step,
    "data": data,
    "teacher": teacher,
    "layout": layout,
    "train": train,
    "profile": profile,
    "memory": memory,
}


def run_command(what: str, settings: Settings) -> dict[str, Any]:
    """Run a measurement. Returns its rows with the settings, the machine and the date."""
    with tempfile.TemporaryDirectory() as folder:
        rows = COMMANDS[what](settings, Path(folder))
    cfg = settings.cfg
    return {
        "what": what,
        "about": COMMANDS[what].__doc__,
        "command": command_line(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": machine(settings.precision.device),
        "rounds": settings.rounds,
        "steps": settings.steps,
        "teacher": f"{cfg.DISTILLER.TEACHER}, {cfg.DISTILLER.TEACHER_CKPT or 'fresh weights'}",
        "student": cfg.DISTILLER.STUDENT,
        "data": f"{cfg.DATASET.TYPE}, batches of {cfg.SOLVER.BATCH_SIZE}",
        "precision": f"AMP {cfg.SOLVER.AMP}, channels last {settings.precision.channels_last}, "
        f"compile {cfg.SOLVER.COMPILE}",
        "clock": settings.clock,
        "rows": rows,
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    facts = report["machine"]
    lines = [
        f"{report['what']}: {report['about']}",
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} threads, load {facts['load']}; device "
        f"{facts['device']}; torch {facts['torch']}; {report['date']}",
        f"teacher {report['teacher']}; student {report['student']}; {report['data']}; {report['precision']}",
        "",
    ]
    rows = report["rows"]
    if report["what"] == "memory":
        header = ("", "MB", "times KD's")
        body = [(row["name"], f"{row['megabytes']:.1f}", f"{row['ratio']['median']:.2f}") for row in rows]
    elif report["what"] == "profile":
        header, *body = table_of_parts(rows, report["clock"])
    else:
        header = (
            "",
            "wall ms",
            "CPU ms",
            f"times as long ({report['clock']})",
            "quartiles",
            "images/s",
            "outside steps",
        )
        body = [_text_of(row) for row in rows]
        empty = [place for place in range(len(header)) if not any(line[place] for line in body)]
        header, *body = (tuple(c for i, c in enumerate(line) if i not in empty) for line in [header, *body])
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
    for line in [header, *body]:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _text_of(row: Row) -> tuple[str, ...]:
    ratio = row["ratio"]
    is_baseline = row["name"] == row["baseline"]
    return (
        row["name"],
        f"{row['wall_ms']['median']:.2f}",
        f"{row['cpu_ms']['median']:.2f}",
        "1" if is_baseline else f"{ratio['median']:.3f}",
        "" if is_baseline else f"{ratio['low']:.3f} to {ratio['high']:.3f}",
        f"{row['images_per_second']:.0f}" if "images_per_second" in row else "",
        f"{100 * row['outside_steps']:.1f} %" if "outside_steps" in row else "",
    )


def _rows(
    samples: dict[str, list[Sample]], baseline: str, settings: Settings, per: int = 1, images: float = 0
) -> list[Row]:
    rows = []
    for name, of_case in samples.items():
        wall = Spread.of([1000 * sample.wall / per for sample in of_case])
        row = {
            "name": name,
            "baseline": baseline,
            "wall_ms": asdict(wall),
            "cpu_ms": asdict(Spread.of([1000 * sample.cpu / per for sample in of_case])),
            "ratio": asdict(ratios(of_case, samples[baseline], settings.clock)),
            "ratio_wall": asdict(ratios(of_case, samples[baseline], "wall")),
        }
        if images:
            row["images_per_second"] = 1000 * images / wall.median
        rows.append(row)
    return rows


def _methods(settings: Settings) -> list[str]:
    """The methods of the settings, else all methods with a teacher."""
    if settings.methods:
        return list(settings.methods)
    return [name for name in sorted(distiller_dict) if contract_of(distiller_dict[name]).teacher]


def _repeated(once: Callable[[], Any], settings: Settings) -> Callable[[], None]:
    def several() -> None:
        for _ in range(settings.steps):
            once()

    return several


def _timed(cases: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, list[Sample]]:
    return interleaved(cases, settings.rounds, warmup=1, synchronize=settings.precision.synchronize)


def check(settings: Settings) -> None:
    """Refuse settings that cannot be measured.

    Raises:
        InputError: names the argument, its value and the allowed values.
    """
    for name, value in (("--rounds", settings.rounds), ("--steps", settings.steps)):
        if value < 1:
            raise InputError(f"{name} must be 1 or more, got {value}")
    for name in settings.methods:
        if name not in distiller_dict:
            raise InputError(f"--methods: no method named {name!r}; {suggestion(name, distiller_dict)}")
    for name in settings.variants:
        if name not in TRAIN_VARIANTS:
            raise InputError(f"--variants: no variant named {name!r}; {suggestion(name, TRAIN_VARIANTS)}")
