"""The model card: what the student is, how good it is, and how to use it, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mdistiller.contract import contract_of
from mdistiller.engine.task import task_of
from mdistiller.models.any import is_foreign
from mdistiller.registry import distiller_dict

from .student import Student

MANY_CLASSES = 100  # more are not listed
PRETRAINED = "pretrained"
USE = """## Use

```python
import json

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("student.onnx")
facts = session.get_modelmeta().custom_metadata_map
image = np.zeros((1, 3, {side}, {side}), np.{kind})  # {content}
(logits,) = session.run(["logits"], {{"image": image}})
print(json.loads(facts["classes"])[logits[0].argmax()])
```
"""


def card_of(student: Student, record: Mapping[str, Any]) -> str:
    """The card of an export; ``record`` is ``export.json``."""
    cfg, name = student.cfg, student.cfg.DISTILLER.STUDENT
    sections = [
        f"# {name} on {cfg.DATASET.TYPE}",
        _summary(student),
        "## Files\n\n" + _files(student, record),
        "## Accuracy in the run\n\n" + _accuracies(student),
        "## Input\n\n" + _input(student, record),
        "## Classes\n\n" + _classes(student),
        USE.format(
            side=student.side,
            kind="uint8" if record["normalize_inside"] else "float32",
            content="RGB, 0 to 255" if record["normalize_inside"] else "RGB, (value / 255 - mean) / std",
        ).strip()
        if "student.onnx" in record["files"]
        else "",
        "## Training\n\n" + _training(student, record),
        "## Licence\n\n" + _licence(student),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _summary(student: Student) -> str:
    cfg = student.cfg
    parameters = sum(p.numel() for p in student.network.parameters())
    text = (
        f"A classifier of {len(student.dataset.classes)} classes: {cfg.DISTILLER.STUDENT}, {parameters:,} parameters, "
    )
    if not contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher:
        return text + f"trained on data set {cfg.DATASET.TYPE} by method {cfg.DISTILLER.TYPE}, without a teacher."
    return (
        text + f"distilled from {cfg.DISTILLER.TEACHER} on data set {cfg.DATASET.TYPE} by method {cfg.DISTILLER.TYPE}."
    )


def _table(*rows: tuple[Any, ...]) -> str:
    head, *rest = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def _files(student: Student, record: Mapping[str, Any]) -> str:
    task = task_of(student.cfg)
    measures = [measure for measure in task.measures if measure.unit] or list(task.measures[:1])
    rows = [("file", "content", "MB", *(f"{measure.title}, as exported" for measure in measures), "largest difference")]
    for name, facts in record["files"].items():
        test = facts.get("test")
        scores = [measure.text(test[measure.name]) if test else "not measured" for measure in measures]
        rows.append((f"`{name}`", facts["about"], f"{facts['bytes'] / 1e6:.2f}", *scores, f"{facts['difference']:.0e}"))
    count = next((facts["test"]["images"] for facts in record["files"].values() if "test" in facts), None)
    measured = f"Each file was run on the {count:,} test images." if count else "No file was run on test images."
    return (
        f"{_table(*rows)}\n\n{measured} The largest difference is between the logits of the file and of the network, "
        "on random images, relative to the largest logit."
    )


def _accuracies(student: Student) -> str:
    """What ``results.json`` has."""
    task, results = task_of(student.cfg), student.results
    measures = [measure for measure in task.measures if measure.unit] or list(task.measures[:1])
    rows = [("weights", "epoch", "split", *(measure.title for measure in measures))]
    for key, title in (("last", "last"), ("best", "best"), ("ema", "average")):
        if key in results:
            part = results[key]
            mark = " (these)" if part is student.recorded else ""
            scores = [measure.text(part[measure.name]) if measure.name in part else "-" for measure in measures]
            rows.append((title + mark, part.get("epoch", "-"), part.get("split", "-"), *scores))
    if len(rows) == 1:
        return "`results.json` has none."
    picked = results.get("best", {}).get("picked_on", results.get("best", {}).get("split"))
    chosen = f"\n\n*Best* is the epoch with the highest score on the {picked} images." if picked else ""
    honest = " So the score of *best* is too high by that choice; *last* is the honest one." if picked == "test" else ""
    return _table(*rows) + chosen + honest


def _input(student: Student, record: Mapping[str, Any]) -> str:
    side, (mean, std) = student.side, map(_numbers, student.normalisation)
    facts = f"mean {mean}, standard deviation {std}"
    text = f"RGB images `(batch, 3, {side}, {side})`"
    if record["normalize_inside"]:
        text += f", uint8 from 0 to 255. The files normalise them ({facts}, where white is 1)."
        if "student.safetensors" in record["files"]:
            text += " The weights in `student.safetensors` do not: they take float32 images, normalised so."
    else:
        text += f", float32, normalised: `(value / 255 - mean) / std` with {facts}."
    if student.input is not None:
        own = student.own_images
        text += (
            f" The network itself takes images of {own['input_size'][1]} pixels with mean {_numbers(own['mean'])} and "
            f"standard deviation {_numbers(own['std'])}: ONNX and `torch.export` files transform them, the weights in "
            "`student.safetensors` do not."
        )
    return text + " The output `logits` is `(batch, classes)`; a softmax gives probabilities."


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _classes(student: Student) -> str:
    names = list(student.dataset.classes)
    if len(names) > MANY_CLASSES:
        return f"{len(names)} classes, {names[0]} to {names[-1]}; `export.json` and the files list them."
    return "\n".join(f"{number}. {name}" for number, name in enumerate(names))


def _training(student: Student, record: Mapping[str, Any]) -> str:
    cfg, results, environment = student.cfg, student.results, student.environment
    rows: list[tuple[Any, ...]] = [("fact", "value"), ("method", cfg.DISTILLER.TYPE)]
    teacher = results.get("teacher")
    if teacher:
        score = task_of(cfg).line({key: value for key, value in teacher.items() if isinstance(value, float)})
        rows.append(("teacher", f"{teacher['name']}, {score or 'without a score'} ({teacher['checkpoint']})"))
        if teacher.get("sha256"):
            rows.append(("SHA-256 of the teacher's file", f"`{teacher['sha256']}`"))
    rows += [
        ("data set", f"{cfg.DATASET.TYPE}, {results.get('training_images', '?')} training images"),
        ("student's start", cfg.DISTILLER.STUDENT_CKPT or "random weights"),
        ("weights", f"{student.weights} (`{student.file.name}`)"),
        ("epochs", f"{results.get('epochs', '?')} of {cfg.SOLVER.EPOCHS}, run {results.get('status', 'not finished')}"),
        ("seed", cfg.EXPERIMENT.SEED),
        ("SHA-256 of `config.yaml`", f"`{record['config_sha256']}`"),
    ]
    if environment:
        trained = [f"{key} {environment[key]}" for key in ("mdistiller", "torch", "python") if environment.get(key)]
        rows.append(("trained with", ", ".join(trained)))
    rows.append(("exported with", ", ".join(f"{key} {value}" for key, value in record["versions"].items())))
    return _table(*rows)


def _licence(student: Student) -> str:
    """What is known: timm states the licence of its public weights."""
    cfg, known = student.cfg, []
    roles = {"start of the student": ("STUDENT", cfg.DISTILLER.STUDENT_CKPT == PRETRAINED)}
    if student.results.get("teacher"):
        roles["teacher"] = ("TEACHER", cfg.DISTILLER.TEACHER_CKPT == PRETRAINED)
    for title, (role, is_public) in roles.items():
        name = cfg.DISTILLER[role]
        if is_public:
            known.append(f"- {title}: public weights of {name}, licence {_licence_of(name)}")
    lines = ["The licence of the training images is not known here; it may limit the use of the weights."]
    return "\n".join([*known, "", *lines] if known else lines)


def _licence_of(name: str) -> str:
    if is_foreign(name) and name.startswith("timm:"):
        from timm.models import get_pretrained_cfg

        facts = get_pretrained_cfg(name.removeprefix("timm:"))
        if facts is not None and facts.license:
            return f"{facts.license} (as timm states it)"
    return "not stated"
