"""Timing of alternatives in turns, so that other processes of the machine slow all alternatives alike."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mdistiller.engine.utils import cores, processor_name


@dataclass(frozen=True)
class Sample:
    """The time of one run of a case.

    Args:
        wall: seconds on the clock.
        cpu: CPU seconds of all threads of the process and of its finished child processes.
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
        """Of at least one value; with one or two values, the quartiles are the smallest and the largest value."""
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
    """Run the cases in turns, A B C, C B A, A B C, ...; each round gives one sample of each case.

    Args:
        cases: functions by name.
        rounds: number of timed rounds, 1 or more.
        warmup: number of rounds before them without timing.
        synchronize: waits for the device.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in cases}
    for number in range(warmup + rounds):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            synchronize()
            cpu, wall = cpu_seconds(), time.perf_counter()
            cases[name]()
            synchronize()
            sample = Sample(time.perf_counter() - wall, cpu_seconds() - cpu)
            if number >= warmup:
                samples[name].append(sample)
    return samples


def cpu_seconds() -> float:
    """CPU seconds of this process and of its finished child processes."""
    try:
        import resource
    except ImportError:  # Windows
        return time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def ratios(samples: list[Sample], baseline: list[Sample], clock: str) -> Spread:
    """The time divided by the baseline's, round by round. ``clock``: ``"wall"`` or ``"cpu"``."""
    pairs = zip(samples, baseline, strict=True)
    return Spread.of([getattr(sample, clock) / max(getattr(other, clock), 1e-9) for sample, other in pairs])


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and software of a measurement."""
    return {
        "processor": processor_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,  # above threads: other processes
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
