"""A run's student as files for use: weights, ONNX, ``torch.export``, and a model card.

- ``student.py``: the deployed network of a run's folder
- ``formats.py``: writes and runs each format
- ``card.py``: the model card
- ``export.py``: :func:`export_run`: all of them, each file checked and scored
"""

from .export import Request, export_run

__all__ = ["Request", "export_run"]
