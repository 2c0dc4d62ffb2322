"""The methods. One file each; the import is what registers it."""

from mdistiller.registry import distiller_dict

from ._base import Distiller, Vanilla, register_distiller
from .DCD import DCD
from .DIST import DIST, DISTPlus
from .KD import KD, KDTwoViews
from .MDR import MDR
from .VRM import VRM, VRMOneView

__all__ = [
    "DCD",
    "DIST",
    "KD",
    "MDR",
    "VRM",
    "DISTPlus",
    "Distiller",
    "KDTwoViews",
    "VRMOneView",
    "Vanilla",
    "distiller_dict",
    "register_distiller",
]
