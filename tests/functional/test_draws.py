"""Draws against splitmix64 written out in Python's big integers, and their statistics."""

import pytest
import torch

from mdistiller.functional import draws

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The generator's output for the state before it: Steele, Lea, Flood 2014."""
    z = (state + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def oracle(*keys: int) -> int:
    state = 0
    for key in keys:
        state = splitmix64(state ^ (key & MASK))
    return state


KEYS = [
    (0,),
    (1,),
    (-1,),
    (0, 0),
    (1, 2, 3),
    (3, 2, 1),
    (2**63 - 1, -(2**63)),
    (5, 2**64 - 1),
    (123456789, 7, 0, 49999),
]


def test_first_output_of_splitmix64():
    assert oracle(0) == 0xE220A8397B1DCDAF  # published value for seed 0


@pytest.mark.parametrize("keys", KEYS)
def test_hash_is_the_chained_finaliser(keys):
    assert int(draws.hash_keys(*keys)) & MASK == oracle(*keys)


@pytest.mark.parametrize("keys", [keys for keys in KEYS if max(keys) < 2**63])
def test_tensors_and_integers_agree(keys):
    as_tensors = draws.hash_keys(*(torch.tensor([key]) for key in keys))
    assert as_tensors.tolist() == [int(draws.hash_keys(*keys))]


def test_keys_broadcast():
    rows, columns = torch.arange(3)[:, None], torch.arange(4)
    table = draws.hash_keys(7, rows, columns)
    assert table.shape == (3, 4)
    assert int(table[2, 1]) == int(draws.hash_keys(7, 2, 1))
    assert table.unique().numel() == 12


def test_small_integer_tensors_are_widened():
    assert torch.equal(draws.hash_keys(torch.tensor([3], dtype=torch.uint8)), draws.hash_keys(torch.tensor([3])))


def test_a_hash_can_be_continued():
    index = torch.arange(5)
    whole = draws.hash_keys(1, 2, index, 4)
    assert torch.equal(draws.hash_keys(4, start=draws.hash_keys(1, 2, index)), whole)


def test_uniform_is_the_top_24_bits():
    index = torch.arange(1000)
    found = draws.uniform(1, index)
    assert found.dtype == torch.float32
    assert found.double().tolist() == [(oracle(1, i) >> 40) / 2**24 for i in range(1000)]


def test_integers_are_the_scaled_top_32_bits():
    found = draws.integers(-3, 9, 1, torch.arange(1000))
    assert found.tolist() == [-3 + ((oracle(1, i) >> 32) * 12 >> 32) for i in range(1000)]


@pytest.mark.parametrize(("low", "high"), [(3, 3), (4, 3), (0, 2**31 + 1)])
def test_integers_refuse_a_range_they_cannot_draw_from(low, high):
    with pytest.raises(ValueError, match=r"1 to 2\*\*31 values"):
        draws.integers(low, high, 0)


def test_uniform_is_uniform():
    values = draws.uniform(11, torch.arange(100_000))
    assert values.min() >= 0 and values.max() < 1
    counts = (values * 20).long().bincount(minlength=20)
    chi_squared = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_squared < 43.8  # 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("position", range(3))
def test_neighbouring_keys_are_uncorrelated(position):
    keys = [5, 6, 7]
    keys[position] = torch.arange(100_001)
    values = draws.uniform(*keys)
    correlation = torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]
    assert correlation.abs() < 4 / 100_000**0.5


def test_integers_are_equally_likely():
    counts = draws.integers(0, 7, 2, torch.arange(70_000)).bincount(minlength=7)
    assert (counts - 10_000).abs().max() < 450  # 5 standard deviations


def test_permutation():
    order = draws.permutation(1000, 3, 4)
    assert order.sort().values.tolist() == list(range(1000))
    assert torch.equal(order, draws.permutation(1000, 3, 4))
    assert (order == draws.permutation(1000, 3, 5)).sum() < 10
    assert draws.permutation(0, 1).tolist() == []


def test_the_global_generators_are_left_alone():
    before = torch.get_rng_state()
    draws.uniform(1, torch.arange(10))
    draws.permutation(10, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_same_numbers_on_the_gpu():
    index = torch.arange(10_000)
    for draw in (draws.hash_keys, draws.uniform, lambda *keys: draws.integers(0, 9, *keys)):
        assert torch.equal(draw(3, index.cuda(), 4).cpu(), draw(3, index, 4))
