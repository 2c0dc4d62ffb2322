"""Replaces a network's ``forward`` by a chain of links. No other file replaces a ``forward``.

A link is called as ``link(following, *args, **kwargs)``. ``following`` is the next link; after the last link it is the
network itself, which may be compiled in place. Links are independent. Without links a network is unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

from torch import nn

Link = Callable[..., Any]

ORDER = (
    "listen",  # records each call and its output as the method sees them: whole batches, also cached outputs
    "cache",  # returns cached outputs; the following links compute the other outputs
    "share",  # divides a pass among processes
    "fold",  # computes by the folded twin
)


class Chain:
    """A network's links. Within one place of :data:`ORDER`, the last added link is called first.

    Args:
        network: its ``forward`` is the chain while there are links.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.name = network, _called(network)
        self.before, self.itself = vars(network).get(self.name), getattr(network, self.name)
        self.links: list[tuple[int, Link]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.first(*args, **kwargs)

    def put(self, place: str, link: Link) -> None:
        self._join(sorted([(ORDER.index(place), link), *self.links], key=itemgetter(0)))
        if len(self.links) == 1:
            setattr(self.network, self.name, self)

    def take_off(self, link: Link) -> None:
        self._join([pair for pair in self.links if pair[1] is not link])
        if not self.links and vars(self.network).get(self.name) is self:  # no other code has replaced the chain
            delattr(self.network, self.name)
            if self.before is not None:
                setattr(self.network, self.name, self.before)

    def _join(self, links: list[tuple[int, Link]]) -> None:
        self.links, self.first = links, self.itself
        for _, link in reversed(links):
            self.first = partial(link, self.first)


def _called(network: nn.Module) -> str:
    """The attribute that a call of the network calls. Code that was compiled in place must not see the links."""
    return "forward" if network._compiled_call_impl is None else "_compiled_call_impl"


def put(network: nn.Module, place: str, link: Link) -> Callable[[], None]:
    """Add a link to a network.

    Args:
        network: any.
        place: of :data:`ORDER`.
        link: see the top of the file.

    Returns:
        A function that removes the link.
    """
    chain = vars(network).get(_called(network))
    chain = chain if isinstance(chain, Chain) else Chain(network)
    chain.put(place, link)
    return partial(chain.take_off, link)


@contextmanager
def linked(network: nn.Module, place: str, link: Link) -> Iterator[None]:
    """Context in which a network has a link; see :func:`put`."""
    take_off = put(network, place, link)
    try:
        yield
    finally:
        take_off()


def networks_of(distiller: nn.Module) -> list[nn.Module]:
    """Student, further networks and frozen ones, each once, in the order of their names."""
    names = {"student", *type(distiller).networks, *distiller.frozen_networks()}
    return list(dict.fromkeys(getattr(distiller, name) for name in sorted(names)))
