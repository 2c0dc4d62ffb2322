"""The methods. One file each; the import is what registers it."""

from mdistiller.registry import distiller_dict

from ._base import Distiller, Vanilla, register_distiller
from .AB import AB
from .AT import AT
from .CATKD import CATKD
from .CC import CC
from .CRCD import CRCD
from .CRD import CRD
from .CRLD import CRLD
from .CTKD import CTKD
from .DCD import DCD
from .DIST import DIST, DISTPlus
from .DistPro import DistPro
from .DKD import DKD
from .DML import DML
from .EGA import EGA
from .FCFD import FCFD
from .FitNet import FitNet
from .FSP import FSP
from .FT import FT
from .HSAKD import HSAKD
from .ICKD import ICKD
from .ITRD import ITRD
from .KD import KD, KDTwoViews
from .KDSVD import KDSVD
from .LG import LG
from .MDR import MDR
from .MGD import MGD
from .MLKD import MLKD
from .NKD import NKD
from .NORM import NORM, NORMCRD
from .NST import NST
from .OFD import OFD
from .PEFD import PEFD
from .PKT import PKT
from .ReviewKD import ReviewKD
from .RKD import RKD
from .RRD import RRD, RRDMomentum
from .SDD import SDDDKD, SDDKD, SDDNKD
from .SemCKD import SemCKD
from .SimKD import SimKD
from .SP import SP
from .SRRL import SRRL
from .SSKD import SSKD
from .TAKD import TAKD
from .TaT import TaT
from .TTM import TTM, WTTM
from .VID import VID
from .VRM import VRM, VRMOneView
from .WSLD import WSLD

__all__ = [
    "AB",
    "AT",
    "CATKD",
    "CC",
    "CRCD",
    "CRD",
    "CRLD",
    "CTKD",
    "DCD",
    "DIST",
    "DKD",
    "DML",
    "EGA",
    "FCFD",
    "FSP",
    "FT",
    "HSAKD",
    "ICKD",
    "ITRD",
    "KD",
    "KDSVD",
    "LG",
    "MDR",
    "MGD",
    "MLKD",
    "NKD",
    "NORM",
    "NORMCRD",
    "NST",
    "OFD",
    "PEFD",
    "PKT",
    "RKD",
    "RRD",
    "SDDDKD",
    "SDDKD",
    "SDDNKD",
    "SP",
    "SRRL",
    "SSKD",
    "TAKD",
    "TTM",
    "VID",
    "VRM",
    "WSLD",
    "WTTM",
    "DISTPlus",
    "DistPro",
    "Distiller",
    "FitNet",
    "KDTwoViews",
    "RRDMomentum",
    "ReviewKD",
    "SemCKD",
    "SimKD",
    "TaT",
    "VRMOneView",
    "Vanilla",
    "distiller_dict",
    "register_distiller",
]
