"""Timings are taken in turns, and ratios round by round."""

import pytest
import torch

from mdistiller.bench.measure import Sample, Spread, interleaved, machine, ratios


def test_cases_take_turns_and_the_warm_up_does_not_count():
    calls = []
    samples = interleaved({name: lambda name=name: calls.append(name) for name in "ABC"}, rounds=3, warmup=1)
    assert "".join(calls) == "ABC" + "CBA" + "ABC" + "CBA"
    assert {name: len(found) for name, found in samples.items()} == {"A": 3, "B": 3, "C": 3}


def test_busy_time_is_on_both_clocks_and_the_devices_end_is_waited_for():
    waited = []
    samples = interleaved({"sum": lambda: sum(range(300_000))}, 2, synchronize=lambda: waited.append(1))
    assert len(waited) == 2 * 3
    assert all(0 < sample.cpu <= sample.wall * 1.5 + 0.02 for sample in samples["sum"])


def test_ratios_are_of_the_same_round():
    own, other = [Sample(2, 20), Sample(40, 400), Sample(6, 60)], [Sample(1, 5), Sample(10, 50), Sample(2, 10)]
    assert ratios(own, other, "wall") == Spread(3, 2.5, 3.5)  # of 2, 4, 3
    assert ratios(own, other, "cpu") == Spread(6, 5, 7)


@pytest.mark.parametrize("values, expected", [([3.0], (3, 3, 3)), ([1.0, 2.0], (1.5, 1, 2)), ([4.0, 1, 2, 3], None)])
def test_median_and_quartiles(values, expected):
    spread = Spread.of(values)
    assert (spread.median, spread.low, spread.high) == (expected or (2.5, 1.75, 3.25))


def test_the_machine_is_described():
    facts = machine(torch.device("cpu"))
    assert facts["threads"] == torch.get_num_threads() and facts["cores"] >= 1
    assert facts["device"] == "cpu" and facts["processor"] and facts["torch"] == torch.__version__
