"""Features of a network without declared features: one image shows which modules return maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError, suggestion

from .timm_maps import stages_of

DEPTH = 2  # levels of modules that are looked at; deeper ones lie within a block
NO_MAPS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Identity, nn.Flatten)


class Tap:
    """A hook that stores a module's output, or its first argument. A copied hook uses the copied store."""

    def __init__(self, store: dict[str, Tensor], name: str, given: bool = False) -> None:
        self.store, self.name, self.given = store, name, given

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.store[self.name] = arguments[0] if self.given else output


def remove_taps(module: nn.Module) -> None:
    """Take the taps off a module; other hooks stay."""
    for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, Tap)]:
        del module._forward_hooks[key]


class ProbedReader:
    """Runs a network and collects the tensors that :class:`Tap` stored.

    Args:
        store: the store of the taps.
        maps: names of the modules whose outputs are maps.
        pooled: name of the classifier; its input is the pooled features. Empty: the mean of the last map.
    """

    def __init__(self, store: dict[str, Tensor], maps: Sequence[str], pooled: str) -> None:
        self.store, self.maps, self.pooled = store, list(maps), pooled

    def __call__(
        self, network: nn.Module, forward: Callable[[Tensor], Any], image: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        logits = _logits(forward(image))
        maps = [as_map(self.store[name]) for name in self.maps]
        pooled = self.store[POOLED].flatten(1) if self.pooled else maps[-1].mean((2, 3))
        self.store.clear()  # keeps no graph alive
        return logits, maps, pooled


POOLED = "input of the classifier"


class Seen(NamedTuple):
    """A module's output that can be a map."""

    name: str
    module: nn.Module
    output: Tensor
    version: int  # of the output, which grows when it is changed in place


def reader_of(network: nn.Module, image: Tensor, maps: Sequence[str]) -> tuple[ProbedReader, list[torch.Size]]:
    """A reader of a network, and the shapes of its maps. This puts permanent hooks on the modules.

    Args:
        network: a classifier in eval mode.
        image: ``(1, 3, H, W)``, square if the network returns maps of ``(B, H, W, C)``.
        maps: names of the modules whose outputs are maps; empty: found by one image.

    Raises:
        InputError: no logits; no such module; a module without a map.
    """
    modules = dict(network.named_modules())
    for name in maps:
        if name not in modules or not name:
            raise InputError(f"{type(network).__name__} has no module {name!r}; {suggestion(str(name), modules)}")
    seen, flat, output = _probe(network, image)
    logits = _logits(output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"{type(network).__name__} must return logits (B, K), not {found}")
    # Where a convolution is the classifier, its map is no feature.
    seen = [each for each in seen if maps or not _is_mean_of(logits, each.output)]
    by_name = {each.name: each for each in seen}
    for name in maps:
        if name not in by_name:
            raise InputError(f"{type(network).__name__}: the output of {name!r} is no map (B, C, H, W) and no tokens")
    chosen = list(maps) or _stages(seen)
    if not chosen:
        raise InputError(
            f"{type(network).__name__} has no recognised maps; name the modules whose outputs are maps by maps="
        )
    if any(by_name[name].output._version != by_name[name].version for name in chosen):
        for module in network.modules():
            if getattr(module, "inplace", False):
                module.inplace = False  # the map would be overwritten by the module behind it
    classifier = next((name for name, given in reversed(flat) if given is logits), "")
    store: dict[str, Tensor] = {}
    for name in chosen:
        modules[name].register_forward_hook(Tap(store, name))
    if classifier:
        modules[classifier].register_forward_hook(Tap(store, POOLED, given=True))
    shapes = [as_map(by_name[name].output).shape for name in chosen]
    return ProbedReader(store, chosen, classifier), shapes


def _probe(network: nn.Module, image: Tensor) -> tuple[list[Seen], list[tuple[str, Tensor]], Any]:
    """Candidates for maps, candidates for logits with the names of their modules, and the network's output."""
    seen: list[Seen] = []
    flat: list[tuple[str, Tensor]] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if isinstance(module, nn.Linear) and output.ndim == 2:
            flat.append((name, output))
        if _side(output):
            seen.append(Seen(name, module, output, output._version))

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, module in network.named_modules()
        if name
    ]
    try:
        return seen, flat, network(image)
    finally:
        for handle in handles:
            handle.remove()


def _is_mean_of(logits: Tensor, output: Tensor) -> bool:
    return output.shape[:2] == logits.shape and torch.allclose(output.flatten(2).mean(2), logits)


def _stages(seen: Sequence[Seen]) -> list[str]:
    """Names of the modules that return the last map of each size. For a single size: those of repeated blocks."""
    seen = [each for each in seen if _side(each.output) > 1 and not isinstance(each.module, NO_MAPS)]
    outer = [each for each in seen if each.name.count(".") < DEPTH]
    last: dict[int, Seen] = {}
    for each in outer:
        size = _side(each.output)
        if each.output.ndim == 4 and (not last or size <= min(last)):
            last[size] = each
    if len(last) > 1:
        return [each.name for each in last.values()]
    blocks: dict[str, list[str]] = {}
    for each in seen:
        if each.output.ndim == 3:
            blocks.setdefault(each.name.rpartition(".")[0], []).append(each.name)
    names = max(blocks.values(), key=len, default=[each.name for each in last.values()])
    return [names[number] for number in stages_of([(1, 1)] * len(names))]


def _side(output: Tensor) -> int:
    """Number of positions along a side of a map or of a grid of tokens; 0 for other tensors."""
    if output.ndim == 4:
        return min(output.shape[1:3]) if _channels_are_last(output) else min(output.shape[2:])
    return math.isqrt(output.shape[1]) if output.ndim == 3 and _extra_tokens(output) is not None else 0


def _channels_are_last(output: Tensor) -> bool:
    _, a, b, c = output.shape
    return a == b != c


def _extra_tokens(tokens: Tensor) -> int | None:
    """Number of tokens before those of a square grid, at most two; ``None`` without such a grid."""
    count = tokens.shape[1]
    return next((extra for extra in range(3) if math.isqrt(count - extra) ** 2 == count - extra > 0), None)


def as_map(output: Tensor) -> Tensor:
    """A map ``(B, C, H, W)``, from such a map, from ``(B, H, W, C)``, or from tokens ``(B, N, C)`` of a square grid."""
    if output.ndim == 4:
        return output.permute(0, 3, 1, 2) if _channels_are_last(output) else output
    grid = output[:, _extra_tokens(output) :]
    return grid.mT.unflatten(2, (math.isqrt(grid.shape[1]), -1))


def _logits(output: Any) -> Any:
    """The logits of a network. Auxiliary logits may follow them in its output."""
    return output[0] if isinstance(output, tuple) and output else output
