"""The network that a run deploys, rebuilt from the run's folder. The teacher's weights are not read."""

from __future__ import annotations

import csv
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.engine.build import build_deployed
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import check_weights, load_weights
from mdistiller.engine.folder.run_folder import CLASSES
from mdistiller.files import file_sha256
from mdistiller.models.any import Input, without_features
from mdistiller.options import options_of
from mdistiller.registry import InputError, open_dataset

WEIGHTS = {"last": "student_last", "best": "student_best", "average": "student_ema", "latest": "student_latest"}
"""The file in a run's folder, and in ``results.json`` the part of the same name but for :data:`SCORES`."""
SCORES = {"average": "ema", "latest": "last"}


class Deployable(nn.Module):
    """A network as it is used: images in, logits out.

    Args:
        network: returns the logits ``(B, K)``, alone or as the first of a tuple.
        input: transformation of the data set's images to the network's; ``None``: none.
        mean, std: of the data set, for each channel. With them, ``forward`` takes images of 8 bits and normalises them.
    """

    def __init__(
        self,
        network: nn.Module,
        input: Input | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.input, self.takes_bytes = network, input, mean is not None
        if mean is not None:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            self.register_buffer("scale", 1 / (255 * std), persistent=False)
            self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``(B, K)`` of images ``(B, 3, H, W)``: float32, normalised; or uint8."""
        if self.takes_bytes:
            image = image.float() * self.scale + self.shift
        if self.input is not None:
            image = self.input(image)
        output = self.network(image)
        return output[0] if isinstance(output, tuple) else output


@dataclass(frozen=True)
class Student:
    """A trained student and what its run knows of it.

    Args:
        folder: the run's.
        cfg: its configuration.
        dataset: its data set, opened.
        weights: a key of :data:`WEIGHTS`.
        network: with its original class, in eval mode, on the CPU.
        input: see :class:`Deployable`.
        results: ``results.json``.
        environment: ``environment.json``.
    """

    folder: Path
    cfg: Any
    dataset: Any
    weights: str
    network: nn.Module
    input: Input | None
    results: dict[str, Any]
    environment: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / WEIGHTS[self.weights]

    @property
    def side(self) -> int:
        """Of the images, in pixels."""
        return self.dataset.image_size

    @property
    def normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        """Mean and standard deviation of the images, for each channel."""
        return self.dataset.normalisation

    @property
    def recorded(self) -> dict[str, Any]:
        """What ``results.json`` says of these weights."""
        return self.results.get(SCORES.get(self.weights, self.weights)) or {}

    def deployable(self, normalises: bool = False) -> Deployable:
        facts = self.normalisation if normalises else (None, None)
        return Deployable(self.network, self.input, *facts).eval()

    @property
    def own_images(self) -> dict[str, Any]:
        """Size and normalisation of the images that the network itself is made for."""
        side, (mean, std) = self.side, self.normalisation
        if self.input is not None:
            side = self.input.size or side
            if self.input.normalises:
                scale, shift = (values.flatten().double() for values in (self.input.scale, self.input.shift))
                own = torch.tensor(std, dtype=torch.float64) / scale
                mean = [round(value, 6) for value in (torch.tensor(mean, dtype=torch.float64) - shift * own).tolist()]
                std = [round(value, 6) for value in own.tolist()]
        return {"input_size": [3, side, side], "mean": list(mean), "std": list(std)}

    def metadata(self, own: bool = False) -> dict[str, str]:
        """What the files carry beside the weights.

        Args:
            own: the images are the network's own, see :attr:`own_images`; else those of the data set.
        """
        size, (mean, std) = [3, self.side, self.side], map(list, self.normalisation)
        images = {"input_size": size, "mean": mean, "std": std}
        return {
            "student": self.cfg.DISTILLER.STUDENT,
            "method": self.cfg.DISTILLER.TYPE,
            "dataset": self.cfg.DATASET.TYPE,
            "weights": self.weights,
            "classes": json.dumps(list(self.dataset.classes)),
            **{key: json.dumps(value) for key, value in (self.own_images if own else images).items()},
            "config_sha256": file_sha256(self.folder / "config.yaml"),
        }


def read_student(
    folder: Path, weights: str = "last", options: Sequence[str] = (), allow_plugins: bool = False
) -> Student:
    """The student of a run.

    Args:
        folder: the run's.
        weights: a key of :data:`WEIGHTS`.
        options: ``KEY VALUE`` settings of the place of the data and the speed.
        allow_plugins: see :func:`mdistiller.engine.cfg.load_config`.

    Raises:
        InputError: no run; no such weights, with those that there are; damaged weights; options that would make another
            student; a network without logits, or one that needs its teacher.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        found = f"{folder} holds no config.yaml" if folder.is_dir() else f"there is no folder {folder}"
        found = f"{folder} is a file" if folder.is_file() else found
        raise InputError(f"{found}; name the folder of a run: output/PROJECT/NAME")
    file = _weights_file(folder, weights)
    cfg = load_config(config, ["DATASET.DOWNLOAD", "False", *options], allow_plugins=allow_plugins)
    declared = options_of(cfg)
    for key in options[::2]:
        if key not in declared or declared[key].decides_result:
            raise InputError(f"{key} decides what the run learned; only settings of place and speed can be given here")
    _recall_classes(open_dataset(cfg), folder)
    results, environment = (_read_json(folder / f"{name}.json") for name in ("results", "environment"))
    network = build_deployed(cfg, results.get("training_images", 0)).eval()
    check_weights(network.state_dict(), state := load_weights(file, whole=True), f"checkpoint {file}")
    network.load_state_dict(state)
    network, input = without_features(network)
    student = Student(folder, cfg, open_dataset(cfg), weights, network, input, results, environment)
    _check_logits(student)
    return student


def _weights_file(folder: Path, weights: str) -> Path:
    """The file of the weights; an error says what is there instead."""
    file = folder / WEIGHTS[weights]
    if file.is_file():
        return file
    there = [name for name, other in WEIGHTS.items() if (folder / other).is_file()]
    status = _read_json(folder / "results.json").get("status", "unfinished")
    problem = f"{folder} holds no {file.name}"
    if status != "finished":
        problem += f": the run is not finished ({_epochs_done(folder)} epochs are done)"
    elif weights == "average":
        problem += ": the run kept no average (SOLVER.EMA_DECAY)"
    ways = [f"take what is there by --weights {' or '.join(there)}"] if there else []
    ways += ["finish the run by its command and --resume"] if status != "finished" else []
    raise InputError("; ".join([problem, *(ways or ["nothing of its students is left"])]))


def _recall_classes(dataset: Any, folder: Path) -> None:
    """Give a data set whose files name the classes those that the run had, so that the files are not needed."""
    try:
        classes = json.loads((folder / CLASSES).read_text())
    except (OSError, ValueError):
        return
    for name, value in {"classes": tuple(classes), "num_classes": len(classes)}.items():
        if isinstance(inspect.getattr_static(dataset, name), cached_property):
            vars(dataset)[name] = value


def _epochs_done(folder: Path) -> int:
    try:
        with (folder / "metrics.csv").open(newline="") as file:
            return len(list(csv.DictReader(file)))
    except OSError:
        return 0


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _check_logits(student: Student) -> None:
    """Refuse a network whose output is no tensor of logits, or depends on the teacher."""
    with torch.no_grad():
        output = student.deployable()(torch.zeros(2, 3, student.side, student.side))
    name = student.cfg.DISTILLER.STUDENT
    if not isinstance(output, Tensor):
        found = f"{len(output)} tensors" if isinstance(output, (list, tuple, dict)) else type(output).__name__
        raise InputError(f"{name} returns {found}; a student for export must return one tensor, its logits (B, K)")
    if output.ndim != 2:
        raise InputError(f"{name} returns a tensor of shape {tuple(output.shape)}; logits are (B, K)")
    if not output.isfinite().all():
        raise InputError(
            f"the student of {student.cfg.DISTILLER.TYPE} predicts with its teacher, or its outputs are not finite; "
            "only a student that works alone can be exported"
        )
