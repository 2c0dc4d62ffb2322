"""The methods. One file each; the import is what registers it."""

from mdistiller.registry import distiller_dict

from ._base import Distiller, Vanilla, register_distiller
from .AT import AT
from .CC import CC
from .CRD import CRD
from .CTKD import CTKD
from .DCD import DCD
from .DIST import DIST, DISTPlus
from .DKD import DKD
from .EGA import EGA
from .FitNet import FitNet
from .ICKD import ICKD
from .ITRD import ITRD
from .KD import KD, KDTwoViews
from .KDSVD import KDSVD
from .MDR import MDR
from .MGD import MGD
from .MLKD import MLKD
from .NKD import NKD
from .NST import NST
from .OFD import OFD
from .PEFD import PEFD
from .PKT import PKT
from .ReviewKD import ReviewKD
from .RKD import RKD
from .SP import SP
from .SRRL import SRRL
from .TTM import TTM, WTTM
from .VID import VID
from .VRM import VRM, VRMOneView
from .WSLD import WSLD

__all__ = [
    "AT",
    "CC",
    "CRD",
    "CTKD",
    "DCD",
    "DIST",
    "DKD",
    "EGA",
    "ICKD",
    "ITRD",
    "KD",
    "KDSVD",
    "MDR",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PEFD",
    "PKT",
    "RKD",
    "SP",
    "SRRL",
    "TTM",
    "VID",
    "VRM",
    "WSLD",
    "WTTM",
    "DISTPlus",
    "Distiller",
    "FitNet",
    "KDTwoViews",
    "ReviewKD",
    "VRMOneView",
    "Vanilla",
    "distiller_dict",
    "register_distiller",
]
