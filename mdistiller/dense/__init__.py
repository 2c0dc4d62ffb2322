"""Methods for detectors: each compares a student's record of a step with its teacher's, see :mod:`.record`.

The names are those of the methods for classification. ``dense_dict`` is the table.
"""

from . import CWD, DIST, DKD, FGFI, FKD, KD, MIMIC, PKD, VRM, ReviewKD  # noqa: F401  enters them into dense_dict
from ._base import DenseMethod, dense_dict, register_dense
from .record import DetectorFacts, Record

__all__ = ["DenseMethod", "DetectorFacts", "Record", "dense_dict", "register_dense"]
