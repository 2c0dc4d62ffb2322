"""Creates networks, distiller and trainer from a configuration. No other module creates them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mdistiller.contract import contract_of, where
from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.messages import say
from mdistiller.models import ModelEntry
from mdistiller.models._registration import COLLECTIONS, TEACHER_RELEASE, public_file
from mdistiller.models.any import Input, is_code, is_foreign, output_names, read_outputs, with_features, with_outputs
from mdistiller.models.facts import facts_of
from mdistiller.registry import MODEL_FAMILIES, InputError, Registry, UnknownName, image_side, open_dataset

from .added_kd import add_kd
from .cfg import check_values
from .config.node import CONFIGS, ConfigNode
from .deployed import deployed_network, deploys_whole
from .folder.checkpoint import CheckpointError, check_weights, classes_of, load_weights, not_a_folder
from .folder.run_folder import CLASSES
from .forwards.precision import hard_coded_cuda_explained, resolve_device

OTHER_CLASSES = (
    "write a file that names its outputs for each class (DISTILLER.TEACHER_CLASSES FILE, see docs/own.md), or take a "
    "method that reads no teacher logits, such as AT"
)
TEACHER_OPTION = "DISTILLER.TEACHER_CKPT"
PRETRAINED = "pretrained"  # in place of a file: the public weights of the network's library


def model_table(cfg: Any) -> Registry:
    """The table of models for the data set."""
    return MODEL_FAMILIES[open_dataset(cfg).model_family]


def build_model(table: Registry, name: str, num_classes: int) -> nn.Module:
    """A network of the table with fresh weights.

    Raises:
        InputError: no such model; the message has the closest names.
    """
    return ModelEntry.of(table[name])(num_classes=num_classes)


def build_student(cfg: Any, num_classes: int) -> nn.Module:
    """The network of ``DISTILLER.STUDENT``.

    Its weights depend on ``EXPERIMENT.SEED`` only, so that all methods have the same start.

    Raises:
        InputError: no such model; the message has the closest names.
    """
    path = cfg.DISTILLER.STUDENT_CKPT
    _model_entry(cfg, "STUDENT")  # first, since the import of a factory's file may draw numbers
    torch.manual_seed(cfg.EXPERIMENT.SEED)
    student = adapted(cfg, "STUDENT", num_classes, pretrained=path == PRETRAINED)
    if path and path != PRETRAINED:
        load_network(student, path, f"student {cfg.DISTILLER.STUDENT}", cfg, "a start must be of the same classes")
    return student


def adapted(cfg: Any, role: str, num_classes: int | None, pretrained: bool = False, empty: bool = False) -> nn.Module:
    """A network with ``DISTILLER.<role>_ARGS``, ``_MAPS`` and ``_INPUT``.

    See :func:`~mdistiller.models.any.with_features`.

    Args:
        cfg: the configuration.
        role: ``"STUDENT"`` or ``"TEACHER"``.
        num_classes: K; ``None``: as many as the public weights have.
        pretrained: with public weights.
        empty: with random weights in place of the public ones, since others will be loaded.

    Raises:
        InputError: no such model; arguments or an image size that the network refuses; maps that the network does not
            have.
    """
    name, maps, dataset = cfg.DISTILLER[role], cfg.DISTILLER[f"{role}_MAPS"], open_dataset(cfg)
    network, facts = _plain_network(cfg, role, num_classes, pretrained, empty)
    fits = _input_of(cfg, role, facts)
    if not (is_foreign(name) or fits is not None or maps):
        return network
    if fits is not None:
        say(f"{role.lower()} {name}: {fits.described(dataset.image_size)}")
    size = fits.size if fits is not None and fits.size else dataset.image_size
    try:
        network = with_features(network, size, maps, fits)
        if hasattr(network, "map_names"):
            say(f"{role.lower()} {name}: maps of {', '.join(network.map_names)}")
        return network
    except InputError as error:
        keys = f"DISTILLER.{role}"
        given = [f"images are {dataset.image_size} pixels wide (DATASET.IMAGE_SIZE)"]
        public = _public_facts(network)
        if public.get("fixed_input_size"):
            made_for = public["input_size"][-1]
            given.append(
                f"the network is made for {made_for}: {keys}_INPUT.SIZE {made_for} resizes them for this "
                f"network alone, and {keys}_ARGS.img_size {dataset.image_size} builds it for smaller ones"
            )
        raise InputError(f"{keys} {name}: {error}; {'; '.join(given)}") from None


def _plain_network(
    cfg: Any, role: str, num_classes: int | None, pretrained: bool, empty: bool = False
) -> tuple[nn.Module, Mapping[str, Any]]:
    """The network of ``DISTILLER.<role>`` as its library builds it, and what is known of its images."""
    name, keys, entry = cfg.DISTILLER[role], f"DISTILLER.{role}", _model_entry(cfg, role)
    arguments = dict(cfg.DISTILLER[f"{role}_ARGS"])
    chosen = {"num_classes": num_classes} if num_classes is not None else {}
    try:
        network = entry(**chosen, **({"pretrained": True} if pretrained and not empty else {}), **arguments)
    except InputError:
        raise
    except Exception as error:
        if not (arguments or is_foreign(name)):
            raise
        raise InputError(f"{keys} {name} cannot be built with {keys}_ARGS {arguments}: {error}") from error
    if not pretrained:
        return network, {"mean": entry.mean, "std": entry.std}
    return network, _public_facts(network)


def _public_facts(network: nn.Module) -> Mapping[str, Any]:
    """timm's facts of the public weights: classes, image size, normalisation."""
    return getattr(network, "pretrained_cfg", None) or {}


def _input_of(cfg: Any, role: str, facts: Mapping[str, Any]) -> Input | None:
    """The transformation of the data set's images to the network's input; ``None``: they fit."""
    wanted, dataset, key = cfg.DISTILLER[f"{role}_INPUT"], open_dataset(cfg), f"DISTILLER.{role}_INPUT"
    if bool(wanted.MEAN) != bool(wanted.STD):
        raise InputError(f"{key}.MEAN and {key}.STD belong together: give both or neither")
    size = wanted.SIZE or (facts.get("input_size") or (0,))[-1]
    mean, std = (list(wanted[name.upper()]) or facts.get(name) for name in ("mean", "std"))
    fits = Input(size, wanted.RESIZE, dataset.normalisation, None if None in (mean, std) else (mean, std))
    return fits if size not in (0, dataset.image_size) or fits.normalises else None


def _model_entry(cfg: Any, key: str) -> ModelEntry:
    """The table's entry of the model in ``DISTILLER.<key>``."""
    try:
        return ModelEntry.of(model_table(cfg)[cfg.DISTILLER[key]])
    except UnknownName as error:
        raise UnknownName(f"DISTILLER.{key}: {error}") from None


def build_teacher(cfg: Any, num_classes: int, option: str = TEACHER_OPTION) -> nn.Module:
    """The network of ``DISTILLER.TEACHER``, with the weights of ``DISTILLER.TEACHER_CKPT``.

    If ``TEACHER_CKPT`` is empty, the weights are those of the model's public checkpoint. With
    ``DISTILLER.TEACHER_CLASSES``, the teacher's logits are those of the data set's classes.

    Args:
        cfg: the configuration.
        num_classes: of the data set.
        option: the option that names another file, for messages.

    Raises:
        InputError: no such model; no weights, with advice to get or train them; weights that do not fit; a teacher of
            other classes whose logits the method reads.
    """
    path, name = teacher_checkpoint(cfg, option), cfg.DISTILLER.TEACHER
    outputs = _teacher_outputs(cfg, path, num_classes)
    teacher = adapted(cfg, "TEACHER", outputs, pretrained=path is None)
    if path is not None:
        load_network(teacher, path, f"teacher {name}", cfg, f"{_way_to_train(cfg)}, {OTHER_CLASSES}")
    if cfg.DISTILLER.TEACHER_CLASSES:
        return _of_listed_classes(cfg, teacher, path)
    if outputs is None and reads_teacher_logits(cfg):
        found = facts_of(teacher, [image_side(cfg)] * 2, "teacher").classes
        if found != num_classes:
            raise InputError(
                f"DISTILLER.TEACHER {name} is pretrained for {found} classes, and data set {cfg.DATASET.TYPE} has "
                f"{num_classes}; {_way_to_train(cfg)}, {OTHER_CLASSES}"
            )
    return teacher


def _teacher_outputs(cfg: Any, path: Path | None, num_classes: int) -> int | None:
    """The number of outputs of the teacher; ``None``: as many as its public weights have."""
    name, free = cfg.DISTILLER.TEACHER, bool(cfg.DISTILLER.TEACHER_CLASSES) or not reads_teacher_logits(cfg)
    if path is None:
        return None if free or (is_foreign(name) and not is_code(name)) else num_classes
    if not free:
        return num_classes
    plain, _ = _plain_network(cfg, "TEACHER", num_classes, False)
    return classes_of(plain.state_dict(), load_weights(path)) or num_classes


def _of_listed_classes(cfg: Any, teacher: nn.Module, path: Path | None) -> nn.Module:
    """The teacher with the outputs that ``DISTILLER.TEACHER_CLASSES`` lists."""
    beside = path.parent / CLASSES if path is not None else Path()
    trained_on = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else ()
    count = facts_of(teacher, [image_side(cfg)] * 2, "teacher").classes
    file = Path(cfg.DISTILLER.TEACHER_CLASSES).expanduser()
    return with_outputs(teacher, read_outputs(file, open_dataset(cfg).classes, count, output_names(count, trained_on)))


def reads_teacher_logits(cfg: Any) -> bool:
    """Whether the run compares the teacher's logits with anything."""
    return distiller_dict[cfg.DISTILLER.TYPE].reads_teacher_logits or bool(cfg.DISTILLER.ADD_KD)


def _way_to_train(cfg: Any) -> str:
    name, path = cfg.DISTILLER.TEACHER, cfg.DISTILLER.TEACHER_CKPT
    start = f" DISTILLER.STUDENT_CKPT {PRETRAINED}" if path in ("", PRETRAINED) else ""
    return f"train a teacher on these classes (DISTILLER.STUDENT {name}{start})"


def load_network(model: nn.Module, path: str | Path, what: str, cfg: Any, advice: str) -> None:
    """Load a file's weights into a network for ``DATASET.TYPE``. An error changes no weight.

    Args:
        model: the network.
        path: see :func:`load_weights`.
        what: name of the model for messages: ``"teacher resnet20"``.
        cfg: the configuration.
        advice: for a file with another number of classes.

    Raises:
        CheckpointError: the file cannot be read; and see :func:`check_weights`.
    """
    state, what = load_weights(path), f"checkpoint {path} for {what}"
    expected = f"data set {cfg.DATASET.TYPE}; {advice}"
    check_weights(model.state_dict(), state, what, lambda: _network_of(state, model_table(cfg)), expected)
    model.load_state_dict(state)


def _network_of(state: dict[str, torch.Tensor], table: Registry) -> str:
    """Advice for another network's file: the network's name, if exactly one of the table fits the file."""
    advice, found = "name the network that it was trained as", []
    *_, last = state.values()  # as a rule the classifier's bias
    classes = last.numel()
    for name in table:
        with suppress(Exception), torch.device("meta"):  # shapes without memory; a network of others may need more
            own = build_model(table, name, classes).state_dict()
            if own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in own):
                found.append(name)
    return f"{advice}: {found[0]} with {classes} classes fits" if len(found) == 1 else advice


def teacher_checkpoint(cfg: Any, option: str = TEACHER_OPTION) -> Path | None:
    """Path of the teacher's weights; ``None``: its constructor fetches them.

    Args:
        cfg: the configuration.
        option: see :func:`build_teacher`.

    Raises:
        InputError: there is no file. The message names the file and the ways to get or train it.
    """
    name = cfg.DISTILLER.TEACHER
    given = cfg.DISTILLER.TEACHER_CKPT
    entry = _model_entry(cfg, "TEACHER")
    if given == PRETRAINED or (not given and entry.pretrained):
        return None
    public = entry.weights if open_dataset(cfg).public_teachers else None
    path = Path(given or public or "").expanduser()
    if (given or public) and path.is_file():
        return path
    if given:
        not_a_folder(path)
        problem = f"teacher {name}: DISTILLER.TEACHER_CKPT {given} does not exist (seen from {Path.cwd()})"
    elif public:
        problem = f"teacher {name}: its public checkpoint {path} does not exist"
    else:
        problem = f"teacher {name} has no public checkpoint for {cfg.DATASET.TYPE} and {option} names no file"
    ways = []
    collection = public_file(public).partition("/")[0]
    if collection:
        released = COLLECTIONS[collection].megabytes
        source = f" of {TEACHER_RELEASE}" if released else ", which mdistiller's release is not known to hold,"
        ways.append(
            f"get it: sh download_ckpts.sh {collection} (by hand: unpack {collection}.tar{source} to download_ckpts/)"
        )
    recipe = training_recipe(cfg.DATASET.TYPE, name)
    if recipe:
        ways.append(f"train it: python tools/train.py --cfg {recipe}")
    else:
        ways.append(
            f"train it: python tools/train.py DISTILLER.STUDENT {name} DATASET.TYPE {cfg.DATASET.TYPE}, "
            "which writes student_last into its folder"
        )
    ways.append(f"or name another file with {option} FILE")
    raise CheckpointError("; ".join([problem, *ways]))


def training_recipe(dataset: str, student: str) -> Path | None:
    """The library's config that trains ``student`` plainly on ``dataset``, if there is one."""
    for path in sorted(CONFIGS.glob(f"{dataset}/vanilla/[!_]*.yaml")):
        tree = ConfigNode(new_allowed=True)
        tree.merge_from_file(path)
        if tree.get("DISTILLER", {}).get("STUDENT") == student:
            return path.relative_to(CONFIGS.parent)
    return None


def build_deployed(cfg: Any, num_data: int = 0) -> nn.Module:
    """The network that a run deploys, for the weights of its file: no file and no public weights are read.

    A method that deploys more than the student is built whole. The frozen weights, which are not in the student's file,
    are no numbers then, so that a network that uses them gives no numbers.

    Args:
        cfg: the configuration.
        num_data: number of training images.

    Raises:
        InputError: see :func:`build_student`.
    """
    num_classes, method = open_dataset(cfg).num_classes, distiller_dict[cfg.DISTILLER.TYPE]
    student = adapted(cfg, "STUDENT", num_classes, cfg.DISTILLER.STUDENT_CKPT == PRETRAINED, empty=True)
    if method.deployed is Distiller.deployed and not deploys_whole(method):
        return student
    teacher = adapted(cfg, "TEACHER", num_classes, empty=True) if contract_of(method).teacher else None
    networks = build_networks(cfg, num_classes, empty=True)
    distiller = build_distiller(cfg, student, teacher, num_data, networks)
    for frozen in distiller.frozen_networks().values():
        for weight in frozen.parameters():
            weight.data.fill_(float("nan"))
    return deployed_network(distiller)


def build_networks(cfg: Any, num_classes: int, empty: bool = False) -> dict[str, nn.Module]:
    """The further networks that the method declares (:attr:`Distiller.networks`), by their names.

    Fresh weights depend on the seed and on the network's name only. So a peer's weights differ from the student's.

    Raises:
        InputError: no such model; a teacher without a file; weights that do not fit.
    """
    networks = {}
    for name, role in distiller_dict[cfg.DISTILLER.TYPE].networks.items():
        key, table = name.upper(), model_table(cfg)
        model, path = cfg.DISTILLER[key] or cfg.DISTILLER[role.upper()], cfg.DISTILLER[f"{key}_CKPT"]
        if role == "teacher" and not (path or empty):
            raise InputError(f"DISTILLER.{key}_CKPT names no file; {cfg.DISTILLER.TYPE} needs the weights of {name}")
        if is_code(model) and model not in (cfg.DISTILLER.STUDENT, cfg.DISTILLER.TEACHER):
            raise InputError(f"DISTILLER.{key} {model}: a factory can be the student's or the teacher's only")
        torch.manual_seed((cfg.EXPERIMENT.SEED + zlib.crc32(name.encode())) % 2**63)
        if model == cfg.DISTILLER[role.upper()]:  # then it is built as that network is
            networks[name] = adapted(cfg, role.upper(), num_classes)
        else:
            networks[name] = build_model(table, model, num_classes)
            if is_foreign(model):
                networks[name] = with_features(networks[name], open_dataset(cfg).image_size)
        if path and not empty:
            load_network(networks[name], path, f"{name} {model}", cfg, "it must be trained on the same classes")
        if role == "teacher":
            networks[name].requires_grad_(False).eval()
    return networks


def build_distiller(
    cfg: Any,
    student: nn.Module,
    teacher: nn.Module | None = None,
    num_data: int = 0,
    networks: Mapping[str, nn.Module] | None = None,
) -> nn.Module:
    """The method of ``DISTILLER.TYPE``, with the KD term of ``DISTILLER.ADD_KD``.

    The method's contract gives the arguments of its constructor.

    Args:
        cfg: the configuration.
        student: see :func:`build_student`.
        teacher: see :func:`build_teacher`. Methods without a teacher do not get it.
        num_data: number of training images.
        networks: see :func:`build_networks`.

    Raises:
        InputError: a value out of its range. A ``cfg`` that :func:`~mdistiller.engine.cfg.load_config` did not make is
            checked here, since constructors check no ranges.
    """
    check_values(cfg)
    method = distiller_dict[cfg.DISTILLER.TYPE]
    available = {"student": student, "teacher": teacher, "cfg": cfg, "num_data": num_data, **(networks or {})}
    contract = contract_of(method)
    arguments = {name: available[source] for name, source in contract.arguments.items()}
    with hard_coded_cuda_explained(resolve_device(cfg.SOLVER.DEVICE)):
        distiller = method(*arguments.values()) if contract.by_place else method(**arguments)
    if not isinstance(getattr(distiller, "student", None), nn.Module):
        raise InputError(
            f"{where(method)}: the constructor does not store the student; it must call "
            "super().__init__(student, teacher)"
        )
    if cfg.DISTILLER.ADD_KD:
        add_kd(distiller, cfg.DISTILLER.ADD_KD, cfg.DISTILLER.ADD_KD_TEMPERATURE)
    return distiller
