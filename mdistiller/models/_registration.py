"""How a network enters the tables, and where the file of a trained teacher lies.

``cifar_model_dict`` and ``tiny_imagenet_model_dict`` hold ``(constructor, checkpoint path or None)``,
``imagenet_model_dict`` the constructor alone: mdistiller's kinds, which its users' files unpack.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from mdistiller.registry import MODEL_FAMILIES

Constructor = TypeVar("Constructor", bound=Callable)

# Folder under download_ckpts/ by family. ImageNet teachers come from torchvision.
_TEACHER_FOLDERS = {"cifar": "cifar_teachers", "tiny_imagenet": "tiny_imagenet_teachers"}


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
