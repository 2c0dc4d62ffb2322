"""Writes a run's student to a folder: each file is loaded again, compared with the network and scored."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdistiller.dataset import load_splits
from mdistiller.dataset.base import Split
from mdistiller.dataset.loader import BatchedImages, Loader
from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.task import task_of
from mdistiller.files import file_sha256, writing
from mdistiller.functional import draws
from mdistiller.messages import say, warn
from mdistiller.registry import InputError, RunError

from .card import card_of
from .formats import FORMATS, TOLERANCE, Format, Runner, check_installed
from .student import Student, read_student

RECORD, CARD = "export.json", "card.md"
CHECKED = (1, 3)  # sizes of the batches on which a file is compared with the network
CALIBRATION = 200  # training images from which the ranges of the activations are taken
LOSS = 1.0  # points of the headline that a file may lose without a warning


@dataclass(frozen=True)
class Request:
    """What is exported.

    Args:
        folder: a run's.
        out: the folder of the files; ``None``: ``export`` in the run's folder.
        formats: keys of :data:`~mdistiller.export.formats.FORMATS`.
        weights: a key of :data:`~mdistiller.export.student.WEIGHTS`.
        normalize_inside: ONNX and ``torch.export`` take uint8 images and normalise them.
        score: measure each file's accuracy on the test images.
        options: ``KEY VALUE`` settings, of the place of the data for example.
        allow_plugins: see :func:`mdistiller.engine.cfg.load_config`.
    """

    folder: Path
    out: Path | None = None
    formats: Sequence[str] = ("safetensors", "onnx", "pt2")
    weights: str = "last"
    normalize_inside: bool = False
    score: bool = True
    options: Sequence[str] = ()
    allow_plugins: bool = False


def export_run(request: Request) -> dict[str, Any]:
    """Write the files, ``card.md`` and ``export.json``; print a line for each.

    Nothing is put into the folder before all files are right.

    Returns:
        The content of ``export.json``.

    Raises:
        InputError: a missing package; no run, or one whose student cannot be read (:func:`read_student`); no data to
            score or calibrate on; a folder that cannot be written; a file in the way that no export wrote.
        RunError: a format cannot be made of this network, or its file gives other logits than the network.
    """
    check_installed(request.formats)
    if request.normalize_inside and not any(FORMATS[name].has_input for name in request.formats):
        raise InputError(f"--normalize-inside does nothing to {', '.join(request.formats)}; leave it out")
    student = read_student(request.folder, request.weights, request.options, request.allow_plugins)
    out = request.out or request.folder / "export"
    earlier = _own_files(out)
    _check_place(out, [*(FORMATS[name].file for name in request.formats), CARD, RECORD], earlier)
    splits = _splits(student, request)
    network = student.deployable(request.normalize_inside)
    with writing(out), tempfile.TemporaryDirectory(prefix=".export-", dir=_made(out)) as folder:
        files = {}
        for name in request.formats:
            form = FORMATS[name]
            path = Path(folder) / form.file
            images = _calibration(student, splits.train, network.takes_bytes) if name == "int8" else None
            path.write_bytes(form.write(student, network, images))
            runner = Runner(form.read(path, student), student, form.has_input and network.takes_bytes)
            facts = {"about": form.about, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
            facts |= _compared(student, form, runner)
            if request.score:
                facts["test"] = _score(student, runner, splits.test)
            files[form.file] = facts
            say(f"{form.file}: {_line(student, facts)}")
        _warn_of_losses(student, files)
        record = _record(student, request, files)
        (Path(folder) / CARD).write_text(card_of(student, record), encoding="utf-8")
        record["files"] = {**files, CARD: {"sha256": file_sha256(Path(folder) / CARD)}}
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        for path in Path(folder).iterdir():
            os.replace(path, out / path.name)
    for name in earlier - set(record["files"]) - {RECORD}:
        (out / name).unlink(missing_ok=True)
        say(f"{name} of the earlier export is deleted")
    say(f"{out} holds {', '.join([*record['files'], RECORD])}")
    return record


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _own_files(out: Path) -> set[str]:
    """Names of the files in a folder that an earlier export wrote and that nobody has changed."""
    try:
        record = json.loads((out / RECORD).read_text())
        files = {name: facts["sha256"] for name, facts in record["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()
    known = {CARD, *(form.file for form in FORMATS.values())}  # the record may be a stranger's
    there = {name for name in known & files.keys() if (out / name).is_file()}
    return {name for name in there if file_sha256(out / name) == files[name]} | {RECORD}


def _check_place(out: Path, names: Sequence[str], own: set[str]) -> None:
    """Refuse a folder that cannot be written, and files that are not an earlier export's."""
    above = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not above.is_dir():
        raise InputError(f"cannot write to {out}: {above} is a file; name a folder by --out")
    if not os.access(above, os.W_OK):
        raise InputError(f"cannot write to {out}: {above} may not be written; name another folder by --out")
    for name in names:
        if (out / name).exists() and name not in own:
            raise InputError(
                f"{out / name} is in the way: no export wrote it, or it was changed since; move it elsewhere, or name "
                "another folder by --out"
            )


def _splits(student: Student, request: Request) -> Any:
    """The images, if any are needed."""
    calibrates = "int8" in request.formats
    if not (request.score or calibrates):
        return None
    try:
        return load_splits(student.cfg)
    except InputError as error:
        what = "calibrated (int8)" if calibrates else "scored"
        leave = "leave out --int8 and give --no-score" if calibrates else "give --no-score"
        raise InputError(
            f"the files cannot be {what} without the run's images: {error}. Name the images' folder by DATASET.ROOT "
            f"FOLDER, or {leave}"
        ) from None


def _loader(student: Student, split: Split) -> Loader:
    """The images of a split as a test shows them."""
    dataset, keys = student.dataset, student.cfg.DATASET
    images = BatchedImages(split, {"image": ("test", dataset.views.get("test", ()))}, *student.normalisation)
    return Loader(images, keys.TEST.BATCH_SIZE, num_workers=keys.NUM_WORKERS if dataset.in_files else 0)


def _score(student: Student, runner: Runner, split: Split) -> dict[str, float]:
    score = task_of(student.cfg).evaluate(runner, _loader(student, split), Precision(torch.device("cpu")))
    return {**score.values, "images": score.count}


def _calibration(student: Student, split: Split, takes_bytes: bool) -> Tensor:
    """Some training images ``(N, 3, H, W)``, drawn by the run's seed, as the file takes them."""
    chosen = draws.permutation(len(split), student.cfg.EXPERIMENT.SEED, len("calibration"))[:CALIBRATION]
    images = torch.cat([batch["image"] for batch in _loader(student, split.take(chosen))])
    return Runner(lambda image: image, student, takes_bytes)(images)


def _compared(student: Student, form: Format, runner: Runner) -> dict[str, float]:
    """The largest difference of a file's logits from the network's, relative to the largest of these.

    Raises:
        RunError: it is more than a rounding.
    """
    network, worst = student.deployable(), 0.0
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in student.normalisation)
    for size in CHECKED:
        shape, generator = (size, 3, student.side, student.side), torch.Generator().manual_seed(size)
        image = (torch.randint(0, 256, shape, generator=generator) / 255 - mean) / std
        with torch.no_grad():
            wanted, found = network(image), runner(image)
        if found.shape != wanted.shape:
            raise RunError(
                f"{form.file} gives {tuple(found.shape)} for {size} images, the network {tuple(wanted.shape)}"
            )
        worst = max(worst, ((found - wanted).abs().max() / wanted.abs().max()).item())
    if not worst <= (TOLERANCE if form.is_exact else float("inf")):
        raise RunError(
            f"{form.file} is not the network: its logits differ by {worst:.1e} of the largest, more than {TOLERANCE}; "
            "nothing is written"
        )
    return {"difference": worst}


def _line(student: Student, facts: dict[str, Any]) -> str:
    """A file's facts for the console."""
    parts = [f"{facts['bytes'] / 1e6:.2f} MB", f"largest difference from the network {facts['difference']:.1e}"]
    if "test" in facts:
        values = {name: value for name, value in facts["test"].items() if name != "images"}
        parts.append(f"{task_of(student.cfg).line(values)} on {facts['test']['images']} test images")
    return ", ".join(parts)


def _warn_of_losses(student: Student, files: dict[str, dict[str, Any]]) -> None:
    """Name the files that are worse than the run's student, int8 for example."""
    headline = task_of(student.cfg).headline
    recorded = student.recorded.get(headline.name) if student.recorded.get("split") == "test" else None
    for name, facts in files.items():
        if recorded is not None and "test" in facts and headline.gain(recorded, facts["test"][headline.name]) > LOSS:
            change = headline.difference(facts["test"][headline.name] - recorded)
            warn(f"{name}: {headline.label} {change} from the run's {headline.with_unit(recorded)}")


def _record(student: Student, request: Request, files: dict[str, Any]) -> dict[str, Any]:
    return {
        **{key: json.loads(value) if key in ("classes", "input_size", "mean", "std") else value
           for key, value in student.metadata().items()},
        "normalize_inside": request.normalize_inside,
        "network_input": student.own_images,
        "run": str(student.folder),
        "weights_file": {"name": student.file.name, "sha256": file_sha256(student.file)},
        "recorded": student.recorded,
        "versions": versions(request.formats),
        "files": files,
    }  # fmt: skip


def versions(formats: Sequence[str]) -> dict[str, str]:
    """Of the libraries that the files were made with."""
    found = {}
    for name in dict.fromkeys(["torch", "torchvision", "timm", *(p for f in formats for p in FORMATS[f].packages)]):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
