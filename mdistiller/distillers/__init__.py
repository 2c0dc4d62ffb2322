"""The methods. One file each; the import is what registers it."""

from mdistiller.registry import distiller_dict

from ._base import Distiller, Vanilla, register_distiller
from .KD import KD, KDTwoViews
from .MDR import MDR
from .VRM import VRM

__all__ = ["KD", "MDR", "VRM", "Distiller", "KDTwoViews", "Vanilla", "distiller_dict", "register_distiller"]
