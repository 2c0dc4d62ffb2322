"""A network's output whose entries are computed when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Read = Callable[[Any], Any]


def read_on_access(output: Any, read: Read) -> Any:
    """``output`` with ``read`` applied to its leaves: in tuples at once, in mappings and lists on access.

    Args:
        output: leaves in tuples, mappings and lists, such as logits and features.
        read: called at most once for each leaf.
    """
    if isinstance(output, tuple):
        return tuple(read_on_access(part, read) for part in output)
    if isinstance(output, Mapping):
        return _Features(output, read)
    if isinstance(output, list):
        return _Maps(output, read)
    return read(output)


class _Features(Mapping):
    """Features by name."""

    def __init__(self, entries: Mapping[str, Any], read: Read) -> None:
        self.entries, self.read = entries, read
        self.results: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self.results:
            self.results[key] = read_on_access(self.entries[key], self.read)
        return self.results[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _Maps(Sequence):
    """A list of feature maps. A slice of it is a plain list."""

    def __init__(self, entries: list[Any], read: Read) -> None:
        self.entries, self.read = entries, read
        self.results: dict[int, Any] = {}

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        if number not in self.results:
            self.results[number] = read_on_access(self.entries[number], self.read)
        return self.results[number]

    def __len__(self) -> int:
        return len(self.entries)
