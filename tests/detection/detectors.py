"""Detectors for tests: those of the miniature, of an eighth of the width."""

import torch

from mdistiller.detection import cfg as config
from mdistiller.detection.networks import build_detector

TINY = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.DEVICE", "cpu"),
]


def tiny_config(name="KD", *options):
    return config.load(f"configs/minicoco/{name}.yaml", [*TINY, *options])


def tiny_detector(*options, seed=0):
    torch.manual_seed(seed)
    return build_detector(tiny_config("KD", *options))


def pictures(seed=0):
    """Two pictures of other sizes, the second without objects."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 64), (48, 64))]
    boxes, none = torch.tensor([[5.0, 5, 30, 30], [30, 30, 50, 60]]), torch.zeros(0, 4)
    labels = torch.tensor([1, 4]), torch.zeros(0, dtype=torch.long)
    return images, [{"boxes": b, "labels": n} for b, n in zip((boxes, none), labels, strict=True)]
