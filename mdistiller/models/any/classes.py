"""The classes of a teacher that was trained on other data: which of its outputs stand for which class.

A file has a line for each class of the data set, in the order of the classes. The line names the teacher's outputs for
that class, separated by ``|``: a number from 0, a class's name, or a WordNet id (``n01443537``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError, suggestion

from .._features import Features

IMAGENET = 1000  # outputs of a network for which torchvision knows the names
MOST_LISTED = 10  # problems in a message


class ListedOutputs(nn.Module):
    """Logits of other classes ``(B, M)`` to those of the data set ``(B, K)``; without entries in the state dict.

    A class with one output keeps its logit. A class with several has the logarithm of their summed exponentials, so
    that the class has their summed probability.

    Args:
        outputs: for each class, the numbers of its outputs.
    """

    def __init__(self, outputs: Sequence[Sequence[int]]) -> None:
        super().__init__()
        most = max(map(len, outputs))
        padded = [[*each, *each[:1] * (most - len(each))] for each in outputs]
        self.register_buffer("index", torch.tensor(padded), persistent=False)
        beyond = torch.arange(most) >= torch.tensor([len(each) for each in outputs])[:, None]
        self.register_buffer("beyond", beyond, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        found = logits[:, self.index]
        return found[..., 0] if self.index.shape[1] == 1 else found.masked_fill(self.beyond, -torch.inf).logsumexp(2)


class OfClasses:
    """Base class in front of a network's class: its logits are those of the data set's classes."""

    _outputs: ListedOutputs

    def forward(self, image: Tensor) -> tuple[Tensor, Features]:
        logits, features = super().forward(image)
        return self._outputs(logits), features


def read_outputs(
    path: Path, classes: Sequence[str], outputs: int, names: Mapping[str, Sequence[int]]
) -> list[list[int]]:
    """The outputs for each class by a file, see the top of this module.

    Args:
        path: of the file.
        classes: names of the data set's classes, for messages.
        outputs: M, the teacher's number of outputs.
        names: outputs by name, see :func:`output_names`.

    Raises:
        InputError: no such file; another number of lines; all lines that name no output, or one output twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"DISTILLER.TEACHER_CLASSES {path} cannot be read: {error}") from None
    if len(lines) != len(classes):
        raise InputError(
            f"DISTILLER.TEACHER_CLASSES {path} has {len(lines)} lines, and the data set has {len(classes)} classes; "
            "line i must name the teacher's outputs for the i-th class"
        )
    found: list[list[int]] = []
    used: dict[int, int] = {}
    problems = []
    for number, (line, name) in enumerate(zip(lines, classes, strict=True), 1):
        found.append([])
        for word in map(str.strip, line.split("|")):
            known = [int(word)] if word.isdecimal() and int(word) < outputs else names.get(_plain(word), ())
            if len(known) != 1:
                what = f"stands for the outputs {', '.join(map(str, known))}: write the number" if known else ""
                what = what or (f"the numbers are 0 to {outputs - 1}" if word.isdecimal() else _closest(word, names))
            elif known[0] in used:
                what = f"output {known[0]} is that of line {used[known[0]]} already"
            else:
                used[known[0]] = number
                found[-1].append(known[0])
                continue
            problems.append(f"line {number} ({name}): {word!r}: {what}")
    if problems:
        more = [f"... and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
        raise InputError(
            "\n  ".join([f"DISTILLER.TEACHER_CLASSES {path}: what is no output:", *problems[:MOST_LISTED], *more])
        )
    return found


def output_names(outputs: int, own: Sequence[str] = ()) -> dict[str, list[int]]:
    """Outputs by the names of their classes, in lower case.

    Args:
        outputs: M.
        own: the names of the classes that the teacher was trained on, where they are known. Otherwise the names are
            those of ImageNet's classes, if a set of ImageNet's classes has M of them: timm knows WordNet ids and all
            synonyms, torchvision one name for each of 1,000 classes.
    """
    labels: list[Sequence[str]] = [own] if len(own) == outputs else _imagenet(outputs)
    names: dict[str, list[int]] = {}
    for column in labels:
        for number, label in enumerate(column):
            for name in {_plain(label), *map(_plain, label.split(","))}:
                if number not in names.setdefault(name, []):
                    names[name].append(number)
    return names


def _imagenet(outputs: int) -> list[Sequence[str]]:
    labels: list[Sequence[str]] = []
    if outputs == IMAGENET:
        from torchvision.models import ResNet18_Weights

        labels.append(ResNet18_Weights.DEFAULT.meta["categories"])
    try:
        from timm.data import ImageNetInfo, infer_imagenet_subset
    except ImportError:
        return labels
    subset = infer_imagenet_subset({"num_classes": outputs})
    if subset:
        info = ImageNetInfo(subset)
        labels += [info.label_names(), info.label_descriptions()]
    return labels


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())


def _closest(word: str, names: Mapping[str, Sequence[int]]) -> str:
    if not word:
        return "no output is named"
    return f"no class has this name; {suggestion(_plain(word), names)}" if names else "its classes' names are not known"
