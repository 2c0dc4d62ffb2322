"""Random numbers as a function of integer keys.

A draw is a hash of its keys, for example ``(seed, epoch, view, sample, slot)``. There is no generator with a hidden
state. So a draw does not depend on earlier draws, on the order or the batch of the samples, on the number of worker
processes or on the device. A run saves no state of its draws.

The hash is the finaliser of splitmix64 (Steele, Lea, Flood. Fast Splittable Pseudorandom Number Generators. OOPSLA
2014), chained over the keys. The hash is not for cryptography.

Keys are Python integers or integer tensors. Tensors broadcast against each other and lie on one device; the result lies
on that device. Integers alone give a result on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's increment and factors, as signed 64-bit numbers
FACTOR_1 = 0xBF58476D1CE4E5B9 - 2**64
FACTOR_2 = 0x94D049BB133111EB - 2**64


def hash_keys(*keys: int | Tensor, start: int | Tensor = 0) -> Tensor:
    """A 64-bit hash of the sequence of keys. All bits are usable.

    Args:
        keys: the order matters: ``(1, 2)`` and ``(2, 1)`` have different hashes.
        start: an earlier hash that this one continues: ``hash_keys(b, start=hash_keys(a))`` equals ``hash_keys(a, b)``.
            Calls whose keys begin alike can share the hash of that beginning.

    Returns:
        int64 over the whole signed range, in the keys' broadcast shape.
    """
    state = start
    for key in keys:
        state = _mix(_wrap((state ^ _plain(key)) + GOLDEN))
    return torch.as_tensor(state)


def uniform(*keys: int | Tensor, start: int | Tensor = 0) -> Tensor:
    """float32 numbers in [0, 1). They are multiples of 2**-24, hence exact and the same on every device."""
    return _shift_right(hash_keys(*keys, start=start), 40).float() * 2.0**-24


def integers(low: int, high: int, *keys: int | Tensor, start: int | Tensor = 0) -> Tensor:
    """int64 numbers in ``low .. high - 1``. The probabilities of two values differ by at most 2**-32.

    Raises:
        ValueError: the range is empty or has more than 2**31 values.
    """
    if not 0 < high - low <= 2**31:
        raise ValueError(f"integers({low}, {high}): the range must hold 1 to 2**31 values")
    return low + ((_shift_right(hash_keys(*keys, start=start), 32) * (high - low)) >> 32)


def permutation(n: int, *keys: int) -> Tensor:
    """The numbers ``0 .. n - 1`` in an order drawn by the keys, int64 ``(n,)``."""
    return hash_keys(*keys, torch.arange(n)).argsort(stable=True)


def _plain(key: int | Tensor) -> int | Tensor:
    return key.long() if isinstance(key, Tensor) else _wrap(int(key))


def _wrap(value: int | Tensor) -> int | Tensor:
    """Signed 64-bit wrap-around. int64 tensors wrap by themselves."""
    return value if isinstance(value, Tensor) else (value + 2**63) % 2**64 - 2**63


def _shift_right(value: int | Tensor, bits: int) -> int | Tensor:
    """Logical shift. ``>>`` of a negative number fills in ones; the mask removes them."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(state: int | Tensor) -> int | Tensor:
    """splitmix64's finaliser, a bijection of the 64-bit numbers."""
    state = _wrap((state ^ _shift_right(state, 30)) * FACTOR_1)
    state = _wrap((state ^ _shift_right(state, 27)) * FACTOR_2)
    return state ^ _shift_right(state, 31)
