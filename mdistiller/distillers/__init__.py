"""The methods. One file each; the import is what registers it."""

from mdistiller.registry import distiller_dict

from ._base import Distiller, Vanilla, register_distiller
from .CRD import CRD
from .CTKD import CTKD
from .DCD import DCD
from .DIST import DIST, DISTPlus
from .DKD import DKD
from .KD import KD, KDTwoViews
from .MDR import MDR
from .MLKD import MLKD
from .OFD import OFD
from .ReviewKD import ReviewKD
from .VRM import VRM

__all__ = [
    "CRD",
    "CTKD",
    "DCD",
    "DIST",
    "DKD",
    "KD",
    "MDR",
    "MLKD",
    "OFD",
    "VRM",
    "DISTPlus",
    "Distiller",
    "KDTwoViews",
    "ReviewKD",
    "Vanilla",
    "distiller_dict",
    "register_distiller",
]
