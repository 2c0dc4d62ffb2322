"""Configuration, construction, training, evaluation."""

from .dot import DOT
from .trainer import BaseTrainer, trainer_dict

__all__ = ["DOT", "BaseTrainer", "trainer_dict"]
