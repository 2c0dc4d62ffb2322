"""Timing of alternatives side by side, so that a machine that others use too slows all of them alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mdistiller.engine.utils import processor_name


@dataclass(frozen=True)
class Sample:
    """The time of one run of a case.

    Args:
        wall: seconds on the clock.
        cpu: seconds that all threads of the process computed, child processes that have ended included.
    """

    wall: float
    cpu: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """At least one value; of one or two, the quartiles are the smallest and the largest."""
        if len(values) < 3:
            return cls(statistics.median(values), min(values), max(values))
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def interleaved(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, list[Sample]]:
    """Run the cases in turns, A B C, C B A, A B C, ...; each round gives one sample of each.

    Args:
        cases: what to run, by name.
        rounds: how often, 1 or more.
        warmup: rounds before that which are not counted.
        synchronize: waits until the device has done what it was told.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            synchronize()
            cpu, wall = cpu_seconds(), time.perf_counter()
            cases[name]()
            synchronize()
            taken = Sample(time.perf_counter() - wall, cpu_seconds() - cpu)
            if number >= warmup:
                samples[name].append(taken)
    return samples


def cpu_seconds() -> float:
    """Of this process and of those of its children that have ended."""
    try:
        import resource
    except ImportError:  # Windows
        return time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def ratios(samples: list[Sample], baseline: list[Sample], clock: str) -> Spread:
    """How many times as long as the baseline, round by round. ``clock``: ``"wall"`` or ``"cpu"``."""
    pairs = zip(samples, baseline, strict=True)
    return Spread.of([getattr(own, clock) / max(getattr(other, clock), 1e-9) for own, other in pairs])


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # others at work: above threads
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
