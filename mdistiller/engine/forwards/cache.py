"""``SOLVER.CACHE_TEACHER``: the frozen teacher's outputs on all training images, computed once and kept in memory.

``SOLVER.TEACHER_MEMORY memory`` is another name of this option.

The cache needs images that are equal in every epoch: one view without random operations, and no mixing of images. At
the first step, logits and pooled features are computed for all training images. A feature map is computed in a further
pass when the method first reads the map. Nothing is saved with the run: a resumed run computes equal outputs again,
since batches and their order in these passes do not depend on the step.

A method may change its teacher's weights without ``teacher_parameters()``; the cache does not notice such changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mdistiller.contract import contract_of
from mdistiller.dataset import Loader
from mdistiller.dataset.build import training_views
from mdistiller.dataset.views import is_random
from mdistiller.messages import say
from mdistiller.options import options_of
from mdistiller.registry import InputError, distiller_dict, open_dataset

from ..batch import images_of, to_batch
from ..config.experiment import flatten
from ..processes import distributed
from .chain import linked
from .on_access import read_on_access
from .precision import Precision

KEY = "SOLVER.CACHE_TEACHER"
SHARE_OF_MEMORY = 0.5  # of the free memory, for one output


def caches_in_memory(cfg: Any) -> bool:
    """Whether a run stores the teacher's outputs in memory."""
    return cfg.SOLVER.CACHE_TEACHER or cfg.SOLVER.TEACHER_MEMORY == "memory"


def check_cacheable(cfg: Any) -> None:
    """Refuse settings with which a teacher's outputs differ from epoch to epoch.

    Raises:
        InputError: names the keys, their values and the values to set.
    """
    name, keys = cfg.DISTILLER.TYPE, cfg.DATASET
    if not contract_of(distiller_dict[name]).teacher:
        raise InputError(f"{KEY} needs a teacher, and {name} has none; set it to False")
    if cfg.SOLVER.COMPILE == "teacher":
        raise InputError(f"{KEY}: a teacher with stored outputs is not compiled; set SOLVER.COMPILE off")
    views = training_views(cfg, distiller_dict[name])
    if len(views) > 1:
        raise InputError(
            f"{KEY}: {name} asks for {len(views)} views ({', '.join(views)}), and outputs are stored for one view; set "
            "it to False"
        )
    ((_, (view, recipe)),) = views.items()
    dataset, chosen = open_dataset(cfg), f"VIEW_{view.upper()}"
    options = options_of(cfg)
    changes = [f"{key} {v}" for key, v in flatten(cfg).items() if v and key in options and options[key].varies]
    if chosen not in keys:
        changes += [f"the view {view!r}, which {name} asks for"] if is_random(recipe) else []
    elif is_random(dataset.views[keys[chosen]]):
        fixed = [recipe for recipe, operations in dataset.views.items() if not is_random(operations)]
        changes.append(f"DATASET.{chosen} {keys[chosen]} (the same in every epoch: {', '.join(fixed) or 'none'})")
    if changes:
        raise InputError(
            f"{KEY} needs equal images in every epoch, and these change the images: {', '.join(changes)}; switch them "
            f"off, or set {KEY} False"
        )


def cache_teacher(distiller: nn.Module, loader: Any, cfg: Any, precision: Precision) -> TeacherCache:
    """Cache the teacher's outputs on the training images.

    Args:
        distiller: on its device; its teacher computes as in the run.
        loader: of the training images.
        cfg: with ``SOLVER.CACHE_TEACHER``.
        precision: of the teacher's computation.

    Raises:
        InputError: a method, a loader or a number of processes that does not allow a cache.
    """
    check_cacheable(cfg)
    name = cfg.DISTILLER.TYPE
    if distributed.world_size() > 1:
        raise InputError(f"{KEY} is for one process, and {distributed.world_size()} train; set it to False")
    if not isinstance(loader, Loader):
        raise InputError(f"{KEY} needs the training loader of build_loaders or get_dataset, to ask for single images")
    reasons = {
        "has frozen networks beside its teacher": set(distiller.frozen_networks()) - {"teacher"},
        "trains a part of its teacher": distiller.teacher_parameters(),
        "makes copies of the images of its own": distiller.student_images_per_sample > 1,
        "runs its teacher on the statistics of the batch": distiller.teacher_batch_statistics,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"{KEY}: {name} {reason}, so outputs cannot be stored; set it to False")
    return TeacherCache(name, distiller.teacher, loader, precision)


class TeacherCache:
    """The teacher's outputs. Within :meth:`of` a link of the teacher returns them; otherwise the teacher computes.

    Args:
        method: its name, for messages.
        teacher: frozen, in eval mode.
        loader: of the training images.
        precision: of the teacher's computation.
    """

    def __init__(self, method: str, teacher: nn.Module, loader: Loader, precision: Precision) -> None:
        self.method, self.precision = method, precision
        self.dataset, self.batch_size, self.num_workers = loader.dataset, loader.batch_size, loader.num_workers
        self.teacher, self.parts = teacher, [module for module in teacher.modules() if module is not teacher]
        self.kept: dict[int, Tensor] = {}  # (N, ...) by the leaf's number in the output
        self.channels_last: set[int] = set()  # the leaves that are kept as (N, H, W, C)
        self.tree: Any = None  # the output, with the number of each leaf in place of the leaf

    @contextmanager
    def of(self, batch: dict[str, Tensor], epoch: int) -> Iterator[None]:
        """Context in which the teacher's outputs on the batch's images come from memory."""
        (images,) = images_of(batch)
        with linked(self.teacher, "cache", partial(self._kept_output, images, batch["index"])):
            yield

    def _kept_output(
        self, images: Tensor, index: Tensor, following: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1 or inputs[0] is not images:
            raise InputError(
                f"{KEY}: {self.method} shows its teacher other images than the batch's, so "
                "outputs cannot be stored; set it to False"
            )
        if self.teacher.training or any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self.parts):
            raise InputError(
                f"{KEY}: {self.method} has its teacher in training mode, or hooks on the teacher's modules, so outputs "
                "cannot be stored; set it to False"
            )
        if self.tree is None:
            self._compute(following, None)
        return read_on_access(self.tree, partial(self._rows, following, index))

    def _rows(self, following: Callable[..., Any], index: Tensor, leaf: int) -> Tensor:
        if leaf not in self.kept:
            self._compute(following, leaf)
        rows = self.kept[leaf].index_select(0, index)
        return rows.movedim(-1, 1) if leaf in self.channels_last else rows

    @torch.no_grad()
    def _compute(self, following: Callable[..., Any], leaf: int | None) -> None:
        """One pass over the training images, for the output's leaf ``leaf``; ``None``: for all leaves ``(B, D)``."""
        start = time.perf_counter()
        new: dict[int, Tensor] = {}
        loader = Loader(self.dataset, self.batch_size, num_workers=self.num_workers)  # its workers end with it
        for item in loader:
            batch = to_batch(item, self.precision)
            with self.precision.autocast():
                leaves, structure = tree_flatten(following(*images_of(batch)))
            if not new:
                self.tree = tree_unflatten(range(len(leaves)), structure)
                numbers = [leaf] if leaf is not None else [n for n, value in enumerate(leaves) if value.ndim == 2]
                new = {number: self._room(number, leaves[number]) for number in numbers}
            for number, room in new.items():
                values = leaves[number].movedim(1, -1) if number in self.channels_last else leaves[number]
                room.index_copy_(0, batch["index"], values)
        self.kept |= new
        self.precision.synchronize()
        size, seconds = sum(map(_megabytes, new.values())), time.perf_counter() - start
        say(f"{KEY}: {size:.1f} MB of the teacher's outputs computed in {seconds:.1f} s")

    def _room(self, number: int, leaf: Tensor) -> Tensor:
        """Memory for an output on all images, in the type and the layout of the output on some.

        Raises:
            InputError: there is too little memory.
        """
        if leaf.ndim == 4 and not leaf.is_contiguous() and leaf.is_contiguous(memory_format=torch.channels_last):
            self.channels_last.add(number)
            leaf = leaf.movedim(1, -1)
        needed = len(self.dataset) * leaf[0].numel() * leaf.element_size() / 2**20
        free = free_megabytes(leaf.device)
        if needed > SHARE_OF_MEMORY * free:
            raise InputError(
                f"{KEY}: {self.method} reads an output of the teacher that is {tuple(leaf.shape[1:])} for each image, "
                f"{needed:.0f} MB for {len(self.dataset)}, more than half of the {free:.0f} MB that are free on "
                f"{leaf.device}; set it to False"
            )
        return leaf.new_empty(len(self.dataset), *leaf.shape[1:])


def free_megabytes(device: torch.device) -> float:
    """Free memory of a device; infinite if the system has no number (a CPU without ``/proc/meminfo``)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith("MemAvailable")), float("inf"))


def _megabytes(tensor: Tensor) -> float:
    return tensor.numel() * tensor.element_size() / 2**20
