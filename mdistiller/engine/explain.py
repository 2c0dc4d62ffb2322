"""Messages for broken contracts: batches, networks and methods that the trainer cannot use.

The library's loaders, networks and methods never break a contract. Those of a script or of another project may.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.contract import contract_of, where
from mdistiller.messages import say, warn
from mdistiller.registry import InputError

from .processes import distributed


def read_output(distiller: nn.Module, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits and the losses that ``forward_train`` returned.

    A method file of another project may return more values. They are dropped, and a notice says so once.

    Raises:
        InputError: ``forward_train`` returned anything else; names the file, the returned and the expected values.
    """
    method = type(distiller)
    if isinstance(output, (tuple, list)) and len(output) > 2 and "declared" not in vars(method):
        _say_dropped(method, len(output))
        output = output[:2]
    if not (isinstance(output, (tuple, list)) and len(output) == 2):
        raise _returned(method, f"{len(output)} values" if isinstance(output, (tuple, list)) else type(output).__name__)
    logits, losses = output
    if not isinstance(logits, Tensor):
        raise _returned(method, f"{type(logits).__name__} instead of the logits")
    if not (isinstance(losses, Mapping) and losses):
        raise _returned(method, f"{losses!r:.80} instead of the losses")
    for name, loss in losses.items():
        if not (isinstance(loss, Tensor) and loss.is_floating_point()):
            raise _returned(method, f"the loss {name!r} as {type(loss).__name__}")
    if torch.is_grad_enabled() and not any(loss.requires_grad for loss in losses.values()):
        raise _returned(method, f"losses without gradient ({', '.join(map(str, losses))})")
    return logits, losses


def _returned(method: type, returned: str) -> InputError:
    return InputError(
        f"{where(method)}: forward_train returned {returned}; it must return the student's logits, a tensor (B, K), "
        "and the weighted losses by name, a dictionary of tensors (); at least one needs a gradient"
    )


@functools.cache
def _say_dropped(method: type, values: int) -> None:
    say(f"{where(method)}: forward_train returns {values} values; all but the logits and the losses are dropped")


def check_logits(distiller: nn.Module, logits: Tensor, target: Tensor, outputs: int) -> None:
    """Refuse logits of a shape that gives no training accuracy.

    Args:
        distiller: the method.
        logits: the logits that the method returned.
        target: the batch's labels.
        outputs: number of the student's logits; 0: not known.

    Raises:
        InputError: names the file and both shapes.
    """
    rows = len(target)
    if logits.ndim < 2 or len(logits) != rows or (outputs and logits.shape[1] != outputs):
        raise _returned(type(distiller), f"logits {tuple(logits.shape)} for {rows} images and {outputs or 'K'} classes")


def check_gradients(distiller: nn.Module, losses: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Print a notice of losses without gradient, and warn of trainable tensors that the optimiser does not hold.

    PyTorch does not see a module in a plain list: the module is not trained, moved to the device, saved or loaded.
    """
    method = where(type(distiller))
    constant = [name for name, loss in losses.items() if not loss.requires_grad]
    if constant:
        say(f"{method}: nothing is learned from {', '.join(constant)}, which has no gradient in the first step")
    if not any(bool(loss.detach().any()) for loss in losses.values()):
        warn(f"{method}: every loss is 0 in the first step, so nothing is learned; are all weights 0?")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    lost = [p for p in _leaves(losses.values()) if id(p) not in held]
    if lost:
        names = _names_of(distiller)
        tensors = ", ".join(sorted({names.get(id(p), f"a tensor {tuple(p.shape)}") for p in lost}))
        warn(
            f"{method}: the losses depend on {tensors}, which the optimiser does not hold, so its values do not "
            "change. Make a list of modules an nn.ModuleList, a tensor an nn.Parameter of the method, and let "
            "get_learnable_parameters() return them"
        )


def _leaves(losses: Iterable[Tensor]) -> list[Tensor]:
    """The trainable tensors in the graph of the losses."""
    nodes, seen, leaves = [loss.grad_fn for loss in losses], {None}, []
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                leaves.append(node.variable)
    return leaves


def _names_of(distiller: nn.Module) -> dict[int, str]:
    """Names by ``id``: of the method's parameters, and of tensors in attributes that PyTorch does not register."""
    names = {}
    for name, value in vars(distiller).items():
        if name.startswith("_"):
            continue
        entries = value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
        for entry in entries:
            tensors = entry.parameters() if isinstance(entry, nn.Module) else [entry]
            names |= {id(tensor): f"self.{name}" for tensor in tensors if isinstance(tensor, Tensor)}
    return names | {id(p): name for name, p in distiller.named_parameters()}


@contextmanager
def contract_explained(distiller: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Context of a method's step: explains errors that a batch without a field or a network's wrong output causes.

    Args:
        distiller: the method.
        inputs: the arguments of ``forward_train``.

    Raises:
        InputError: in place of Python's error.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        method = type(distiller).__name__
        lacking = [name for name in contract_of(type(distiller)).required if name not in inputs]
        if lacking:
            raise InputError(
                f"{method} reads {', '.join(lacking)}, and the training batches hold "
                f"{', '.join(name for name in inputs if name != 'epoch')}; see mdistiller/engine/batch.py"
            ) from error
        images = next((value for name, value in inputs.items() if name.startswith("image")), None)
        for role in ("student", "teacher"):
            net = getattr(distiller, role, None)
            if net is not None and images is not None:
                _check_output(net, role, method, images, error)
        raise


def _check_output(net: nn.Module, role: str, method: str, images: Tensor, error: Exception) -> None:
    """Refuse an output that breaks ``mdistiller/models/_features.py`` or lacks the feature of the KeyError."""
    with torch.no_grad():
        output = net(images)
    what, advice = f"the {role} ({type(net).__name__})", "see mdistiller/models/_features.py"
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], Mapping)):
        raise InputError(
            f"{what} returns {type(output).__name__}; a network must return (logits, features), and features must be "
            f"a dictionary: {advice}"
        ) from error
    key = error.args[0] if isinstance(error, KeyError) and error.args else None
    if key in ("feats", "preact_feats", "pooled_feat") and key not in output[1]:
        raise InputError(
            f"{method} reads features[{key!r}], which {what} does not return; it has {list(output[1])}: {advice}"
        ) from error


def check_batches(distiller: nn.Module, loader: Any, batch_norm_over: str = "local") -> None:
    """Refuse an epoch without steps, and a last batch that is too small.

    With BatchNorm, a batch needs two images. With several processes, each process needs an image of every batch, and
    two images if BatchNorm takes its statistics from the process's own images (``batch_norm_over`` ``"local"``).

    Raises:
        InputError: says which key to change.
    """
    if not len(loader):
        raise InputError(
            "an epoch has no step: there are fewer training images than SOLVER.BATCH_SIZE and SOLVER.DROP_LAST "
            "is on; lower SOLVER.BATCH_SIZE or turn SOLVER.DROP_LAST off"
        )
    world = distributed.world_size()
    if world > 1 and getattr(loader, "share", (0, 1))[1] != world:
        raise InputError(
            f"{world} processes train, but the training batches are not divided among them; call "
            "mdistiller.engine.processes.distributed.start() first, then build_loaders or get_dataset"
        )
    smallest = getattr(loader, "last_batch_size", None)
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in distiller.student.modules())
    if world > 1 and smallest < world * (2 if batch_norm and batch_norm_over == "local" else 1):
        raise InputError(
            f"the last batch of an epoch holds {smallest} images ({loader.num_data} training images, SOLVER.BATCH_SIZE "
            f"{loader.batch_size}), too few for {world} processes: each process needs one image, or two for BatchNorm "
            "with SOLVER.BATCH_NORM local; use another SOLVER.BATCH_SIZE, SOLVER.BATCH_NORM sync, or set "
            "SOLVER.DROP_LAST True"
        )
    if smallest == 1 and batch_norm:
        raise InputError(
            f"the last batch of an epoch holds a single image ({loader.num_data} training images, "
            f"SOLVER.BATCH_SIZE {loader.batch_size}), and BatchNorm cannot compute statistics from one image; "
            "use another SOLVER.BATCH_SIZE, at least 2, or set SOLVER.DROP_LAST True"
        )
