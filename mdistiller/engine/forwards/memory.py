"""``SOLVER.TEACHER_MEMORY disk``: the frozen teacher's outputs of every epoch, in files for all runs on these images.

A view of an image is a function of seed, epoch, image and recipe. So the teacher's outputs on the view are equal in all
runs of this seed, whatever the method, and one run computes them for all. Kept are outputs that are vectors and that a
method reads: logits and pooled features, in the number format in which the teacher computed them. What is read equals
what was computed, bit for bit.

- The folder of the outputs is named by the hash of all that they depend on (:func:`identity_of`), its files by epoch,
  view and output; ``about.json`` has the identity in words. For the rows see :mod:`.rows`.
- If one row of a batch is not valid, the teacher computes the whole batch, view by view, and the missing rows are
  written.
- A call of the teacher on other images than a view of the batch is computed as ever, and so are feature maps, which are
  larger by a factor of hundreds.
- At its first step a run computes the batch anyway and compares it with the files, so an unexpected difference of the
  machines does not go unnoticed.
- A full disk ends the writing, and the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mdistiller.dataset import Loader
from mdistiller.messages import say, warn
from mdistiller.options import options_of
from mdistiller.registry import image_side

from ..config.experiment import flatten
from ..folder.checkpoint import fingerprint, write_atomically
from ..processes import distributed
from .chain import linked
from .on_access import read_on_access
from .precision import Precision
from .rows import RowFile

KEY = "SOLVER.TEACHER_MEMORY"
FOLDER = "teacher_memory"  # below LOG.PREFIX
LAYOUT = 1  # version of the files
DRAWS = 1  # version of random numbers and operations: raise it if any recipe's pixels change
FORMATS = {"as_computed": None, "float16": torch.float16, "float32": torch.float32}


def remember_teacher(distiller: nn.Module, loader: Any, cfg: Any, precision: Precision) -> TeacherMemory | None:
    """The memory of a run with ``SOLVER.TEACHER_MEMORY disk``; ``None``, with a notice, if it cannot be served.

    Args:
        distiller: on its device; its teacher computes as in the run.
        loader: of the training images.
        cfg: the configuration.
        precision: of the teacher's computation.
    """
    reasons = {
        "has no teacher": getattr(distiller, "teacher", None) is None,
        "trains a part of its teacher": distiller.teacher_parameters(),
        "runs its teacher on the statistics of the batch": distiller.teacher_batch_statistics,
        "trains in several processes": distributed.world_size() > 1,
        "has a loader of its own": not isinstance(loader, Loader),
    }
    reasons |= {"has views that a repr does not tell apart": not any(reasons.values()) and not _is_plain(loader)}
    if why := [reason for reason, holds in reasons.items() if holds]:
        say(f"{KEY}: {cfg.DISTILLER.TYPE} {why[0]}, so its teacher computes in every step")
        return None
    return TeacherMemory(distiller.teacher, loader, cfg, precision)


def identity_of(teacher: nn.Module, loader: Loader, cfg: Any, precision: Precision) -> dict[str, Any]:
    """All that the outputs depend on beside epoch, view and image, as plain values."""
    images, options, flat, device = loader.dataset, options_of(cfg), flatten(cfg), precision.device
    network = {key: value for key, value in flat.items() if key.startswith("DISTILLER.TEACHER")}
    network = {key: value for key, value in network.items() if key not in options or options[key].decides_result}
    mixing = images.mixing if images.mixing is not None and images.mixing.needs_partners else None
    return {
        "layout": LAYOUT,
        "draws": DRAWS,
        "network": network,
        "weights": fingerprint(teacher.state_dict()),
        "images": images.split.images.fingerprint(),
        "number of images": len(images),
        "side": image_side(cfg),
        "mean and std": [images.mean.flatten().tolist(), images.std.flatten().tolist()],
        "seed": images.seed,
        "mixing": None if mixing is None else {"mixup": mixing.mixup, "cutmix": mixing.cutmix},
        "batch": [loader.batch_size, loader.sampler.drop_last],
        "number format": str(precision.autocast_dtype),
        "channels last": precision.channels_last,
        "folded": bool(cfg.SOLVER.FAST_TEACHER),
        "compiled": cfg.SOLVER.COMPILE_MODE if cfg.SOLVER.COMPILE != "off" else "",
        "stored as": cfg.SOLVER.TEACHER_MEMORY_FORMAT,
        "torch": str(torch.__version__),
        "device": [
            device.type,
            torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
            platform.machine(),
            torch.get_float32_matmul_precision(),
        ],
    }


class TeacherMemory:
    """The link of the teacher within :meth:`of`; outside, the teacher computes as ever.

    Args:
        teacher: frozen, in eval mode.
        loader: of the training images.
        cfg: the configuration.
        precision: in which the teacher computes.
    """

    def __init__(self, teacher: nn.Module, loader: Loader, cfg: Any, precision: Precision) -> None:
        self.teacher, self.precision, self.method = teacher, precision, cfg.DISTILLER.TYPE
        self.parts = [module for module in teacher.modules() if module is not teacher]
        self.format = FORMATS[cfg.SOLVER.TEACHER_MEMORY_FORMAT]
        self.views = {field: _file_name(*view) for field, view in loader.dataset.views.items()}
        identity = identity_of(teacher, loader, cfg, precision)
        text = json.dumps(identity, indent=1, sort_keys=True)
        self.identity = hashlib.sha256(text.encode()).hexdigest()[:24]
        root = Path(cfg.SOLVER.TEACHER_MEMORY_DIR or Path(cfg.LOG.PREFIX) / FOLDER)
        self.folder = root / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', cfg.DISTILLER.TEACHER)}_{self.identity}"
        self.tree: Any = None  # the output, with numbers for its leaves
        self.shapes: list[torch.Size] = []  # of the leaves for one image
        self.types: list[torch.dtype] = []
        self.epoch = 0
        self.files: dict[tuple[str, int], RowFile] = {}  # of the epoch, by view and leaf
        self.versions = self._versions()
        self.writes = self._begin(text)
        self.said: set[str] = set()
        self.differs = False  # the files, from what the teacher computes

    @contextmanager
    def of(self, batch: dict[str, Tensor], epoch: int) -> Iterator[None]:
        """Context in which the teacher's outputs on the batch's views come from the files."""
        if epoch != self.epoch:
            self.epoch, self.files = epoch, {}
        with linked(self.teacher, "cache", partial(self._kept_output, batch)):
            yield

    def _begin(self, about: str) -> bool:
        """Whether the folder can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "about.json").is_file():
                write_atomically(self.folder / "about.json", about)
        except (OSError, RuntimeError) as error:
            warn(f"{KEY}: nothing is written: {error}")
            return False
        say(f"{KEY}: the teacher's outputs are kept in {self.folder}")
        return True

    def _kept_output(self, batch: dict[str, Tensor], following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())
        fields = _views_in(given[0], batch) if len(given) == 1 and isinstance(given[0], Tensor) else None
        reasons = {
            "shows its teacher other images than the batch's": not fields,
            "has its teacher in training mode": self.teacher.training or any(m.training for m in self.parts),
            "has hooks on the teacher's modules": any(m._forward_hooks or m._forward_pre_hooks for m in self.parts),
            "changes its teacher's weights": self._versions() != self.versions,
        }
        why = next((reason for reason, holds in reasons.items() if holds), None)
        if why is not None:
            self._say_once(f"{self.method} {why}; these calls are computed in every step")
        answer = _Answer(self, batch, fields, following)
        if why is None and self.tree is None:
            self._learn(answer, fields[0])
        if why is not None or self.differs:
            return following(*args, **kwargs)
        return read_on_access(self.tree, answer.leaf)

    def _learn(self, answer: _Answer, field: str) -> None:
        """Learn the output's structure from a batch that is computed, and compare the batch with the files."""
        leaves = answer.computed(field)
        self.shapes, self.types = [leaf.shape[1:] for leaf in leaves], [leaf.dtype for leaf in leaves]
        self.tree = tree_unflatten(range(len(leaves)), answer.structure)
        for number, leaf in enumerate(leaves):
            if self._is_kept(number):
                values, valid = self._read(field, number, answer.index)
                self.differs |= not np.array_equal(values[valid], _bytes_of(self._rounded(leaf))[valid])
        if self.differs:
            warn(
                f"{KEY}: the files in {self.folder} differ from what the teacher computes here, although all known "
                "causes of a difference are equal; the teacher computes in every step, and nothing is written"
            )

    def _is_kept(self, number: int) -> bool:
        return len(self.shapes[number]) == 1 and self.types[number].is_floating_point

    def _file(self, field: str, number: int) -> RowFile:
        key = self.views[field], number
        if key not in self.files:
            kind = self.format or self.types[number]
            length = self.shapes[number].numel() * kind.itemsize
            path = self.folder / f"epoch_{self.epoch:04d}" / f"{key[0]}_output{number}.rows"
            self.files[key] = RowFile(path, self.identity, length)
        return self.files[key]

    def _read(self, field: str, number: int, index: list[int]) -> tuple[np.ndarray, np.ndarray]:
        return self._file(field, number).read(index)

    def _write(self, field: str, number: int, index: list[int], values: np.ndarray) -> None:
        if not self.writes:
            return
        try:
            self._file(field, number).write(index, values)
        except OSError as error:
            self.writes = False
            warn(f"{KEY}: writing ends, the run goes on: {error.strerror or error}")

    def _rounded(self, leaf: Tensor) -> Tensor:
        return leaf if self.format is None else leaf.to(self.format)

    def _versions(self) -> int:
        return sum(tensor._version for tensor in (*self.teacher.parameters(), *self.teacher.buffers()))

    def _say_once(self, what: str) -> None:
        if what not in self.said:
            self.said.add(what)
            say(f"{KEY}: {what}")


class _Answer:
    """The output of one call: each leaf from the files, or computed when a method reads it.

    Args:
        memory: the run's.
        batch: the loader's.
        fields: the views that make up the call's images.
        following: computes.
    """

    def __init__(
        self, memory: TeacherMemory, batch: dict[str, Tensor], fields: list[str], following: Callable[..., Any]
    ) -> None:
        self.memory, self.batch, self.fields, self.following = memory, batch, fields, following
        self.index = batch["index"].tolist()
        self.outputs: dict[str, list[Tensor]] = {}
        self.structure: Any = None

    def leaf(self, number: int) -> Tensor:
        parts = [self._of_view(field, number) for field in self.fields]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @torch.no_grad()
    def computed(self, field: str) -> list[Tensor]:
        if field not in self.outputs:
            with self.memory.precision.autocast():
                output = self.following(self.batch[field])
            self.outputs[field], self.structure = tree_flatten(output)
        return self.outputs[field]

    def _of_view(self, field: str, number: int) -> Tensor:
        memory = self.memory
        if not memory._is_kept(number):
            memory._say_once(f"{memory.method} reads the teacher's maps, which are computed in every step")
            return self.computed(field)[number]
        values, valid = memory._read(field, number, self.index)
        if not valid.all():
            rows = _bytes_of(memory._rounded(self.computed(field)[number]))
            missing = ~valid
            memory._write(field, number, [i for i, m in zip(self.index, missing, strict=True) if m], rows[missing])
            values = np.where(valid[:, None], values, rows)
        kind = memory.format or memory.types[number]
        tensor = torch.from_numpy(np.ascontiguousarray(values)).view(kind).view(-1, *memory.shapes[number])
        return memory.precision.place_tensor(tensor).to(memory.types[number])


def _views_in(images: Tensor, batch: dict[str, Tensor]) -> list[str] | None:
    """The batch's views that an input of the teacher is made of, one behind the other; ``None``: it is another."""
    views = {name: value for name, value in batch.items() if name.startswith("image")}
    found = [name for name, view in views.items() if images is view]
    if found:
        return found
    size = len(batch["index"])
    if len(images) % size:
        return None
    names = [
        next((name for name, view in views.items() if view.shape == block.shape and torch.equal(view, block)), None)
        for block in images.split(size)
    ]
    return None if None in names else names


def _file_name(name: str, recipe: Any) -> str:
    """A view's part of a file's name: its name, which its random numbers depend on, and the hash of its recipe."""
    return f"{name}_{hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]}"


def _is_plain(loader: Loader) -> bool:
    """Whether equal views have equal ``repr``: none shows an address."""
    return " at 0x" not in repr(loader.dataset.views)


def _bytes_of(leaf: Tensor) -> np.ndarray:
    """The values of ``(B, ...)`` as ``(B, bytes)`` uint8."""
    flat = leaf.detach().cpu().contiguous().reshape(len(leaf), -1)
    return flat.view(torch.uint8).numpy()
