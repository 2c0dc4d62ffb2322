"""The frozen teacher as an inference engine: fewer operations, the same numbers.

In eval mode a BatchNorm is a fixed scale and shift of each channel, so that a convolution right before it can take it
over. :class:`FoldedForward` stands in for the network's ``forward``; the network itself stays what it is: modules,
names, weights and state dict are those that a method finds, and whatever is called of it directly computes as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PROBE_IMAGES = 4  # of the first batch, on which both ways of computing are compared
PROBE_TOLERANCE = 1e-3  # of each output's largest magnitude


def fold_batch_norms(network: nn.Module) -> tuple[fx.GraphModule, list[Tensor]] | None:
    """A graph of the network in which convolutions have taken over the BatchNorms right behind them.

    A pair stays as it is where something else reads the map between its two parts (a feature that is returned, say),
    where a parameter of it is trained, and where the BatchNorm keeps no statistics. All that is not folded is shared
    with the network, so that gradient reaches what is trained, and weights that move are used as they are.

    Args:
        network: in eval mode; stays as it is.

    Returns:
        The graph, and what its folded weights were computed from. ``None`` where there is nothing to fold, or where
        the network's code cannot be traced.
    """
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # whatever the code of a network from elsewhere raises when it meets a tracer's stand-ins
        return None
    sources: list[Tensor] = []
    for node in list(traced.graph.nodes):
        pair = _foldable(node, traced)
        if pair is None:
            continue
        before, (conv, norm) = node.args[0], pair
        name = f"folded_{len(sources)}"
        traced.add_submodule(name, _fold(conv, norm))
        with traced.graph.inserting_before(before):
            folded = traced.graph.call_module(name, before.args, before.kwargs)
        node.replace_all_uses_with(folded)
        traced.graph.erase_node(node)
        traced.graph.erase_node(before)
        sources += [*conv.parameters(), *norm.parameters(), norm.running_mean, norm.running_var]
    if not sources:
        return None
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced.eval(), sources


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
def _fold(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """``norm(conv(x))`` as one convolution; computed in float64 and rounded once."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.double()
    weight = conv.weight.double() * scale.view(-1, *[1] * (conv.weight.ndim - 1))
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)  # in the layout that it had
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
    return folded


class FoldedForward:
    """Stands in for ``network.forward`` and computes by the graph of :func:`fold_batch_norms`.

    The network's own code runs where the graph would not do the same: in training mode, while a module of it has a
    hook, and for good if the graph's outputs on the first images differ or if the weights that were folded have moved.
    Whether they have is looked at before the 2nd, 4th, 8th, ... call, and whenever torch has counted a change in
    place; a teacher that a method's code moves after each step is seen to move at once.

    Args:
        network: its device, type and layout must not change any more.
        graph, sources: what :func:`fold_batch_norms` gave.
    """

    def __init__(self, network: nn.Module, graph: fx.GraphModule, sources: list[Tensor]) -> None:
        self.original = network.forward
        self.network, self.graph, self.sources = network, graph, sources
        self.run: Callable[..., Any] = graph
        self.modules = list(network.modules())
        self.changes, self.norms = self._changes(), self._norms()
        self.calls = 0
        self.holds = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.holds or any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self.modules):
            return self.original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls += 1
            if self.calls == 1:
                self.holds = self._agrees(*args, **kwargs)
            elif self.calls & (self.calls - 1) == 0 or self._changes() != self.changes:
                self.changes = self._changes()
                self.holds = torch.equal(self._norms(), self.norms)
        return self.run(*args, **kwargs) if self.holds else self.original(*args, **kwargs)

    def _agrees(self, *args: Any, **kwargs: Any) -> bool:
        """Whether graph and code give the same for the first images of a batch, in full precision."""
        like = self.sources[0]

        def probe(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value[:PROBE_IMAGES].to(like.dtype) if floating else value

        args, kwargs = [probe(a) for a in args], {k: probe(v) for k, v in kwargs.items()}
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            ours, structure = tree_flatten(self.graph(*args, **kwargs))
            theirs, expected = tree_flatten(self.original(*args, **kwargs))
        return structure == expected and all(map(_near, ours, theirs))

    def _changes(self) -> int:
        return sum(source._version for source in self.sources)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        return torch.stack([source.float().norm() for source in self.sources])


def _near(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return isinstance(a, Tensor) == isinstance(b, Tensor) and bool(torch.as_tensor(a == b).all())
    return a.shape == b.shape and bool((a - b).abs().max() <= PROBE_TOLERANCE * b.abs().max())


def speed_up_teacher(teacher: nn.Module) -> None:
    """Have the teacher compute by its folded graph from now on, where that is possible.

    Args:
        teacher: in eval mode and where it will stay; what a method trains of it says so by ``requires_grad``.
    """
    found = None if any(module.training for module in teacher.modules()) else fold_batch_norms(teacher)
    if found is not None:
        teacher.forward = FoldedForward(teacher, *found)
