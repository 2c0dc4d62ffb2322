"""How a network enters the tables, and where the file of a public teacher lies and comes from.

``cifar_model_dict`` and ``tiny_imagenet_model_dict`` hold ``(constructor, checkpoint path or None)``,
``imagenet_model_dict`` the constructor alone: mdistiller's kinds, which its users' files unpack.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from mdistiller.registry import MODEL_FAMILIES, Registry

Constructor = TypeVar("Constructor", bound=Callable)

TEACHER_RELEASE = "https://github.com/megvii-research/mdistiller/releases/tag/checkpoints"


class PublicTeachers(NamedTuple):
    """A folder under ``download_ckpts/`` and the tar that it comes from.

    Attributes:
        family: key of ``MODEL_FAMILIES``, whose table names the files.
        num_classes: number of classes that the teachers were trained on.
        megabytes: size of the tar; 0: ``TEACHER_RELEASE`` is not known to hold one.
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
    """A public teacher's path from its collection's folder on, as ``"cifar_teachers/..."``; empty for other files."""
    parts = Path(checkpoint or "").parts
    start = max((place for place, part in enumerate(parts) if part in COLLECTIONS), default=len(parts))
    return "/".join(parts[start:])


def checkpoint_root() -> Path:
    """The checkout that holds the package, or the current directory where the package is installed."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "setup.py").is_file() else Path.cwd()


def register_model(family: str, name: str, checkpoint: str | None = None) -> Callable[[Constructor], Constructor]:
    """Decorator that enters a constructor into the table of ``family``.

    Args:
        family: a key of ``MODEL_FAMILIES``.
        name: the key in the table, which configurations say.
        checkpoint: where a trained teacher lies, relative to the family's folder under ``download_ckpts/``.
    """
    table = MODEL_FAMILIES[family]

    def register(constructor: Constructor) -> Constructor:
        if family == "imagenet":
            assert checkpoint is None, "ImageNet teachers come from torchvision, by pretrained=True"
            table.add(name, constructor)
        else:
            folder = checkpoint_root() / "download_ckpts" / _TEACHER_FOLDERS[family]
            table.add(name, (constructor, str(folder / checkpoint) if checkpoint else None))
        return constructor

    return register
