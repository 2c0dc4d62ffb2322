"""Registration of networks, and the paths and sources of public teachers.

An entry of a table is a :class:`ModelEntry`. It also works as both kinds of entries in mdistiller: it unpacks as
``(constructor, checkpoint path or None)``, and a call builds the network. Scripts may assign either kind themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import nn

from mdistiller.registry import MODEL_FAMILIES, Registry

Constructor = TypeVar("Constructor", bound=Callable)
PerChannel = tuple[float, float, float]

TEACHER_RELEASE = "https://github.com/megvii-research/mdistiller/releases/tag/checkpoints"


class PublicTeachers(NamedTuple):
    """A folder under ``download_ckpts/`` and the tar that contains it.

    Attributes:
        family: key of ``MODEL_FAMILIES``; that table names the files.
        num_classes: number of classes of the teachers.
        megabytes: size of the tar; 0: ``TEACHER_RELEASE`` has no known tar.
    """

    family: str
    num_classes: int
    megabytes: int


# By name of the folder. ImageNet teachers come from torchvision.
COLLECTIONS = Registry(
    "collection of teachers",
    {
        "cifar_teachers": PublicTeachers("cifar", 100, 364),
        "tiny_imagenet_teachers": PublicTeachers("tiny_imagenet", 200, 0),
    },
)
_TEACHER_FOLDERS = {teachers.family: folder for folder, teachers in COLLECTIONS.items()}


def public_file(checkpoint: str | None) -> str:
    """A public teacher's path from its collection's folder, as ``"cifar_teachers/..."``; empty for other files."""
    parts = Path(checkpoint or "").parts
    start = max((place for place, part in enumerate(parts) if part in COLLECTIONS), default=len(parts))
    return "/".join(parts[start:])


class ModelEntry(tuple):
    """A network of a table: ``(constructor, weights)``, with more facts as attributes.

    Args:
        constructor: ``constructor(num_classes=K)`` builds the network.
        weights: path of a trained teacher's file.
        pretrained: ``constructor(pretrained=True)`` fetches public weights.
        mean: mean of the network's input images, for each channel; ``None``: the data set's.
        std: standard deviation of the network's input images, for each channel; ``None``: the data set's.
    """

    constructor = property(lambda self: self[0])
    weights = property(lambda self: self[1])

    def __new__(
        cls,
        constructor: Callable[..., nn.Module],
        weights: str | None = None,
        pretrained: bool = False,
        mean: PerChannel | None = None,
        std: PerChannel | None = None,
    ) -> ModelEntry:
        entry = update_wrapper(super().__new__(cls, (constructor, weights)), constructor, updated=())
        entry.pretrained, entry.mean, entry.std = pretrained, mean, std
        return entry

    @classmethod
    def of(cls, entry: Any) -> ModelEntry:
        """A table's value as an entry. A script's own value may be a tuple, or a constructor that fetches weights."""
        if isinstance(entry, cls):
            return entry
        return cls(*entry) if isinstance(entry, tuple) else cls(entry, pretrained=True)

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (*self, self.pretrained, self.mean, self.std)

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.constructor(*args, **kwargs)


def checkpoint_root() -> Path:
    """The checkout that holds the package, or the current directory where the package is installed."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "setup.py").is_file() else Path.cwd()


def register_model(
    family: str, name: str, checkpoint: str | None = None, **facts: Any
) -> Callable[[Constructor], Constructor]:
    """Decorator that enters a constructor into the table of ``family``.

    Args:
        family: a key of ``MODEL_FAMILIES``.
        name: the network's name in configurations.
        checkpoint: path of a trained teacher, relative to the family's folder under ``download_ckpts/``.
        facts: further arguments of :class:`ModelEntry`.
    """

    def register(constructor: Constructor) -> Constructor:
        weights = None
        if checkpoint is not None:
            weights = str(checkpoint_root() / "download_ckpts" / _TEACHER_FOLDERS[family] / checkpoint)
        MODEL_FAMILIES[family].add(name, ModelEntry(constructor, weights, **facts))
        return constructor

    return register
