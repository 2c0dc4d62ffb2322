"""The frozen network as an inference engine: fewer operations, the same numbers.

In eval mode a BatchNorm is a fixed scale and shift of each channel, so that a convolution right before it can take it
over. :class:`Folding` computes in the network's place; the network itself stays what it is: modules, names, weights and
state dict are those that a method finds, and whatever is called of it directly computes as ever.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mdistiller.models.any.probed_maps import Tap
from mdistiller.models.facts import asked

from .chain import put

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
PROBE_IMAGES = 4  # of the first batch, on which both ways of computing are compared
PROBE_TOLERANCE = 1e-3  # of each output's largest magnitude

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ASKED_OF_MODULES = [attrgetter(name) for name in ("training", *HOOKS)]

Compile = Callable[[nn.Module], Callable[..., Any]]
Pair = tuple[nn.Module, nn.Module, nn.Module]  # the twin's convolution, and what it was folded from


def fold_batch_norms(network: nn.Module, size: Sequence[int]) -> tuple[nn.Module, list[Pair]] | None:
    """A twin of the network with each BatchNorm folded into the convolution or linear layer right before it.

    One black image shows the pairs. A pair is not folded if something else reads the map between its parts (a returned
    feature, for example), if one of its parameters is trained, or if the BatchNorm keeps no statistics. The twin shares
    all other parameters and buffers with the network. So gradients reach trained parameters, and changed weights are
    used. Of the network's hooks, the twin keeps those that read its maps.

    Args:
        network: in eval mode; does not change, and does not run.
        size: of its images, ``(H, W)`` pixels.

    Returns:
        The twin and its folded pairs. ``None`` if there is nothing to fold, or if the network cannot be copied or does
        not run on such an image.
    """
    try:
        twin = _twin(network)
        with torch.no_grad(), torch.autocast(next(network.parameters()).device.type, enabled=False):
            own = dict(zip(twin.modules(), network.modules(), strict=True))
            found = [pair for pair in _probed_pairs(twin, size) if _folded(twin, *pair)]
    except Exception:  # whatever the code of a network from elsewhere raises
        return None
    pairs = [(conv, own[conv], own[norm]) for conv, norm, _ in found]
    return (twin, pairs) if pairs else None


def _twin(network: nn.Module) -> nn.Module:
    """A copy that shares the parameters and buffers, without links and without hooks of others."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    memo[id(vars(network).get("forward"))] = None
    for module in network.modules():
        for hooks in (getattr(module, name) for name in HOOKS):
            taps = {key: copy.deepcopy(hook, memo) for key, hook in hooks.items() if _is_tap(hook)}
            memo[id(hooks)] = OrderedDict(taps)
    twin = copy.deepcopy(network, memo)
    vars(twin).pop("forward", None)
    return twin


class _Probe(TorchDispatchMode):
    """Records the convolutions and batch norms that are called, and which operations read a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[nn.Module, torch.Size, Tensor]] = {}  # by the output, which is kept alive
        self.normed: list[tuple[nn.Module, Tensor]] = []
        self.calls: list[nn.Module] = []
        self.read: set[int] = set()  # outputs that others than a batch norm read
        self.inside: Tensor | None = None  # input of the batch norm that runs

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_flatten((args, kwargs))[0]
        self.read.update(id(value) for value in given if id(value) in self.made and value is not self.inside)
        return function(*args, **(kwargs or {}))

    def after_convolution(self, conv: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.calls.append(conv)
        self.made[id(output)] = conv, args[0].shape, output

    def before_norm(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.calls.append(norm)
        self.normed.append((norm, args[0]))
        self.inside = args[0]

    def after_norm(self, *_: Any) -> None:
        self.inside = None


def _probed_pairs(network: nn.Module, size: Sequence[int]) -> list[tuple[nn.Module, nn.Module, torch.Size]]:
    """Convolutions with the batch norms that alone read their outputs, and the shapes of the convolutions' inputs."""
    probe, handles = _Probe(), []
    for module in network.modules():
        if isinstance(module, CONVOLUTIONS):
            handles.append(module.register_forward_hook(probe.after_convolution))
        elif isinstance(module, NORMS):
            handles.append(module.register_forward_pre_hook(probe.before_norm))
            handles.append(module.register_forward_hook(probe.after_norm))
    before = _kept_tensors(network)
    try:
        with asked(network, size) as image, probe:
            output = network(image)
    finally:
        for handle in handles:
            handle.remove()
    if any(a is not b for a, b in zip_longest(before, _kept_tensors(network))):
        return []  # the code writes attributes of the network, which a method may read there
    probe.read.update(map(id, tree_flatten(output)[0]))
    inputs = [id(given) for _, given in probe.normed]
    pairs = []
    for norm, given in probe.normed:
        conv, shape, _ = probe.made.get(id(given), (None, None, None))
        alone = id(given) not in probe.read and inputs.count(id(given)) == 1
        if conv is not None and alone and probe.calls.count(conv) == probe.calls.count(norm) == 1:
            pairs.append((conv, norm, shape))
    return pairs


def _kept_tensors(network: nn.Module) -> list[Tensor]:
    values = (value for module in network.modules() for value in tree_flatten(vars(module))[0])
    return [value for value in values if isinstance(value, Tensor)]


def _folded(network: nn.Module, conv: nn.Module, norm: nn.Module, shape: torch.Size) -> bool:
    """Let a pair of the network's modules be the folded convolution and what is left of the batch norm.

    Args:
        network: not the user's.
        conv: its convolution.
        norm: its batch norm.
        shape: of the convolution's input.

    Returns:
        Whether the pair can be folded; otherwise it does not change.
    """
    trained = any(p.requires_grad for module in (conv, norm) for p in module.parameters())
    rest = _rest_of(norm)
    if trained or rest is None or norm.running_mean is None or "weight" not in conv._parameters:
        return False
    weight, bias = conv.weight, conv.bias
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
    trial, source = copy.deepcopy(norm), copy.copy(conv)
    source._parameters = dict(conv._parameters)
    for value in (trial.weight, trial.bias, trial.running_mean, trial.running_var):
        if value is not None:
            value.copy_(torch.rand(len(value), generator=generator) + 0.5)
    wanted = trial.forward(conv.forward(noise))
    conv.weight = nn.Parameter(torch.empty_like(weight), requires_grad=False)
    conv.bias = nn.Parameter(weight.new_empty(len(weight)), requires_grad=False)
    fold_into(conv, source, trial)
    if not _near(rest(conv.forward(noise)), wanted):  # a layer of another kind, such as one that scales its weights
        conv.weight, conv.bias = weight, bias
        return False
    fold_into(conv, source, norm)
    rest._forward_hooks.update(norm._forward_hooks)
    for module in network.modules():
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = rest
    return True


def _rest_of(norm: nn.Module) -> nn.Module | None:
    """What a batch norm does behind scale and shift: nothing, or timm's activation; ``None``: unknown."""
    if type(norm) in NORMS:
        return nn.Identity()
    parts = [getattr(norm, name, None) for name in ("drop", "act")]  # of timm's BatchNormAct2d
    return nn.Sequential(*parts) if all(isinstance(part, nn.Module) for part in parts) else None


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
    """A link for the place ``fold`` of a network's chain: computes by the twin of :func:`fold_batch_norms`.

    The network itself runs where the twin would not do the same: in training mode, while a module within the network
    has a hook of others, while autograd is to reach what was folded, and for good if the twin's outputs on the first
    images differ. Hooks on the network itself see what they always do.

    The network itself also runs while the folded weights move. A movement that torch counts is seen at the next
    call. One that torch does not count (``weight.data.mul_(0.9)``) is seen before the 1st, 2nd, 4th, 8th, ... call of
    an epoch and at the epoch's end.

    Args:
        network: in eval mode; its device, type and layout must not change any more.
        size: see :func:`fold_batch_norms`.
        compiled: makes of the twin what computes in its place.
    """

    def __init__(self, network: nn.Module, size: Sequence[int], compiled: Compile | None = None) -> None:
        self.network, self.size, self.compiled = network, size, compiled
        within = [module for module in network.modules() if module is not network]
        self.tapped = [module for module in within if any(map(_is_tap, module._forward_hooks.values()))]
        self.within = [module for module in within if module not in self.tapped]
        self.trained: list[tuple[int, bool]] | None = None
        self.take_off: Callable[[], None] | None = None  # from the chain, where this link is
        self.rests = True  # the twin may compute in this epoch
        self.moved = False  # the weights have moved in this epoch
        self.begin()

    def begin(self) -> None:
        """Fold the current weights, if they do not change. Called at the start of an epoch."""
        trained = [(id(parameter), parameter.requires_grad) for parameter in self.network.parameters()]
        if trained != self.trained:
            training = any(module.training for module in self.network.modules())
            self.twin, self.pairs = (None if training else fold_batch_norms(self.network, self.size)) or (None, [])
            self.run = self.twin if self.twin is None or self.compiled is None else self.compiled(self.twin)
            modules = [module for _, *pair in self.pairs for module in pair]
            self.parameters = [parameter for module in modules for parameter in module.parameters()]
            self.sources = [*self.parameters, *(buffer for module in modules for buffer in module.buffers())]
            self.trained, self.agrees = trained, None
        elif self.rests:
            for pair in self.pairs:
                fold_into(*pair)
        self.calls, self.changes, self.norms = 0, self._changes(), self._norms()
        self._compute_by_twin(self.rests and self.twin is not None and self.agrees is not False)

    def look(self) -> None:
        """Check whether the weights have changed since :meth:`begin`; if so, use the network's own code."""
        self.changes = self._changes()
        if not self.moved and not torch.equal(self._norms(), self.norms):
            self.rests, self.moved = False, True
            self._compute_by_twin(False)

    @property
    def active(self) -> bool:
        """Whether calls of the network use this link."""
        return self.take_off is not None

    def __call__(self, following: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.network.training or self._hooked():
            return following(*args, **kwargs)
        if torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), self.parameters)):
            return following(*args, **kwargs)
        if not torch.compiler.is_compiling():
            self.calls += 1
            if self.calls & (self.calls - 1) == 0 or self._changes() != self.changes:
                self.look()
            if self.active and self.agrees is None:
                self.agrees = self._agrees(following, args, kwargs)
                self._compute_by_twin(self.agrees)
        return self.run(*args, **kwargs) if self.active else following(*args, **kwargs)

    def _hooked(self) -> bool:
        """Whether a module within the network is in training mode or has a hook of others."""
        if any(any(map(asked, self.within)) for asked in ASKED_OF_MODULES):
            return True
        return any(
            module.training or any(not _is_tap(hook) for name in HOOKS for hook in getattr(module, name).values())
            for module in self.tapped
        )

    def _compute_by_twin(self, wanted: bool) -> None:
        if wanted and not self.active:
            self.take_off = put(self.network, "fold", self)
        elif self.active and not wanted:
            self.take_off()
            self.take_off = None

    def _agrees(self, following: Callable[..., Any], args: Any, kwargs: Any) -> bool:
        """Whether twin and network give equal outputs for the first images of a batch, in full precision."""
        like = self.sources[0]

        def probe(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value[:PROBE_IMAGES].to(like.dtype) if floating else value

        args, kwargs = [probe(a) for a in args], {k: probe(v) for k, v in kwargs.items()}
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
            try:
                ours, structure = tree_flatten(self.twin(*args, **kwargs))
            except Exception:  # the network's code reads something of a batch norm, say
                return False
            theirs, expected = tree_flatten(following(*args, **kwargs))
        return structure == expected and all(map(_near, ours, theirs))

    def _changes(self) -> int:
        return sum(map(attrgetter("_version"), self.sources))

    @torch.no_grad()
    def _norms(self) -> Tensor:
        norms = [source.float().norm() for source in self.sources if source.is_floating_point()]
        return torch.stack(norms) if norms else torch.empty(0)


def _is_tap(hook: Any) -> bool:
    return isinstance(hook, Tap)


def _near(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return isinstance(a, Tensor) == isinstance(b, Tensor) and bool(torch.as_tensor(a == b).all())
    return a.shape == b.shape and bool((a - b).abs().max() <= PROBE_TOLERANCE * b.abs().max())
