"""Configuration, construction, training, evaluation."""

from .trainer import BaseTrainer, trainer_dict

__all__ = ["BaseTrainer", "trainer_dict"]
