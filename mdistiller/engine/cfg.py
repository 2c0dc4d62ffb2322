"""The configuration: every key, its default, meaning, range and role.

``CFG`` is the tree of the defaults, plain values (mdistiller's keys and values where it has them). Each method's
section comes from its own file. ``load_config`` makes a checked copy; mdistiller's way, ``CFG.merge_from_file(...)`` on
the global tree, works too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import PurePath
from typing import Any

from mdistiller.consent import COMMAND_LINE, check_code
from mdistiller.contract import contract_of
from mdistiller.dataset import dataset_dict, open_dataset
from mdistiller.dataset.fields import chosen_recipes
from mdistiller.distillers import distiller_dict
from mdistiller.forks import SHARED, fork_defaults
from mdistiller.functional.gather import this_process
from mdistiller.messages import say
from mdistiller.models.any import RESIZE, is_code, is_foreign
from mdistiller.options import (
    MANY,
    OPTIONS,
    Option,
    are_texts,
    options_of_dataset,
    options_of_method,
    weight,
)
from mdistiller.plugins import MethodFile, contents, load_methods, method_file
from mdistiller.registry import InputError

from .config.experiment import UNDECLARED, flatten, options_of_run, relevant_part
from .config.node import SWITCH, sections_of, value_at
from .config.node import ConfigNode as CN
from .forwards.cache import caches_in_memory, check_cacheable
from .forwards.memory import FORMATS
from .task import task_of
from .trainer import trainer_dict

ADMITTED = "__admitted_files__"  # an attribute of the tree

# Keys that the config.yaml of an earlier run may hold: default, whether another value changed a result, and advice.
RETIRED = {
    "DCD.INIT_B": (0.0, False, "it never had an effect"),
    "DIST.LABEL_SMOOTHING": (0.0, True, "set DATASET.LABEL_SMOOTHING"),
    "DIST_PLUS.LABEL_SMOOTHING": (0.0, True, "set DATASET.LABEL_SMOOTHING"),
    "LOG.SAVE_EVERY_MINUTES": (0.0, False, "set LOG.SAVE_EVERY_STEPS"),
    "MDR.REDUCTION": ("mean", True, "the mean is taken; raise the weights"),
    "MDR.RELATION_DIM": ("anchor", True, "leave it out"),
}


class ConfigTree(CN):
    """The root: knows the method files that are merged into it and makes room for their settings."""

    def before_merge(
        self, trees: Sequence[tuple[str, Any]], allow_plugins: bool = False, method: str = "", **how: Any
    ) -> None:
        """Load the method files that ``DISTILLER.PLUGINS`` and ``DISTILLER.TYPE`` ask for.

        Args:
            trees: by source; code that a source other than the command line names is executed if allowed only.
            allow_plugins: the user allows it.
            method: what the command line chooses as ``DISTILLER.TYPE``, whatever the trees say.
            how: of other nodes.

        Raises:
            InputError: see :func:`mdistiller.consent.check_code` and :func:`mdistiller.plugins.load_methods`.
        """
        for key in CODE_KEYS:
            named = [(source, value) for source, tree in trees if (value := value_at(tree, key)) is not None]
            for source, value in named[-1:]:  # the last one holds
                check_code(key, OPTIONS[key].code(value), source, allow_plugins)
        asked = dict(self.DISTILLER)
        for _, tree in trees:
            given = tree.get("DISTILLER") if isinstance(tree, dict) else None
            asked |= given if isinstance(given, dict) else {}
        name, plugins, fork = asked["TYPE"], asked["PLUGINS"], asked["FORK"]
        given = [plugins] if isinstance(plugins, str) else plugins
        if isinstance(name, str) and are_texts(given) and "\0" not in "".join(given):  # or the merge will complain
            self.admit_method(_files_in(plugins), name, str(fork or ""), method in ("", name))
            if name not in self and any(name in tree for _, tree in trees):
                _check_method(name, _files_in(plugins))  # before the merge calls its section unknown

    def drops(self, key: str, value: Any) -> bool:
        """
        Raises:
            InputError: a retired key with a value that nothing here gives any more.
        """
        if key not in RETIRED:
            return False
        default, matters, advice = RETIRED[key]
        if value != default:
            message = f"{key} {value} was removed: {advice}"
            if matters:
                raise InputError(message)
            say(message)
        return True

    def admit_method(self, plugins: Sequence[str], name: str, fork: str, chosen: bool) -> None:
        """Load the method called ``name`` and make room for its settings.

        A method file of another project states no defaults. The sections that it reads and that nobody has
        take any key then, and those of its keys that are missing from sections of ours take any value. Where the
        project's own defaults are found, they hold if the method is ``chosen``; see ``mdistiller/forks.py``.
        """
        file = load_methods(plugins, name)
        method = distiller_dict.get(name)
        if method is None:
            return
        _add(self, options_of_method(method))
        if file is None:
            return
        for key, default in self._defaults_of_fork(file, fork, method).items() if chosen else ():
            self.enter_default(key, default)
        for key in file.reads or [method.section]:
            section, _, rest = key.partition(".")
            if rest and section not in self:
                self[section] = CN(new_allowed=True)
            self.allow_key(key)

    def _defaults_of_fork(self, file: MethodFile, fork: str, method: type) -> dict[str, Any]:
        """Those that the file needs: the keys that it reads, and all others of the sections that nobody else has.

        Empty at the second time, since the settings may have been given by then.
        """
        known = self.__dict__.setdefault(ADMITTED, set())
        if (file.path, fork) in known:
            return {}
        known.add((file.path, fork))
        sections = {key.split(".")[0] for key in (*file.reads, f"{method.section}.")} - set(CFG)
        defaults = fork_defaults(file.path, fork)
        return {
            key: value
            for key, value in defaults.items()
            if (key in file.reads and key not in SHARED) or key.split(".")[0] in sections
        }


def _files_in(value: Any) -> list[str]:
    """The files that a value of ``DISTILLER.PLUGINS`` names: a list, or one alone."""
    values = [value] if isinstance(value, str) else value
    return [str(path) for path in values] if isinstance(values, (list, tuple)) else []


def _factory_in(value: Any) -> list[str]:
    """The factory that a network's name is, if it is one."""
    return [value] if isinstance(value, str) and is_code(value) else []


def is_rising(values: Sequence[float]) -> bool:
    return all(one < other for one, other in pairwise(values))


def only(key: str, *values: Any) -> Callable[[Any], bool]:
    """For :attr:`Option.when`: where ``key`` has one of the values."""
    return lambda cfg: value_at(cfg, key) in values


def _is_adapted(role: str, cfg: Any) -> bool:
    """Whether a run has a network in that role that is not used as it is."""
    parts = [cfg.DISTILLER[f"{role}_{part}"] for part in ("ARGS", "MAPS", "INPUT")]
    adapted = is_foreign(cfg.DISTILLER[role]) or parts[0] or parts[1] or any(parts[2][key] for key in ("SIZE", "MEAN"))
    return bool(adapted) and (role == "STUDENT" or has_teacher(cfg))


def has_teacher(cfg: Any) -> bool:
    return contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher


def has_strong_view(cfg: Any) -> bool:
    return "image_strong" in contract_of(distiller_dict[cfg.DISTILLER.TYPE]).views


def several_processes(cfg: Any) -> bool:
    return this_process()[1] > 1


data, speed, place = (partial(Option, role=role) for role in ("data", "speed", "place"))
resumable = partial(Option, resumable=True)

# fmt: off
three = (lambda value: len(value) in (0, 3) and all(isinstance(v, (int, float)) for v in value), "three numbers")
statistics = (lambda value: list(value) in (["auto"], ["imagenet"]) or three[0](value),
              "empty, auto, imagenet or three numbers")
places = (lambda value: all(type(v) is str or (type(v) is int and v >= 0) for v in value), "module names or numbers")
NETWORKS: dict[str, Option] = {}
for _role in ("TEACHER", "STUDENT"):
    NETWORKS |= {f"DISTILLER.{_role}_{key}": replace(option, when=partial(_is_adapted, _role)) for key, option in {
        "ARGS": Option(CN(new_allowed=True), "arguments of the network's constructor, by name"),
        "MAPS": Option([], "network of another library: modules whose outputs are the maps, or numbers of timm's "
                           "intermediates; empty: chosen automatically", holds=places),
        "INPUT.SIZE": Option(0, "image size of the network, in pixels; 0: the pretrained network's size, or no "
                                "resizing", at_least=0),
        "INPUT.MEAN": Option([], "mean for the network's normalisation; empty: the pretrained network's, or the data "
                                 "set's", holds=three),
        "INPUT.STD": Option([], "standard deviation, as MEAN", above=0, holds=three),
        "INPUT.RESIZE": Option("antialias", "method of resizing", one_of=RESIZE),
    }.items()}
OPTIONS |= {
    "EXPERIMENT.PROJECT": place("distill", "a run's folder is LOG.PREFIX/PROJECT/(NAME or TAG)"),
    "EXPERIMENT.NAME": place("", "name of the run's folder; empty: TAG"),
    "EXPERIMENT.TAG": place("default", "comma-separated words; names the run's folder if NAME is empty"),
    "EXPERIMENT.SEED": data(0, "seed of weights, image order, augmentation and splits", at_least=0, below=2**63),
    "EXPERIMENT.LOGIT_STAND": Option(False, "LSKD: standardise each image's logits before they are compared"),

    "DATASET.TYPE": data("cifar100", "the data set", one_of=dataset_dict),
    "DATASET.ROOT": place("./data", "folder of all data sets"),
    "DATASET.DOWNLOAD": place(True, "download missing files, if the data set can be downloaded"),
    "DATASET.IMAGE_SIZE": data(0, "pixels a side; 0: the data set's own",
                               holds=(lambda v: v == 0 or 4 <= v <= 4096, "0 or from 4 to 4096")),
    "DATASET.MEAN": data([], "mean of the channels, for normalisation, where white is 1; empty: the data set's; auto: "
                         "measured on the training images, and written into the run's config.yaml",
                         holds=statistics, settled=True),
    "DATASET.STD": data([], "standard deviation, as MEAN",
                        holds=(lambda v: statistics[0](v) and all(x > 0 for x in v if not isinstance(x, str)),
                               f"{statistics[1]} above 0"), settled=True),
    "DATASET.LOADER": speed("auto", "where batches are made. device: on the networks' device; workers: in processes; "
                            "auto: device on a GPU or with NUM_WORKERS 0", one_of=("auto", "device", "workers")),
    "DATASET.NUM_WORKERS": speed(2, "number of processes of LOADER workers", at_least=0, at_most=1024),
    "DATASET.VIEW_WEAK": data("weak", "recipe for the fields image and image_weak: weak, strong, plain (no "
                              "augmentation), or another of the data set's"),
    "DATASET.VIEW_STRONG": data("strong", "recipe for the field image_strong; two views of one recipe differ",
                                 when=has_strong_view),
    "DATASET.STRONG_N": data(2, "RandAugment's operations in the strong recipe", at_least=0, at_most=20),
    "DATASET.TRAIN_FRACTION": data(1.0, "share of each class's training images that is used", above=0, at_most=1),
    "DATASET.TRAIN_PER_CLASS": data(0, "number of training images of each class; 0: all", at_least=0),
    "DATASET.VAL_FRACTION": data(0.0, "share of training images held out, for the best epoch", at_least=0, below=1),
    "DATASET.COLOR_JITTER": data(0.0, "after the weak view: largest relative change of brightness, contrast, "
                                 "saturation", at_least=0, at_most=1, varies=True),
    "DATASET.RANDAUGMENT": data(0, "after COLOR_JITTER: number of RandAugment operations",
                                at_least=0, at_most=20, varies=True),
    "DATASET.RANDOM_ERASING": data(0.0, "after RANDAUGMENT: probability of painting noise over a rectangle",
                                   at_least=0, at_most=1, varies=True),
    "DATASET.MIXUP_ALPHA": data(0.0, "blend images and labels, with shares from Beta(alpha, alpha); 0: off",
                                at_least=0, varies=True),
    "DATASET.CUTMIX_ALPHA": data(0.0, "paste rectangles; 0: off. With MIXUP_ALPHA too, each image gets one of the two",
                                 at_least=0, varies=True),
    "DATASET.LABEL_SMOOTHING": data(0.0, "share of each label that is spread over all classes", at_least=0, below=1),
    "DATASET.TEST.BATCH_SIZE": speed(64, "images of a test batch, in each process", at_least=1),

    "DISTILLER.TYPE": Option("NONE", "the method; NONE: plain training", one_of=distiller_dict),
    "DISTILLER.TEACHER": Option("ResNet50", "the teacher's architecture: a name that tools/list.py shows, timm:NAME, "
                                "torchvision:NAME or package.module:factory, which is code", code=_factory_in,
                                when=has_teacher),
    "DISTILLER.TEACHER_CKPT": place("", "the teacher's weights: a file, or pretrained; empty: the unpacked file of its "
                                    "public weights", when=has_teacher),
    "DISTILLER.TEACHER_CLASSES": data("", "file for a teacher of other classes: line i names its outputs for class i; "
                                      "empty: the data set's classes", when=has_teacher),
    "DISTILLER.STUDENT": Option("resnet32", "the student's architecture, named as TEACHER", code=_factory_in),
    "DISTILLER.STUDENT_CKPT": Option("", "the student's initial weights: a file, or pretrained; empty: random"),
    **NETWORKS,
    "DISTILLER.PLUGINS": resumable([], "paths of other projects' method files: code that is executed; see "
                                   "mdistiller/plugins.py", code=_files_in, holds=(are_texts, "paths")),
    "DISTILLER.FORK": resumable("", "folder of the project that a method file comes from: its engine/cfg.py is read "
                                "for defaults, not executed; empty: the project in whose tree the file lies"),
    "DISTILLER.ADD_KD": weight(0.0, "of a KD term added to any method; see mdistiller/engine/added_kd.py"),
    "DISTILLER.ADD_KD_TEMPERATURE": Option(4.0, "temperature of the added KD term", above=0,
                                           when=lambda cfg: cfg.DISTILLER.ADD_KD > 0),

    "SOLVER.TRAINER": Option("base", "the training loop. dot: two momenta, see mdistiller/engine/dot.py",
                             one_of=trainer_dict),
    "SOLVER.DOT.DELTA": resumable(0.075, "MOMENTUM + DELTA is the distillation's momentum, MOMENTUM - DELTA the task's",
                                  at_least=0, below=1, when=only("SOLVER.TRAINER", "dot", "crd_dot")),
    "SOLVER.BATCH_SIZE": data(64, "images of a batch, all processes together; LR is meant for this batch", at_least=1),
    "SOLVER.GATHER": resumable(False, "several processes: the method sees the images of all processes",
                               when=several_processes),
    "SOLVER.BATCH_NORM": resumable("local", "several processes: statistics of each process (local) or of all (sync)",
                                   one_of=("local", "sync"), when=several_processes),
    "SOLVER.DROP_LAST": data(False, "leave out the last batch of an epoch if that batch is smaller"),
    "SOLVER.EPOCHS": resumable(240, "number of epochs", at_least=1, at_most=MANY),
    "SOLVER.TYPE": Option("SGD", "the optimiser", one_of=("SGD", "AdamW", "RMSProp")),
    "SOLVER.LR": resumable(0.05, "learning rate", above=0),
    "SOLVER.LR_RULE": resumable("none", "how rates grow with BATCH_SIZE / LR_BATCH_SIZE",
                                one_of=("none", "linear", "sqrt")),
    "SOLVER.LR_BATCH_SIZE": resumable(64, "batch size for which LR, WARMUP_LR and LR_MIN are given", at_least=1,
                                      when=only("SOLVER.LR_RULE", "linear", "sqrt")),
    "SOLVER.MOMENTUM": resumable(0.9, "momentum of SGD and RMSProp", at_least=0, below=1,
                                 when=only("SOLVER.TYPE", "SGD", "RMSProp")),
    "SOLVER.NESTEROV": resumable(False, "SGD: Nesterov's momentum", when=only("SOLVER.TYPE", "SGD")),
    "SOLVER.BETAS": resumable((0.9, 0.999), "AdamW: the two betas",
                              at_least=0, below=1, holds=(lambda v: len(v) == 2, "two numbers"),
                              when=only("SOLVER.TYPE", "AdamW")),
    "SOLVER.ALPHA": resumable(0.99, "RMSProp: decay of the squared gradients", at_least=0, below=1,
                              when=only("SOLVER.TYPE", "RMSProp")),
    "SOLVER.EPS": resumable(1e-8, "AdamW, RMSProp: epsilon", above=0, when=only("SOLVER.TYPE", "AdamW", "RMSProp")),
    "SOLVER.WEIGHT_DECAY": resumable(0.0001, "weight decay of all parameters; see NO_DECAY", at_least=0),
    "SOLVER.NO_DECAY": Option("none", "parameters without weight decay. norm_bias: biases and all parameters of one "
                              "dimension, such as BatchNorm's; model: also the network's no_weight_decay()",
                              one_of=("none", "norm_bias", "model")),
    "SOLVER.LR_SCHEDULE": resumable("step", "schedule of the learning rate", one_of=("step", "cosine", "exponential")),
    "SOLVER.LR_DECAY_STAGES": resumable([150, 180, 210], "step: the epochs after which the rate falls", at_least=1,
                                         holds=(is_rising, "rising"), when=only("SOLVER.LR_SCHEDULE", "step")),
    "SOLVER.LR_DECAY_RATE": resumable(0.1, "step: factor at a stage; exponential: factor in LR_DECAY_EPOCHS epochs",
                                      above=0,
                                       at_most=1, when=only("SOLVER.LR_SCHEDULE", "step", "exponential")),
    "SOLVER.LR_DECAY_EPOCHS": resumable(1.0, "exponential: epochs for a fall by LR_DECAY_RATE", above=0,
                                        when=only("SOLVER.LR_SCHEDULE", "exponential")),
    "SOLVER.LR_MIN": resumable(0.0, "cosine: final rate", at_least=0, when=only("SOLVER.LR_SCHEDULE", "cosine")),
    "SOLVER.WARMUP_EPOCHS": resumable(0, "epochs in which the rate rises linearly from WARMUP_LR to LR", at_least=0),
    "SOLVER.WARMUP_LR": resumable(0.0, "rate at the start of the warm-up", at_least=0,
                                  when=lambda cfg: cfg.SOLVER.WARMUP_EPOCHS > 0),
    "SOLVER.DEVICE": speed("auto", "auto: a GPU if there is one; or a device of torch: cpu, cuda, cuda:1"),
    "SOLVER.AMP": resumable("off", "number format of the networks. off: float32; fp16: GPU only",
                            one_of=("off", "bf16", "fp16")),
    "SOLVER.CHANNELS_LAST": speed("auto", "memory layout NHWC; auto: on for a CPU; a resumed run keeps its layout",
                                  one_of=SWITCH, settled=True),
    "SOLVER.FAST_TEACHER": speed(True, "fold the frozen teacher's BatchNorms into its convolutions",
                                 when=has_teacher),
    "SOLVER.CACHE_TEACHER": speed(False, "store the teacher's outputs in memory; needs DATASET.VIEW_WEAK plain",
                                  when=has_teacher),
    "SOLVER.TEACHER_MEMORY": speed("off", "where the teacher's outputs are kept. memory: as CACHE_TEACHER; disk: those "
                                   "of every epoch, for all runs of this seed and teacher",
                                   one_of=("off", "memory", "disk"), when=has_teacher),
    "SOLVER.TEACHER_MEMORY_DIR": place("", "folder for TEACHER_MEMORY disk; empty: LOG.PREFIX/teacher_memory",
                                       when=only("SOLVER.TEACHER_MEMORY", "disk")),
    "SOLVER.TEACHER_MEMORY_FORMAT": resumable("as_computed", "number format on the disk. as_computed: exact",
                                              one_of=FORMATS, when=only("SOLVER.TEACHER_MEMORY", "disk")),
    "SOLVER.COMPILE": speed("off", "networks for torch.compile. all: student and teacher",
                            one_of=("off", "teacher", "all")),
    "SOLVER.COMPILE_MODE": speed("default", "mode of torch.compile. reduce-overhead: CUDA graphs",
                                 one_of=("default", "reduce-overhead", "max-autotune"),
                                 when=only("SOLVER.COMPILE", "teacher", "all")),
    "SOLVER.EMA_DECAY": resumable(0.0, "moving average of the student's weights: decay per step; 0: none",
                                  at_least=0, below=1),

    "LOG.PREFIX": place("./output", "folder of all runs"),
    "LOG.EVAL_FREQ": place(1, "evaluate every N epochs, and after the last epoch", at_least=1),
    "LOG.MEAN_OF_LAST": place(5, "results.json gives the mean accuracy of the last N evaluations", at_least=1),
    "LOG.SAVE_CHECKPOINT_FREQ": place(40, "keep epoch_N and student_N every so many epochs; 0: never", at_least=0),
    "LOG.SAVE_EVERY_STEPS": place(0, "also save latest every N steps within an epoch; 0: after each epoch only",
                                  at_least=0),
    "LOG.TENSORBOARD_FREQ": place(500, "also log loss and rate every N steps; 0: after each epoch only", at_least=0),
    "LOG.PROGRESS": place("auto", "progress bar; auto: on a terminal only", one_of=SWITCH),
    "LOG.WANDB": place(False, "log to Weights & Biases too"),
}
# fmt: on

CFG = ConfigTree()


def _collect_sections() -> None:
    """Room for the library's options, below ``DATASET`` for each data set's, and in one section for each method's."""
    for options in (OPTIONS, *map(options_of_dataset, dataset_dict.values())):
        _add(CFG, options)
    for method in distiller_dict.values():
        _add(CFG, options_of_method(method))


def _add(cfg: CN, options: dict[str, Option]) -> None:
    """Enter the defaults of keys that are not there yet; methods that share a section may add to it."""
    for key, option in options.items():
        node, (*sections, last) = cfg, key.split(".")
        for section in sections:
            node = node.setdefault(section, CN())
        node.setdefault(last, copy.deepcopy(option.default))
        if option.default == [] and isinstance(node, CN):  # a script may put a plain yacs node there
            node.free_list(last)


_collect_sections()


LONGEST_NAME = 200  # bytes; file systems take 255, and a plan puts files of longer names beside the folder
CODE_KEYS = tuple(key for key, option in OPTIONS.items() if option.code)
METHOD_KEYS = ("DISTILLER.TYPE", "DISTILLER.FORK", *CODE_KEYS)


def load_config(
    path: str | PurePath | None = None,
    options: Sequence[str] = (),
    *,
    allow_plugins: bool = False,
    source: str = COMMAND_LINE,
) -> CN:
    """A checked, frozen configuration: defaults, then the file, then ``KEY VALUE`` options.

    Args:
        path: a YAML file, if there is one.
        options: keys and values.
        allow_plugins: execute code that files name, too, such as ``DISTILLER.PLUGINS`` of the YAML file.
        source: where the options come from; code that they name is the user's if it is the command line.

    Raises:
        InputError: see :meth:`ConfigNode.merge_from_file` and :func:`check_config`.
    """
    _collect_sections()  # a script may have registered a method since the import
    cfg = CFG.clone()
    cfg.defrost()
    pairs = zip(options[::2], options[1::2], strict=False)
    # First, since the file may hold settings of the method that the options name.
    first = [part for pair in pairs if pair[0] in METHOD_KEYS for part in pair]
    cfg.merge_from_list(first, source, allow_plugins=allow_plugins)
    if path:
        given = dict(zip(first[::2], first[1::2], strict=True))
        but, method = [key for key in CODE_KEYS if key in given], str(given.get("DISTILLER.TYPE", ""))
        cfg.merge_from_file(path, but, allow_plugins=allow_plugins, method=method)
    cfg.merge_from_list(list(options), source, allow_plugins=allow_plugins)
    check_config(cfg)
    cfg.freeze()
    return cfg


def load_run(path: str | PurePath | None = None, options: Sequence[str] = (), allow_plugins: bool = False) -> CN:
    """:func:`load_config` for one run from a command line, which must say what is trained.

    Options that belong to other methods are taken, since a line may be used for several, and named.

    Raises:
        InputError: see :func:`load_config`; or neither file nor options name data, networks or a method.
    """
    cfg = load_config(path, options, allow_plugins=allow_plugins)
    sections = {key.partition(".")[0] for key in options[::2]} | (sections_of(path) if path else set())
    if not sections & {"DISTILLER", "DATASET"}:
        found = f"{path} names neither data nor networks" if path else "no configuration is given"
        raise InputError(
            f"{found}: nothing says what to train; for example: python tools/train.py --cfg "
            "configs/digits/kd/res20_res8.yaml (all of them: python tools/list.py configs)"
        )
    unread = [f"{key} ({why})" for key, why in _unread(cfg, options[::2]).items()]
    if unread:
        say(f"without effect here: {', '.join(unread)}")
    return cfg


def _unread(cfg: CN, keys: Sequence[str]) -> dict[str, str]:
    """The keys that the run does not read, and why."""
    file, known = method_file(distiller_dict[cfg.DISTILLER.TYPE]), options_of_run(cfg)
    read, unread = {*flatten(relevant_part(cfg)), *(file.reads if file else ())}, {}
    for key in keys:
        option = known.get(key, UNDECLARED)
        if key not in read:
            unread[key] = f"DISTILLER.TYPE is {cfg.DISTILLER.TYPE}"
        elif option.role != "ignored" and not option.is_read(cfg):
            unread[key] = "given the other settings"
    return unread


OFF = (0, "", "off", "none", [])
MAY_BE_OFF = ("DATASET", "DISTILLER", "SOLVER", "LOG")  # sections in which most keys switch something on


def show_cfg(cfg: CN) -> None:
    """Print what this run reads: what is off by default and left so is not shown."""
    options, shown = options_of_run(cfg), CN()
    for section, keys in relevant_part(cfg).items():
        for key, value in flatten({section: keys}).items():
            option = options.get(key, UNDECLARED)
            is_off = section in MAY_BE_OFF and value == option.default and value in OFF
            if option.is_read(cfg) and not is_off:
                *above, last = key.split(".")
                node = shown
                for name in above:
                    node = node.setdefault(name, CN())
                node[last] = value
    say(f"CONFIG (config.yaml in the run's folder has all keys):\n{shown.dump()}")


def experiment_name(cfg: CN) -> str:
    """``PROJECT/NAME``, or ``PROJECT/TAG`` where no name is given."""
    return "/".join(filter(None, [cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG]))


def check_config(cfg: CN) -> None:
    """Refuse values that no run can start with.

    Raises:
        InputError: names the key, the value found and what is allowed.
    """
    OPTIONS["DISTILLER.PLUGINS"].check("DISTILLER.PLUGINS", cfg.DISTILLER.PLUGINS)
    load_methods(cfg.DISTILLER.PLUGINS, cfg.DISTILLER.TYPE)
    _check_method(cfg.DISTILLER.TYPE, cfg.DISTILLER.PLUGINS)
    _check_method_settings(cfg)
    check_values(cfg)
    _say_what_is_ignored(cfg)
    if cfg.DISTILLER.ADD_KD and not contract_of(distiller_dict[cfg.DISTILLER.TYPE]).teacher:
        raise InputError(
            f"DISTILLER.ADD_KD {cfg.DISTILLER.ADD_KD} needs a teacher, and {cfg.DISTILLER.TYPE} has none; use KD or "
            "KD_TWO_VIEWS"
        )
    _check_mixed_labels(cfg)
    task_of(cfg)
    chosen_recipes(cfg, open_dataset(cfg))
    if cfg.SOLVER.CACHE_TEACHER and cfg.SOLVER.TEACHER_MEMORY == "disk":
        raise InputError("SOLVER.CACHE_TEACHER True is TEACHER_MEMORY memory; set CACHE_TEACHER False for disk")
    if caches_in_memory(cfg):
        check_cacheable(cfg)
    _check_names(cfg)
    if cfg.SOLVER.EPOCHS <= cfg.SOLVER.WARMUP_EPOCHS:
        raise InputError(
            f"SOLVER.WARMUP_EPOCHS is {cfg.SOLVER.WARMUP_EPOCHS}, which leaves no epoch of "
            f"SOLVER.EPOCHS {cfg.SOLVER.EPOCHS}"
        )
    _check_rates(cfg.SOLVER)


def _check_names(cfg: CN) -> None:
    """Refuse a folder's name that lies elsewhere, or that file systems or a web page do not take."""
    if not (cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG):
        raise InputError("EXPERIMENT.NAME and EXPERIMENT.TAG are both empty; one must name the run")
    for key in ("PROJECT", "NAME" if cfg.EXPERIMENT.NAME else "TAG"):
        name = cfg.EXPERIMENT[key]
        path, what = PurePath(name), f"EXPERIMENT.{key} {name[:80]!r}"
        if path.is_absolute() or ".." in path.parts or (name and not path.parts):
            raise InputError(f"{what} must lie below LOG.PREFIX; leave out '..' and the '/' in front")
        if any(not character.isprintable() or character in "<>" for character in name):
            raise InputError(f"{what} must not hold line breaks, control characters, '<' or '>'")
        if any(len(part.encode()) > LONGEST_NAME for part in path.parts):
            raise InputError(f"{what} is too long: at most {LONGEST_NAME} bytes between two '/'")


def _check_rates(solver: CN) -> None:
    """Refuse a learning rate that rises where it is to fall, and the other way round."""
    lower = {"LR_MIN": solver.LR_SCHEDULE == "cosine", "WARMUP_LR": solver.WARMUP_EPOCHS > 0}
    for key, is_read in lower.items():
        if is_read and solver[key] > solver.LR:
            raise InputError(f"SOLVER.{key} must be at most SOLVER.LR {solver.LR}, got {solver[key]}")


def _check_method(name: str, plugins: Sequence[str]) -> None:
    """Refuse a name that no method has; say what the method files hold."""
    try:
        OPTIONS["DISTILLER.TYPE"].check("DISTILLER.TYPE", name)
    except InputError as error:
        raise InputError("; ".join(filter(None, [str(error), contents(plugins)]))) from None


def check_values(cfg: CN) -> None:
    """Check every value that is declared and that the run reads.

    Raises:
        InputError: see :meth:`~mdistiller.options.Option.check`.
    """
    options = options_of_run(cfg)
    for key, value in flatten(relevant_part(cfg)).items():
        options.get(key, UNDECLARED).check(key, value)


def _say_what_is_ignored(cfg: CN) -> None:
    given, options = flatten(relevant_part(cfg)), options_of_run(cfg)
    dead = {key: options[key] for key in given if key in options and options[key].role == "ignored"}
    ignored = [f"{key} ({dead[key].help})" for key in dead if {key: given[key]} != flatten({key: dead[key].default})]
    if ignored:
        say(f"without effect here: {', '.join(ignored)}")


def _check_method_settings(cfg: CN) -> None:
    """Refuse to start a method file whose constructor reads keys that nobody gives, and a switch without a reader."""
    method = distiller_dict[cfg.DISTILLER.TYPE]
    file = method_file(method)
    reads_switch = method.standardises_logits or (file and "EXPERIMENT.LOGIT_STAND" in file.reads)
    if cfg.EXPERIMENT.LOGIT_STAND and not reads_switch:
        able = ", ".join(sorted(name for name, cls in distiller_dict.items() if cls.standardises_logits))
        raise InputError(f"EXPERIMENT.LOGIT_STAND: {cfg.DISTILLER.TYPE} does not standardise logits; {able} do")
    if file is None:
        return
    builder = next((cls.__name__ for cls in method.__mro__ if "__init__" in vars(cls)), "")
    missing = [key for key in file.required.get(builder, ()) if not _is_given(cfg, key)]
    if missing:
        source = (
            "its project has them in engine/cfg.py or in its configs: name the project's folder by DISTILLER.FORK, or "
            "give them in the config or as KEY VALUE"
        )
        if method.defaults:
            source = "add them to its DEFAULTS, or give them in the config or as KEY VALUE"
        raise InputError(
            f"{file.path.name} reads settings that have no default and are not set: {', '.join(missing)}; {source}"
        )


def _check_mixed_labels(cfg: CN) -> None:
    """Refuse shares of classes for methods that read class numbers."""
    keys = ("MIXUP_ALPHA", "CUTMIX_ALPHA", "LABEL_SMOOTHING")
    given = [f"DATASET.{key} {cfg.DATASET[key]}" for key in keys if cfg.DATASET[key]]
    if given and not distiller_dict[cfg.DISTILLER.TYPE].mixed_labels:
        able = [name for name, method in distiller_dict.items() if method.mixed_labels]
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
