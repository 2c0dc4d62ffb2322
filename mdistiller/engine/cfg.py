"""The configuration: every key, its default and its meaning.

``CFG`` is the tree of defaults (mdistiller's keys and values where it has them). Each method's section comes
from its own file. ``load_config`` makes a checked copy; mdistiller's way, ``CFG.merge_from_file(...)`` on the
global tree, works too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from mdistiller.contract import contract_of
from mdistiller.dataset import dataset_dict
from mdistiller.dataset.build import LOADERS
from mdistiller.dataset.fields import chosen_recipes
from mdistiller.distillers import distiller_dict
from mdistiller.messages import say
from mdistiller.plugins import load_methods, method_file
from mdistiller.registry import InputError, suggestion

from .config.node import ConfigNode as CN
from .forwards.cache import check_cacheable
from .forwards.compile import COMPILE_MODES, COMPILED
from .processes.parallel import BATCH_NORMS
from .solver import LR_RULES
from .trainer import trainer_dict


class ConfigTree(CN):
    """The root: knows the method files that are merged into it and makes room for their settings."""

    def before_merge(self, trees: Sequence[Any]) -> None:
        """Load the method files that ``DISTILLER.PLUGINS`` and ``DISTILLER.TYPE`` ask for.

        Raises:
            InputError: see :func:`mdistiller.plugins.load_methods`.
        """
        asked = dict(self.DISTILLER)
        for tree in trees:
            given = tree.get("DISTILLER") if isinstance(tree, dict) else None
            asked |= given if isinstance(given, dict) else {}
        name, plugins = asked["TYPE"], asked["PLUGINS"]
        plugins = [plugins] if isinstance(plugins, str) else plugins
        if isinstance(name, str) and isinstance(plugins, (list, tuple)):  # or the merge itself will complain
            self.admit_method([str(path) for path in plugins], name)
            if name not in distiller_dict and name not in self and any(name in tree for tree in trees):
                # Before the merge calls its section unknown.
                raise InputError(
                    f"DISTILLER.TYPE: no method named {name!r}; {suggestion(name, distiller_dict)}; a method file "
                    "from elsewhere is named by DISTILLER.PLUGINS"
                )

    def admit_method(self, plugins: Sequence[str], name: str) -> None:
        """Load the method called ``name`` and make room for its settings.

        A method file of another project states no defaults. The sections that it reads and that nobody has
        take any key then, and those of its keys that are missing from sections of ours take any value.
        """
        file = load_methods(plugins, name)
        method = distiller_dict.get(name)
        if method is None:
            return
        _add_section(self, method)
        if file is not None:
            for key in file.reads or [method.section]:
                section, _, rest = key.partition(".")
                if rest and section not in self:
                    self[section] = CN(new_allowed=True)
                self.allow_key(key)


CFG = ConfigTree()

CFG.EXPERIMENT = CN()
CFG.EXPERIMENT.PROJECT = "distill"  # a run's folder is LOG.PREFIX/PROJECT/(NAME or TAG)
CFG.EXPERIMENT.NAME = ""
CFG.EXPERIMENT.TAG = "default"  # comma-separated words; {TAG} in a config stands for those of its bases
CFG.EXPERIMENT.SEED = 0  # weights, order of images, augmentation, splits
CFG.EXPERIMENT.LOGIT_STAND = False  # LSKD: standardise each image's logits before they are compared

CFG.DATASET = CN()
CFG.DATASET.TYPE = "cifar100"
CFG.DATASET.ROOT = "./data"
CFG.DATASET.DOWNLOAD = True  # fetch what is missing, where the data set can be fetched
CFG.DATASET.IMAGE_SIZE = 0  # pixels a side; 0: the data set's own
CFG.DATASET.LOADER = "auto"  # where batches are made: device: where the networks run; workers: on the CPU
CFG.DATASET.NUM_WORKERS = 2  # processes of LOADER workers; LOADER auto: device on a GPU or where this is 0
CFG.DATASET.VIEW_WEAK = "weak"  # recipe of the weak view, image and image_weak: strong, plain (nothing changed), ...
CFG.DATASET.VIEW_STRONG = "strong"  # recipe of the strong view, image_strong; views differ even if recipes do not
CFG.DATASET.STRONG_N = 2  # RandAugment's operations in the strong recipe
CFG.DATASET.TRAIN_FRACTION = 1.0  # share of the training images that is used, the same of each class
CFG.DATASET.TRAIN_PER_CLASS = 0  # or: this many of each class; 0: all
CFG.DATASET.VAL_FRACTION = 0.0  # share of the training images held out to pick the best epoch on
CFG.DATASET.COLOR_JITTER = 0.0  # behind the weak view: brightness, contrast, saturation change by up to this share
CFG.DATASET.RANDAUGMENT = 0  # then: so many operations of RandAugment
CFG.DATASET.RANDOM_ERASING = 0.0  # then: probability of painting a rectangle over with noise
CFG.DATASET.MIXUP_ALPHA = 0.0  # blend images and labels of a batch, shares from Beta(alpha, alpha); 0: not
CFG.DATASET.CUTMIX_ALPHA = 0.0  # paste rectangles; with both, each image is treated by one of them
CFG.DATASET.LABEL_SMOOTHING = 0.0  # share of each label that is spread over all classes
CFG.DATASET.TEST = CN()
CFG.DATASET.TEST.BATCH_SIZE = 64  # of each process, where several train

CFG.DISTILLER = CN()
CFG.DISTILLER.TYPE = "NONE"  # plain training
CFG.DISTILLER.TEACHER = "ResNet50"
CFG.DISTILLER.TEACHER_CKPT = ""  # the teacher's weights; empty: where its public weights are unpacked
CFG.DISTILLER.STUDENT = "resnet32"
CFG.DISTILLER.PLUGINS = []  # method files from elsewhere, as paths; see mdistiller/plugins.py
CFG.DISTILLER.ADD_KD = 0.0  # weight of a KD term beside any method's own; see mdistiller/engine/added_kd.py
CFG.DISTILLER.ADD_KD_TEMPERATURE = 4.0

CFG.SOLVER = CN()
CFG.SOLVER.TRAINER = "base"  # base; dot: two momenta, see mdistiller/engine/dot.py
CFG.SOLVER.DOT = CN()
CFG.SOLVER.DOT.DELTA = 0.075  # dot: by how much the distillation's momentum is above MOMENTUM, and the task's below
CFG.SOLVER.BATCH_SIZE = 64  # of all processes together, where several train; LR belongs to it
CFG.SOLVER.GATHER = False  # several processes: the method sees the batch of all, not only its own images
CFG.SOLVER.BATCH_NORM = "local"  # several processes: statistics of the own images (local) or of all (sync)
CFG.SOLVER.DROP_LAST = False  # leave out the last batch of an epoch where it is smaller
CFG.SOLVER.EPOCHS = 240
CFG.SOLVER.TYPE = "SGD"  # SGD, AdamW, RMSProp
CFG.SOLVER.LR = 0.05
CFG.SOLVER.LR_RULE = "none"  # linear, sqrt: rates grow so with BATCH_SIZE / LR_BATCH_SIZE
CFG.SOLVER.LR_BATCH_SIZE = 64  # the batch size that LR, WARMUP_LR and LR_MIN are meant for; LR_RULE none: any
CFG.SOLVER.MOMENTUM = 0.9  # SGD, RMSProp
CFG.SOLVER.NESTEROV = False  # SGD
CFG.SOLVER.BETAS = (0.9, 0.999)  # AdamW
CFG.SOLVER.ALPHA = 0.99  # RMSProp: decay of the squared gradients
CFG.SOLVER.EPS = 1e-8  # AdamW, RMSProp
CFG.SOLVER.WEIGHT_DECAY = 0.0001
CFG.SOLVER.LR_SCHEDULE = "step"  # step, cosine, exponential
CFG.SOLVER.LR_DECAY_STAGES = [150, 180, 210]  # step: the epochs after which the rate falls
CFG.SOLVER.LR_DECAY_RATE = 0.1  # step: factor at each stage; exponential: factor every LR_DECAY_EPOCHS epochs
CFG.SOLVER.LR_DECAY_EPOCHS = 1.0
CFG.SOLVER.LR_MIN = 0.0  # cosine: rate at the end
CFG.SOLVER.WARMUP_EPOCHS = 0  # linear, step by step, from WARMUP_LR up to LR
CFG.SOLVER.WARMUP_LR = 0.0
CFG.SOLVER.DEVICE = "auto"  # auto: the GPU where there is one; else as torch names it: cpu, cuda, cuda:1
CFG.SOLVER.AMP = "off"  # off: float32; bf16; fp16 (GPU only)
CFG.SOLVER.CHANNELS_LAST = False  # memory layout NHWC: faster convolutions, above all with AMP
CFG.SOLVER.FAST_TEACHER = True  # BatchNorms of the frozen teacher folded into its convolutions; equal but for rounding
CFG.SOLVER.CACHE_TEACHER = False  # its outputs computed once and kept in memory; needs DATASET.VIEW_WEAK plain
CFG.SOLVER.COMPILE = "off"  # torch.compile: off; teacher; all: student and teacher
CFG.SOLVER.COMPILE_MODE = "default"  # default; reduce-overhead: CUDA graphs; max-autotune
CFG.SOLVER.EMA_DECAY = 0.0  # exponential moving average of the student's weights, per step; 0: none

CFG.LOG = CN()
CFG.LOG.PREFIX = "./output"
CFG.LOG.EVAL_FREQ = 1  # evaluate every so many epochs, and after the last
CFG.LOG.MEAN_OF_LAST = 5  # results.json gives the mean accuracy of the last so many evaluations
CFG.LOG.SAVE_CHECKPOINT_FREQ = 40  # keep epoch_N and student_N every so many epochs; 0: never
CFG.LOG.SAVE_EVERY_STEPS = 0  # besides after each epoch, save latest every so many steps; 0: not
CFG.LOG.SAVE_EVERY_MINUTES = 0.0  # or every so many minutes; 0: not
CFG.LOG.TENSORBOARD_FREQ = 500  # besides the values of each epoch, loss and rate every so many steps; 0: never
CFG.LOG.PROGRESS = "auto"  # progress bar; auto: on a terminal only; on; off
CFG.LOG.WANDB = False


def _collect_sections() -> None:
    """One section for each method, and below ``DATASET`` for each data set, that has defaults, as its file states."""
    for dataset in dataset_dict.values():
        section = dataset.name.upper()
        if dataset.defaults and section not in CFG.DATASET:
            CFG.DATASET[section] = CN(copy.deepcopy(dataset.defaults))
    for method in distiller_dict.values():
        _add_section(CFG, method)


def _add_section(cfg: CN, method: type) -> None:
    """Make room for a method's defaults. Methods may share a section; each adds the keys that it alone has."""
    for network in getattr(method, "networks", {}):
        cfg.DISTILLER.setdefault(network.upper(), "")
        cfg.DISTILLER.setdefault(f"{network.upper()}_CKPT", "")
    if method.defaults is None:
        return
    section = cfg.setdefault(method.section, CN())
    for key, value in CN(copy.deepcopy(method.defaults)).items():
        section.setdefault(key, value)


_collect_sections()


@dataclass(frozen=True)
class LogitStand:
    """LSKD's flags: ``--logit-stand``, which this stands for, ``--base-temp`` and ``--kd-weight``.

    Args:
        base_temp: the temperature; ``None``: 2, where the method has one to set.
        kd_weight: what weighs the terms on the logits, or multiplies their weights (DKD).
    """

    base_temp: float | None = None
    kd_weight: float = 9.0

    def options(self, cfg: CN) -> list[Any]:
        """``[KEY, VALUE, ...]`` for the method of ``cfg``.

        Raises:
            InputError: the method does not know them.
        """
        method = distiller_dict[cfg.DISTILLER.TYPE]
        if not hasattr(method, "logit_stand_options"):
            raise InputError(
                f"--logit-stand: {cfg.DISTILLER.TYPE} does not standardise logits; {_standardising_methods()} do"
            )
        return ["EXPERIMENT.LOGIT_STAND", True, *method.logit_stand_options(cfg, self.base_temp, self.kd_weight)]


def _standardising_methods() -> str:
    return ", ".join(sorted(name for name, method in distiller_dict.items() if hasattr(method, "logit_stand_options")))


METHOD_KEYS = ("DISTILLER.TYPE", "DISTILLER.PLUGINS")


def load_config(path: str = "", options: Sequence[str] = (), logit_stand: LogitStand | None = None) -> CN:
    """A checked, frozen configuration: defaults, then the file, then ``KEY VALUE`` options, then LSKD's flags.

    Raises:
        InputError: see :meth:`ConfigNode.merge_from_file` and :func:`check_config`.
    """
    _collect_sections()  # a script may have registered a method since the import
    cfg = CFG.clone()
    cfg.defrost()
    pairs = zip(options[::2], options[1::2], strict=False)
    # First, since the file may hold settings of the method that the options name.
    cfg.merge_from_list([part for pair in pairs if pair[0] in METHOD_KEYS for part in pair])
    if path:
        cfg.merge_from_file(path)
    cfg.merge_from_list(list(options))
    if logit_stand is not None:
        cfg.merge_from_list(logit_stand.options(cfg))
    check_config(cfg)
    cfg.freeze()
    return cfg


def show_cfg(cfg: CN) -> None:
    """Print the sections that this run reads."""
    say(f"CONFIG:\n{relevant_part(cfg).dump()}")


def relevant_part(cfg: CN) -> CN:
    """The configuration without the sections of other methods."""
    part = CN({key: cfg[key] for key in ("EXPERIMENT", "DATASET", "DISTILLER", "SOLVER", "LOG")})
    section = getattr(distiller_dict.get(cfg.DISTILLER.TYPE), "section", cfg.DISTILLER.TYPE)
    if section in cfg:
        part[section] = cfg[section]
    return part


def experiment_name(cfg: CN) -> str:
    """``PROJECT/NAME``, or ``PROJECT/TAG`` where no name is given."""
    return "/".join(filter(None, [cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG]))


OPTIMIZERS = ("SGD", "AdamW", "RMSProp")
SCHEDULES = ("step", "cosine", "exponential")
PRECISIONS = ("off", "bf16", "fp16")


def check_config(cfg: CN) -> None:
    """Refuse values that no run can start with.

    Raises:
        InputError: names the key, the value found and what is allowed.
    """
    load_methods(cfg.DISTILLER.PLUGINS, cfg.DISTILLER.TYPE)
    _one_of(cfg, "DISTILLER.TYPE", distiller_dict, "method")
    _check_method_settings(cfg)
    if cfg.DISTILLER.ADD_KD and not contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher:
        raise InputError(
            f"DISTILLER.ADD_KD {cfg.DISTILLER.ADD_KD} needs a teacher, which {cfg.DISTILLER.TYPE} has not; use KD or "
            "KD_TWO_VIEWS"
        )
    _check_mixed_labels(cfg)
    _one_of(cfg, "DATASET.TYPE", dataset_dict, "data set")
    _one_of(cfg, "DATASET.LOADER", LOADERS, "loader")
    _one_of(cfg, "SOLVER.TRAINER", trainer_dict, "trainer")
    _one_of(cfg, "SOLVER.TYPE", OPTIMIZERS, "optimiser")
    _one_of(cfg, "SOLVER.LR_SCHEDULE", SCHEDULES, "schedule")
    _one_of(cfg, "SOLVER.LR_RULE", LR_RULES, "rule")
    _one_of(cfg, "SOLVER.AMP", PRECISIONS, "precision")
    _one_of(cfg, "SOLVER.BATCH_NORM", BATCH_NORMS, "choice")
    _one_of(cfg, "SOLVER.COMPILE", COMPILED, "choice")
    _one_of(cfg, "SOLVER.COMPILE_MODE", COMPILE_MODES, "mode of torch.compile")
    _one_of(cfg, "LOG.PROGRESS", ("auto", "on", "off"), "choice")
    positive = (
        "SOLVER.BATCH_SIZE", "SOLVER.LR_BATCH_SIZE", "SOLVER.EPOCHS", "DATASET.TEST.BATCH_SIZE",
        "LOG.EVAL_FREQ", "LOG.MEAN_OF_LAST",
    )  # fmt: skip
    _each(cfg, positive, lambda v: v >= 1, "at least 1")
    _each(
        cfg,
        ("SOLVER.LR", "SOLVER.LR_DECAY_RATE", "SOLVER.LR_DECAY_EPOCHS", "SOLVER.EPS", "DISTILLER.ADD_KD_TEMPERATURE"),
        lambda v: v > 0,
        "above 0",
    )
    not_negative = (
        "SOLVER.WEIGHT_DECAY", "SOLVER.LR_MIN", "SOLVER.WARMUP_EPOCHS", "SOLVER.WARMUP_LR",
        "DATASET.NUM_WORKERS", "DATASET.IMAGE_SIZE", "DATASET.TRAIN_PER_CLASS", "DATASET.STRONG_N",
        "LOG.SAVE_CHECKPOINT_FREQ", "LOG.SAVE_EVERY_STEPS", "LOG.SAVE_EVERY_MINUTES", "LOG.TENSORBOARD_FREQ",
        "DISTILLER.ADD_KD", "DATASET.RANDAUGMENT", "DATASET.MIXUP_ALPHA", "DATASET.CUTMIX_ALPHA",
    )  # fmt: skip
    _each(cfg, not_negative, lambda v: v >= 0, "0 or more")
    _each(cfg, ("DATASET.TRAIN_FRACTION",), lambda v: 0 < v <= 1, "above 0 and at most 1")
    _each(cfg, ("DATASET.COLOR_JITTER", "DATASET.RANDOM_ERASING"), lambda v: 0 <= v <= 1, "from 0 to 1")
    below_one = (
        "DATASET.VAL_FRACTION",
        "DATASET.LABEL_SMOOTHING",
        "SOLVER.EMA_DECAY",
        "SOLVER.MOMENTUM",
        "SOLVER.ALPHA",
    )
    _each(cfg, below_one, lambda v: 0 <= v < 1, "0 or more and below 1")
    _each(cfg, ("EXPERIMENT.SEED",), lambda v: 0 <= v < 2**63, "from 0 to 2^63 - 1")
    _each(cfg, ("SOLVER.BETAS",), lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers from 0 to below 1")
    chosen_recipes(cfg, dataset_dict[cfg.DATASET.TYPE])
    if cfg.SOLVER.CACHE_TEACHER:
        check_cacheable(cfg)
    if not (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG):
        raise InputError("EXPERIMENT.NAME and EXPERIMENT.TAG are both empty; one must name the run")
    if ".." in PurePath(experiment_name(cfg)).parts:
        raise InputError(f"the run's folder {experiment_name(cfg)} must lie below LOG.PREFIX; leave out '..'")
    if cfg.SOLVER.EPOCHS <= cfg.SOLVER.WARMUP_EPOCHS:
        raise InputError(
            f"SOLVER.WARMUP_EPOCHS is {cfg.SOLVER.WARMUP_EPOCHS}, which leaves nothing of "
            f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}"
        )


def _check_method_settings(cfg: CN) -> None:
    """Refuse to start a method file whose constructor reads keys that nobody gives, and a switch without a reader."""
    method = distiller_dict[cfg.DISTILLER.TYPE]
    file = method_file(method)
    reads_switch = hasattr(method, "logit_stand_options") or (file and "EXPERIMENT.LOGIT_STAND" in file.reads)
    if cfg.EXPERIMENT.LOGIT_STAND and not reads_switch:
        raise InputError(
            f"EXPERIMENT.LOGIT_STAND: {cfg.DISTILLER.TYPE} does not standardise logits; {_standardising_methods()} do"
        )
    if file is None:
        return
    builder = next((cls.__name__ for cls in method.__mro__ if "__init__" in vars(cls)), "")
    missing = [key for key in file.required.get(builder, ()) if not _is_given(cfg, key)]
    if missing:
        raise InputError(
            f"{file.path.name} reads settings that have no default and are not given: {', '.join(missing)}; its "
            "project has them in engine/cfg.py or in its configs: give them in the config or as KEY VALUE"
        )


def _check_mixed_labels(cfg: CN) -> None:
    """Refuse shares of classes for methods that read class numbers."""
    keys = ("DATASET.MIXUP_ALPHA", "DATASET.CUTMIX_ALPHA", "DATASET.LABEL_SMOOTHING")
    given = [f"{key} {value_of(cfg, key)}" for key in keys if value_of(cfg, key)]
    if given and not getattr(distiller_dict[cfg.DISTILLER.TYPE], "mixed_labels", False):
        able = [name for name, method in distiller_dict.items() if getattr(method, "mixed_labels", False)]
        raise InputError(
            f"{', '.join(given)}: labels become shares of classes, and method {cfg.DISTILLER.TYPE} reads class "
            f"numbers; methods that take shares: {', '.join(sorted(able))}"
        )


def _is_given(cfg: CN, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(cfg, dict):
            return True  # an attribute of a value, such as a method of a text
        if part not in cfg:
            return False
        cfg = cfg[part]
    return True


def value_of(cfg: CN, key: str) -> Any:
    """The value under a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _one_of(cfg: CN, key: str, allowed: Iterable[str], kind: str) -> None:
    value = value_of(cfg, key)
    if value not in allowed:
        raise InputError(f"{key}: no {kind} named {value!r}; {suggestion(str(value), allowed)}")


def _each(cfg: CN, keys: Iterable[str], holds: Callable[[Any], bool], allowed: str) -> None:
    for key in keys:
        value = value_of(cfg, key)
        if not holds(value):
            raise InputError(f"{key} must be {allowed}, got {value}")
