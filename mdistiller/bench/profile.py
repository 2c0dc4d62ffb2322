"""The time of each part of a training step, in a common training loop and in ours, and a picture of the times.

The loops are unchanged. While they run, the functions of each part are wrapped with a clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.engine import trainer as own_loop
from mdistiller.engine.forwards.chain import linked, networks_of
from mdistiller.engine.utils import pyplot

from . import old_loop
from .epochs import OLD, OldRun, OwnRun
from .measure import Spread, cpu_seconds, interleaved

PARTS = {
    "batch": "making the batch",
    "teacher": "teacher forward",
    "student": "student forward",
    "losses": "losses",
    "backward": "backward",
    "update": "optimiser's update",
    "meters": "meters and all else",
}
REST, OUTSIDE = "meters", "outside"  # the rest of a step; work outside of steps: evaluation, checkpoints
STEP = "whole step"
OURS = "ours"

Place = tuple[Any, str, str]  # an object, the name of its function, the part of the function's time


class Parts:
    """Seconds of each part. The time of a part within another part counts once, so the parts sum to the whole.

    Args:
        clock: returns seconds; its zero does not matter.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.running = [REST]
        self.begin()

    def begin(self) -> None:
        """Set all seconds to zero."""
        self.seconds = dict.fromkeys([*PARTS, OUTSIDE], 0.0)
        self.since = self.clock()

    def end(self) -> dict[str, float]:
        """The seconds since :meth:`begin`."""
        self._count()
        return self.seconds

    def _count(self) -> None:
        now = self.clock()
        self.seconds[self.running[-1]] += now - self.since
        self.since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._count()
        self.running.append(OUTSIDE if self.running[-1] == OUTSIDE else name)  # an evaluation runs the student too
        try:
            yield
        finally:
            self._count()
            self.running.pop()

    def call(self, name: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
        with self.part(name):
            return function(*args, **kwargs)

    def timed(self, function: Callable, name: str) -> Callable:
        return partial(self.call, name, function)


class TimedLoader:
    """A loader. The wait for its batches counts as the part ``batch``."""

    def __init__(self, loader: Any, parts: Parts) -> None:
        self.loader, self.parts = loader, parts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        iterator = self.parts.timed(iter, "batch")(self.loader)
        following = self.parts.timed(next, "batch")
        while (item := following(iterator, None)) is not None:
            yield item


class Profiled:
    """Epochs of a run with the time of each part. The first epoch is a warm-up, and is in the list too.

    Args:
        run: the run.
        distiller: the run's method; its networks' passes are parts.
        places: the functions of the other parts.
        parts: the clock.
    """

    def __init__(self, run: OldRun | OwnRun, distiller: nn.Module, places: list[Place], parts: Parts) -> None:
        self.run, self.places, self.parts = run, places, parts
        frozen = distiller.frozen_networks().values()
        self.networks = [(net, "teacher" if net in frozen else "student") for net in networks_of(distiller)]
        self.epochs: list[dict[str, float]] = []

    def epoch(self) -> None:
        with ExitStack() as stack:
            for network, name in self.networks:
                stack.enter_context(linked(network, "listen", partial(self.parts.call, name)))
            for owner, attribute, name in self.places:
                stack.enter_context(_replaced(owner, attribute, self.parts.timed(getattr(owner, attribute), name)))
            self.parts.begin()
            self.run.epoch()
            self.epochs.append(self.parts.end())


@contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    on_instance = attribute in vars(owner)  # else it is the class's
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if on_instance:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def _places(distiller: nn.Module, optimizer: torch.optim.Optimizer) -> list[Place]:
    """The common parts of both loops, besides the networks."""
    return [
        (distiller, "forward", "losses"),
        (torch.autograd, "backward", "backward"),
        (optimizer, "step", "update"),
        (optimizer, "zero_grad", "update"),
    ]


def _profile_old(run: OldRun, parts: Parts) -> Profiled:
    run.train = TimedLoader(run.train, parts)
    outside = [(old_loop, "validate", OUTSIDE), (torch, "save", OUTSIDE)]
    places = [(old_loop, "to_device", "batch"), *_places(run.distiller, run.optimizer), *outside]
    return Profiled(run, run.distiller, places, parts)


def _profile_own(run: OwnRun, parts: Parts) -> Profiled:
    trainer = run.trainer
    trainer.train_loader = TimedLoader(trainer.train_loader, parts)
    scaler = [(trainer.scaler, "step", "update"), (trainer.scaler, "update", "update")]
    outside = [(hook, moment, OUTSIDE) for hook in trainer.hooks for moment in ("after_epoch", "epoch_done")]
    places = [(own_loop, "to_batch", "batch"), *_places(trainer.distiller, trainer.optimizer), *scaler, *outside]
    return Profiled(run, trainer.distiller, places, parts)


def parts_of_steps(cfg: Any, folder: Path, rounds: int, clock: str) -> list[dict[str, Any]]:
    """Milliseconds of each part of a step and of the whole step. The two loops run whole epochs in turns.

    Args:
        cfg: of our run; the old loop uses its networks, data and optimiser.
        folder: for checkpoints.
        rounds: number of timed epochs of each loop, after one epoch of warm-up.
        clock: ``"cpu"``: the process's CPU seconds; ``"wall"``: seconds, with a wait for the device after each part, so
            that parts do not overlap.
    """
    old, own = OldRun(cfg, folder / "old"), OwnRun(cfg, folder / "own")
    synchronize = own.trainer.precision.synchronize

    def waited() -> float:
        synchronize()
        return time.perf_counter()

    parts = Parts(cpu_seconds if clock == "cpu" else waited)
    profiled = {OLD: _profile_old(old, parts), OURS: _profile_own(own, parts)}
    try:
        samples = interleaved({way: run.epoch for way, run in profiled.items()}, rounds, 1, synchronize)
    finally:
        own.close()
    seconds: dict[str, dict[str, list[float]]] = {}
    for (way, run), steps in zip(profiled.items(), (len(old.train), own.trainer.steps_per_epoch), strict=True):
        counted = list(zip(run.epochs[1:], samples[way], strict=True))
        seconds[way] = {part: [epoch[part] / steps for epoch, _ in counted] for part in PARTS}
        seconds[way][STEP] = [(getattr(sample, clock) - epoch[OUTSIDE]) / steps for epoch, sample in counted]
    method = cfg.DISTILLER.TYPE
    return [_row(method, part, seconds[OLD][part], seconds[OURS][part]) for part in (*PARTS, STEP)]


def _row(method: str, part: str, old: list[float], own: list[float]) -> dict[str, Any]:
    return {
        "name": f"{method}: {PARTS.get(part, part)}",
        "method": method,
        "part": part,
        "old_ms": asdict(Spread.of([1000 * value for value in old])),
        "own_ms": asdict(Spread.of([1000 * value for value in own])),
        "ratio": asdict(Spread.of([b / max(a, 1e-9) for a, b in zip(old, own, strict=True)])),
    }


def table_of_parts(rows: list[dict[str, Any]], clock: str) -> list[tuple[str, ...]]:
    """The header and a line for each row, as text."""
    unit = "CPU ms" if clock == "cpu" else "wall ms"
    lines = [("", f"{OLD}, {unit}", f"{OURS}, {unit}", "times as long", "quartiles")]
    for row in rows:
        old, own, ratio = row["old_ms"]["median"], row["own_ms"]["median"], row["ratio"]
        known = old >= 0.005  # smaller for the teacher's pass of a method without teacher
        quartiles = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        spread = (f"{ratio['median']:.3f}", quartiles) if known else ("", "")
        lines.append((row["name"], f"{old:.2f}", f"{own:.2f}", *spread))
    return lines


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the steps of ``profile`` as bars to scale, one panel for each method, into the PNG file ``path``.

    Raises:
        InputError: matplotlib is not installed.
    """
    plt = pyplot("pictures")
    rows = report["rows"]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(
        len(methods), 1, figsize=(9, 0.3 + 3.1 * len(methods)), squeeze=False, layout="constrained"
    )
    setting = f"{report['teacher'].split(',')[0]} teaches {report['student']}, {report['data']}"
    clock = "CPU" if report["clock"] == "cpu" else "wall"
    for panel, method in zip(panels[:, 0], methods, strict=True):
        _draw_method(panel, {row["part"]: row for row in rows if row["method"] == method}, plt.get_cmap("tab10").colors)
        panel.set_title(f"A step of {method}: {setting}", fontsize=11, loc="left")
        panel.set_xlabel(
            f"{clock} milliseconds a step; old loop: float32, Pillow; ours: {report['precision']}", fontsize=9
        )
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


def _draw_method(panel: Any, rows: dict[str, dict[str, Any]], colors: Any) -> None:
    whole = rows[STEP]
    longest = max(whole[key]["median"] for key in ("old_ms", "own_ms"))
    for place, key in enumerate(("old_ms", "own_ms")):
        left = 0.0
        for part, color in zip(PARTS, colors, strict=False):
            width, (old, own) = rows[part][key]["median"], (rows[part][k]["median"] for k in ("old_ms", "own_ms"))
            label = f"{PARTS[part]}: {_short(old)} \N{RIGHTWARDS ARROW} {_short(own)} ms"
            panel.barh(place, width, left=left, color=color, label=None if place else label)
            if width > 0.045 * longest:
                panel.text(left + width / 2, place, _short(width), ha="center", va="center", color="white", fontsize=9)
            left += width
        speed = f", {1 / whole['ratio']['median']:.1f} times as fast" if place else ""
        end = f"{_short(whole[key]['median'])} ms{speed}"
        panel.text(left + 0.01 * longest, place, end, va="center", weight="bold")
    panel.set(yticks=[0, 1], yticklabels=[OLD, OURS], xlim=(0, 1.25 * longest))
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(loc="upper left", bbox_to_anchor=(0, -0.25), ncols=2, frameon=False, fontsize=9)


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.1f}"
