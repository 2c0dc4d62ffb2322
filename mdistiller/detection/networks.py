"""torchvision's Faster R-CNN with a feature pyramid, from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, mobilenet_v2, resnet
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from mdistiller.engine.config.node import read_yaml
from mdistiller.engine.folder.checkpoint import check_weights, load_weights
from mdistiller.registry import InputError

NORMS = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d}
BLOCKS = {
    18: (resnet.BasicBlock, [2, 2, 2, 2]),
    34: (resnet.BasicBlock, [3, 4, 6, 3]),
    50: (resnet.Bottleneck, [3, 4, 6, 3]),
    101: (resnet.Bottleneck, [3, 4, 23, 3]),
    152: (resnet.Bottleneck, [3, 8, 36, 3]),
}
TORCHVISION = "torchvision://"
COCO_DETECTOR = f"{TORCHVISION}fasterrcnn_resnet50_fpn"
COCO_IDS = [id for id in range(1, 91) if id not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]  # of the 80 classes
INPUT_KEYS = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD")


class ScaledResNet(resnet.ResNet):
    """torchvision's ResNet with another width. With a stem of 64 channels, the network is torchvision's own.

    Args:
        depth: a key of :data:`BLOCKS`.
        width: channels of the stem.
        norm: class of the normalisations.
    """

    def __init__(self, depth: int, width: int, norm: type[nn.Module]) -> None:
        self.width = width
        super().__init__(*BLOCKS[depth], norm_layer=norm)
        if width != 64:
            self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // 64, *args, **kwargs)


class Transform(GeneralizedRCNNTransform):
    """torchvision's transform with detectron2's settings: order of channels, and sizes of their own for tests.

    Pictures are red first, floats 0 to 1. Channels are swapped before the mean is subtracted.
    """

    def __init__(self, cfg: Any) -> None:
        given, mean, std = cfg.INPUT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        self.sizes = {
            True: (given.MIN_SIZE_TRAIN, given.MAX_SIZE_TRAIN),
            False: ([given.MIN_SIZE_TEST], given.MAX_SIZE_TEST),
        }
        super().__init__(*self.sizes[True], [m / 255 for m in mean], [s / 255 for s in std])
        self.blue_first = given.FORMAT == "BGR"

    def train(self, mode: bool = True) -> Transform:
        self.min_size, self.max_size = self.sizes[mode]
        return super().train(mode)

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.flip(0) if self.blue_first else image)


def build_backbone(cfg: Any) -> BackboneWithFPN:
    """Stages of stride 4 to 32 and a pyramid of five levels; the first ``FREEZE_AT`` stages are frozen."""
    width, frozen = cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.BACKBONE.FREEZE_AT
    norm = NORMS[cfg.MODEL.RESNETS.NORM]
    if cfg.MODEL.BACKBONE.NAME == "build_mobilenetv2_fpn_backbone":
        body = mobilenet_v2(norm_layer=norm).features
        last, channels = ("3", "6", "13", "17"), [24, 32, 96, 320]  # the last blocks of stride 4, 8, 16, 32
        stages = [range(start, stop) for start, stop in ((0, 2), (2, 4), (4, 7), (7, 14), (14, 18))]
        parts = [[body[place] for place in stage] for stage in stages]
    else:
        own = cfg.MODEL.RESNETS
        body = ScaledResNet(own.DEPTH, own.STEM_OUT_CHANNELS, norm)
        last = ("layer1", "layer2", "layer3", "layer4")
        channels = [own.RES2_OUT_CHANNELS * 2**stage for stage in range(4)]
        parts = [[body.conv1, body.bn1], *([getattr(body, name)] for name in last)]
    for module in (module for stage in parts[:frozen] for module in stage):
        module.requires_grad_(False)
    return BackboneWithFPN(body, {name: str(level) for level, name in enumerate(last)}, channels, width)


def build_detector(cfg: Any) -> FasterRCNN:
    """A detector with fresh weights. Its state dict is that of torchvision's class."""
    model, rpn, heads, box_head = cfg.MODEL, cfg.MODEL.RPN, cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    backbone = build_backbone(cfg)
    sizes, ratios = model.ANCHOR_GENERATOR.SIZES, model.ANCHOR_GENERATOR.ASPECT_RATIOS
    ratios = list(ratios) * (len(sizes) if len(ratios) == 1 else 1)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], box_head.POOLER_RESOLUTION, box_head.POOLER_SAMPLING_RATIO)
    head = TwoMLPHead(model.FPN.OUT_CHANNELS * box_head.POOLER_RESOLUTION**2, box_head.FC_DIM)
    detector = FasterRCNN(
        backbone,
        box_predictor=FastRCNNPredictor(box_head.FC_DIM, heads.NUM_CLASSES + 1),
        rpn_anchor_generator=AnchorGenerator(tuple(map(tuple, sizes)), tuple(map(tuple, ratios))),
        rpn_pre_nms_top_n_train=rpn.PRE_NMS_TOPK_TRAIN,
        rpn_pre_nms_top_n_test=rpn.PRE_NMS_TOPK_TEST,
        rpn_post_nms_top_n_train=rpn.POST_NMS_TOPK_TRAIN,
        rpn_post_nms_top_n_test=rpn.POST_NMS_TOPK_TEST,
        rpn_nms_thresh=rpn.NMS_THRESH,
        rpn_fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
        rpn_bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
        rpn_batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
        rpn_positive_fraction=rpn.POSITIVE_FRACTION,
        box_roi_pool=pool,
        box_head=head,
        box_score_thresh=heads.SCORE_THRESH_TEST,
        box_nms_thresh=heads.NMS_THRESH_TEST,
        box_detections_per_img=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_fg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_bg_iou_thresh=heads.IOU_THRESHOLDS[0],
        box_batch_size_per_image=heads.BATCH_SIZE_PER_IMAGE,
        box_positive_fraction=heads.POSITIVE_FRACTION,
        bbox_reg_weights=tuple(box_head.BBOX_REG_WEIGHTS),
    )
    detector.transform = Transform(cfg)
    return detector


def load_detector(detector: FasterRCNN, path: Path, cfg: Any, role: str) -> None:
    """Load a file of this engine into a detector, all or nothing.

    Raises:
        CheckpointError: the file cannot be read or does not fit.
        InputError: its run saw pictures with other statistics or another order of channels.
    """
    state = load_weights(path)
    check_weights(detector.state_dict(), state, f"checkpoint {path} for the {role}")
    own = path.parent / "config.yaml"
    before = read_yaml(own) if own.is_file() else None
    for key in INPUT_KEYS if isinstance(before, dict) else ():
        section, name = key.split(".")
        given = (before.get(section) or {}).get(name, cfg[section][name])
        if given != cfg[section][name]:
            raise InputError(
                f"{path} was trained with {key} {given} (its config.yaml), and the {role}'s configuration has "
                f"{cfg[section][name]}; give the same"
            )
    detector.load_state_dict(state)


def load_public(detector: FasterRCNN, name: str, cfg: Any) -> None:
    """torchvision's Faster R-CNN for COCO. Of its 91 outputs, numbered by category, the 80 that exist are taken.

    Raises:
        InputError: another name; a configuration of another network, or with another input.
    """
    model = cfg.MODEL
    wanted = {
        "MODEL.RESNETS.DEPTH": (model.RESNETS.DEPTH, 50),
        "MODEL.ROI_HEADS.NUM_CLASSES": (model.ROI_HEADS.NUM_CLASSES, len(COCO_IDS)),
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": (model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO, 2),
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
    }
    if name != COCO_DETECTOR:
        raise InputError(f"no detector {name}; torchvision's is {COCO_DETECTOR}")
    for key, (given, own) in wanted.items():
        if given != own:
            raise InputError(
                f"{name} needs {key} {own}, got {given}; take detection/configs/teachers/R50-torchvision.yaml"
            )
    state = dict(_of_torchvision(name, "COCO_V1"))
    rows = torch.tensor([0, *COCO_IDS])
    for part in ("weight", "bias"):
        scores, boxes = (f"roi_heads.box_predictor.{layer}.{part}" for layer in ("cls_score", "bbox_pred"))
        state[scores] = state[scores][rows]
        state[boxes] = state[boxes].unflatten(0, (-1, 4))[rows].flatten(0, 1)
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    check_weights(detector.state_dict(), state, name)
    detector.load_state_dict(state)
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0  # as torchvision sets it for these weights


def load_start(detector: FasterRCNN, cfg: Any) -> None:
    """The first weights: ``MODEL.WEIGHTS``.

    A file holds a detector of this engine, or a classifier whose layers are the backbone's, such as ``student_last`` of
    a distilled ResNet-18. A classifier gives the backbone only.

    Raises:
        InputError: weights of another library; a classifier's weights where the first channel is not red.
    """
    name = cfg.MODEL.WEIGHTS
    if not name:
        return
    if "://" not in name:
        state = load_weights(Path(name))
        if any(key.startswith("backbone.") for key in state):
            load_detector(detector, Path(name), cfg, "student")
            return
    elif name.startswith(TORCHVISION):
        _check_order(name, cfg)  # before anything is fetched
        state = _of_torchvision(name)
    else:
        raise InputError(
            f"MODEL.WEIGHTS {name} is for --engine detectron2; the torchvision engine takes a file of its own, "
            f"{TORCHVISION}resnet18 and the like, or nothing"
        )
    _check_order(name, cfg)
    body = detector.backbone.body
    state = {key.removeprefix("features."): value for key, value in state.items()}
    own = {key: value for key, value in body.state_dict().items() if not key.endswith("num_batches_tracked")}
    check_weights(own, {key: value for key, value in state.items() if key in own}, f"MODEL.WEIGHTS {name}")
    body.load_state_dict(state, strict=False)


def _check_order(name: str, cfg: Any) -> None:
    if cfg.INPUT.FORMAT != "RGB":
        raise InputError(
            f"MODEL.WEIGHTS {name} was trained on pictures whose first channel is red, and INPUT.FORMAT is "
            f"{cfg.INPUT.FORMAT}; set INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [123.675,116.28,103.53] and MODEL.PIXEL_STD "
            "[58.395,57.12,57.375]"
        )


def _of_torchvision(name: str, version: str = "IMAGENET1K_V1") -> dict[str, Tensor]:
    """Public weights, from torchvision's cache or its server; by default ImageNet's of a classifier."""
    architecture = name.removeprefix(TORCHVISION)
    try:
        weights = get_model_weights(architecture)[version]
    except (ValueError, KeyError):
        raise InputError(f"MODEL.WEIGHTS {name}: torchvision has no weights {version} of {architecture!r}") from None
    try:
        return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"weights {name} cannot be fetched: {error}; download {weights.url} to {torch.hub.get_dir()}/checkpoints"
        ) from None
