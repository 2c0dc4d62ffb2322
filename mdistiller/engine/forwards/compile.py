"""Faster steps with equal results: folded twins of frozen networks, compiled networks, reused memory."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import sys
from functools import partial
from typing import Any

import torch
from torch import nn

from mdistiller.registry import InputError, image_side

from .cache import caches_in_memory
from .chain import networks_of
from .fold import Folding

GRAPH_MODES = ("reduce-overhead", "max-autotune")  # of these, torch records CUDA graphs


def accelerate(distiller: nn.Module, cfg: Any) -> dict[str, Folding]:
    """Apply ``SOLVER.FAST_TEACHER``, ``SOLVER.COMPILE`` and ``SOLVER.COMPILE_MODE`` to a distiller's networks.

    Modules keep their names, parameters and state dicts. Compilation happens at the first step with each batch size. So
    a smaller last batch costs a second compilation (``SOLVER.DROP_LAST`` avoids it).

    Args:
        distiller: on its final device and in its final layout.
        cfg: the configuration.

    Returns:
        The frozen networks' foldings by attribute. A folding may be empty.

    Raises:
        InputError: a network is to be compiled and this machine has no compiler.
    """
    solver, frozen = cfg.SOLVER, distiller.frozen_networks()
    device = next(distiller.student.parameters()).device
    keep_freed_memory(device)
    to_compile = {"off": [], "teacher": [*frozen.values()], "all": networks_of(distiller)}[solver.COMPILE]
    if caches_in_memory(cfg):  # a cached teacher runs for one epoch only
        to_compile = [network for network in to_compile if network not in frozen.values()]
    if to_compile:
        check_compiler(device)
    compiled = {"mode": solver.COMPILE_MODE, "dynamic": False}
    folded = {}
    if solver.FAST_TEACHER:
        for name, network in frozen.items():
            compile_ = partial(torch.compile, **compiled) if network in to_compile else None
            folded[name] = Folding(network, (image_side(cfg),) * 2, compile_)
    for network in to_compile:
        if not any(folding.active for folding in folded.values() if folding.network is network):
            network.compile(**compiled)  # in place: links are called before compiled code, and copies are not compiled
    return folded


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
NEVER = 2**31 - 1  # bytes: free memory at the heap's end up to this size is kept


def keep_freed_memory(device: torch.device) -> None:
    """Let the C library keep freed memory for the next step instead of returning it to the system.

    Otherwise the system maps and zeroes each map of more than 32 MB again, page by page: a third of the time of a step
    on the CPU at 256 images of 32x32. Acts on the whole process; does nothing except on Linux with glibc.

    Args:
        device: where the networks run.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def check_compiler(device: torch.device) -> None:
    """Refuse to compile if torch cannot.

    Raises:
        InputError: on the CPU, no C++ compiler; on a GPU, no Triton.
    """
    if device.type == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++", "c++", "cl"]
        if not any(shutil.which(name) for name in names if name):
            raise InputError(
                "SOLVER.COMPILE needs a C++ compiler on the CPU, and neither g++ nor clang++ nor c++ is found; install "
                "one (Debian: apt install g++), name it in the environment variable CXX, or set SOLVER.COMPILE off"
            )
    elif importlib.util.find_spec("triton") is None:
        raise InputError("SOLVER.COMPILE needs the package triton on a GPU; install it, or set SOLVER.COMPILE off")


def begin_step(cfg: Any) -> None:
    """Tell torch that a step begins: the last step's outputs of CUDA graphs may be overwritten."""
    if cfg.SOLVER.COMPILE != "off" and cfg.SOLVER.COMPILE_MODE in GRAPH_MODES:
        torch.compiler.cudagraph_mark_step_begin()
