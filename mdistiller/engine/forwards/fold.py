"""The frozen network as an inference engine: fewer operations, the same numbers.

In eval mode a BatchNorm is a fixed scale and shift of each channel, so that a convolution right before it can take it
over. :class:`Folding` computes in the network's place; the network itself stays what it is: modules, names, weights and
state dict are those that a method finds, and whatever is called of it directly computes as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from .chain import put

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PROBE_IMAGES = 4  # of the first batch, on which both ways of computing are compared
PROBE_TOLERANCE = 1e-3  # of each output's largest magnitude

ASKED_OF_MODULES = [attrgetter(name) for name in ("training", "_forward_hooks", "_forward_pre_hooks")]

Compile = Callable[[nn.Module], Callable[..., Any]]
Pair = tuple[nn.Module, nn.Module, nn.Module]  # the convolution of the graph, and what it was folded from


def fold_batch_norms(network: nn.Module) -> tuple[fx.GraphModule, list[Pair]] | None:
    """A graph of the network with each BatchNorm folded into the convolution right before it.

    A pair is not folded if another module reads the map between its parts (a returned feature, for example), if one of
    its parameters is trained, or if the BatchNorm keeps no statistics. The graph shares all other modules with the
    network. So gradients reach trained parameters, and changed weights are used.

    Args:
        network: in eval mode; does not change.

    Returns:
        The graph and its folded pairs. ``None`` if there is nothing to fold, or if the network's code cannot be traced.
    """
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # whatever the code of a network from elsewhere raises when it meets a tracer's stand-ins
        return None
    pairs: list[Pair] = []
    for node in list(traced.graph.nodes):
        pair = _foldable(node, traced)
        if pair is None:
            continue
        before, (conv, norm) = node.args[0], pair
        name, folded = f"folded_{len(pairs)}", copy.deepcopy(conv).requires_grad_(False)
        folded.bias = nn.Parameter(conv.weight.new_empty(conv.out_channels), requires_grad=False)
        fold_into(folded, conv, norm)
        traced.add_submodule(name, folded)
        with traced.graph.inserting_before(before):
            node.replace_all_uses_with(traced.graph.call_module(name, before.args, before.kwargs))
        traced.graph.erase_node(node)
        traced.graph.erase_node(before)
        pairs.append((folded, conv, norm))
    if not pairs:
        return None
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval(), pairs


def _foldable(node: fx.Node, traced: fx.GraphModule) -> tuple[nn.Module, nn.Module] | None:
    """The convolution and the BatchNorm, if ``node`` is the latter of a pair that can be folded."""
    if node.op != "call_module" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    before = node.args[0]
    if before.op != "call_module" or len(before.users) != 1:
        return None
    conv, norm = traced.get_submodule(before.target), traced.get_submodule(node.target)
    if type(conv) not in CONVOLUTIONS or type(norm) not in NORMS or norm.running_mean is None:
        return None
    trained = any(p.requires_grad for module in (conv, norm) for p in module.parameters())
    return None if trained else (conv, norm)


@torch.no_grad()
def fold_into(folded: nn.Module, conv: nn.Module, norm: nn.Module) -> None:
    """Let ``folded(x)`` be ``norm(conv(x))``; computed in float64 and rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    folded.weight.copy_(conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1)))
    folded.bias.copy_(bias)


class Folding:
    """A link for the place ``fold`` of a network's chain: computes by the graph of :func:`fold_batch_norms`.

    The network's own code runs where the graph would not do the same: in training mode, while a module within the
    network has a hook, while autograd is to reach what was folded, and for good if the graph's outputs on the first
    images differ. Hooks on the network itself see what they always do.

    The network's own code also runs while the folded weights move. A movement that torch counts is seen at the next
    call. One that torch does not count (``weight.data.mul_(0.9)``) is seen before the 1st, 2nd, 4th, 8th, ... call of
    an epoch and at the epoch's end.

    Args:
        network: in eval mode; its device, type and layout must not change any more.
        compiled: makes of the graph what computes in its place.
    """

    def __init__(self, network: nn.Module, compiled: Compile | None = None) -> None:
        self.network, self.compiled = network, compiled
        self.within = [module for module in network.modules() if module is not network]
        self.trained: list[bool] | None = None
        self.take_off: Callable[[], None] | None = None  # from the chain, where this link is
        self.rests = True  # the graph may compute in this epoch
        self.moved = False  # the weights have moved in this epoch
        self.begin()

    def begin(self) -> None:
        """Fold the current weights, if they do not change. Called at the start of an epoch."""
        trained = [parameter.requires_grad for parameter in self.network.parameters()]
        if trained != self.trained:
            training = any(module.training for module in self.network.modules())
            self.graph, self.pairs = (None if training else fold_batch_norms(self.network)) or (None, [])
            self.run = self.graph if self.graph is None or self.compiled is None else self.compiled(self.graph)
            modules = [module for _, *pair in self.pairs for module in pair]
            self.parameters = [parameter for module in modules for parameter in module.parameters()]
            self.sources = [*self.parameters, *(buffer for module in modules for buffer in module.buffers())]
            self.trained, self.agrees = trained, None
        elif self.rests:
            for pair in self.pairs:
                fold_into(*pair)
        self.calls, self.changes, self.norms = 0, self._changes(), self._norms()
        self._compute_by_graph(self.rests and self.graph is not None and self.agrees is not False)

    def look(self) -> None:
        """Check whether the weights have changed since :meth:`begin`; if so, use the network's own code."""
        self.changes = self._changes()
        if not self.moved and not torch.equal(self._norms(), self.norms):
            self.rests, self.moved = False, True
            self._compute_by_graph(False)

    @property
    def active(self) -> bool:
        """Whether calls of the network use this link."""
        return self.take_off is not None

    def __call__(self, following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.network.training or any(any(map(asked, self.within)) for asked in ASKED_OF_MODULES):
            return following(*args, **kwargs)
        if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), self.parameters)):
            return following(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls += 1
            if self.calls & (self.calls - 1) == 0 or self._changes() != self.changes:
                self.look()
            if self.active and self.agrees is None:
                self.agrees = self._agrees(following, args, kwargs)
                self._compute_by_graph(self.agrees)
        return self.run(*args, **kwargs) if self.active else following(*args, **kwargs)

    def _compute_by_graph(self, wanted: bool) -> None:
        if wanted and not self.active:
            self.take_off = put(self.network, "fold", self)
        elif self.active and not wanted:
            self.take_off()
            self.take_off = None

    def _agrees(self, following: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Whether graph and code give equal outputs for the first images of a batch, in full precision."""
        like = self.sources[0]

        def probe(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value[:PROBE_IMAGES].to(like.dtype) if floating else value

        args, kwargs = [probe(a) for a in args], {k: probe(v) for k, v in kwargs.items()}
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            ours, structure = tree_flatten(self.graph(*args, **kwargs))
            theirs, expected = tree_flatten(following(*args, **kwargs))
        return structure == expected and all(map(_near, ours, theirs))

    def _changes(self) -> int:
        return sum(map(attrgetter("_version"), self.sources))

    @torch.no_grad()
    def _norms(self) -> Tensor:
        norms = [source.float().norm() for source in self.sources if source.is_floating_point()]
        return torch.stack(norms) if norms else torch.empty(0)


def _near(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return isinstance(a, Tensor) == isinstance(b, Tensor) and bool(torch.as_tensor(a == b).all())
    return a.shape == b.shape and bool((a - b).abs().max() <= PROBE_TOLERANCE * b.abs().max())
