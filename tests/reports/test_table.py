"""From results to rows, verdicts and text, against numbers worked out by hand."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
import torch

from mdistiller.reports import Plan, Summary, check_claims, render, summarize
from mdistiller.reports.plots import apart
from mdistiller.reports.table import to_csv


def make_plan(seeds=(0, 1, 2), claims=()):
    return Plan("t", Path("o"), list(seeds), {"p": {}, "q": {}}, {"KD": {}, "plain": {}}, claims=list(claims))


def row(method, top1, pair="p", seconds=(1.0,)):
    return Summary(method, pair, list(top1), list(seconds), 1200)


@pytest.mark.parametrize(
    ("top1", "mean", "std"),
    [
        ([90.0, 92.0, 97.0], 93.0, 13**0.5),  # (9 + 1 + 16) / 2
        ([90.0, 92.0], 91.0, 2**0.5),
        ([90.0], 90.0, 0.0),
    ],
)
def test_mean_and_sample_standard_deviation(top1, mean, std):
    assert row("KD", top1).mean == pytest.approx(mean)
    assert row("KD", top1).std == pytest.approx(std)


def test_summaries_come_in_the_plans_order():
    def result(method, pair, seed):
        top1 = {"KD": 90, "plain": 80}[method] + {"p": 0, "q": 5}[pair] + seed
        return {"last": {"top1": float(top1)}, "seconds": {"train": seed + 1.0}, "images_seen": 1200}

    plan = make_plan()
    keys = [(method, pair, seed) for seed in (2, 1, 0) for pair in "qp" for method in ("plain", "KD")]
    rows = summarize(plan, {key: result(*key) for key in keys})
    assert [(r.method, r.pair) for r in rows] == [("KD", "p"), ("KD", "q"), ("plain", "p"), ("plain", "q")]
    assert rows[1] == Summary("KD", "q", [95.0, 96.0, 97.0], [1.0, 2.0, 3.0], 1200)


def test_a_stage_before_training_counts_as_training():
    run = {"last": {"top1": 90.0}, "seconds": {"train": 5.0}, "images_seen": 1200}
    with_stage = run | {"preparation": {"seconds": 7.0, "from_file": True}}
    plan = make_plan()
    results = {(m, p, s): with_stage if m == "KD" else run for m in ("KD", "plain") for p in "pq" for s in (0, 1, 2)}
    assert [row.seconds for row in summarize(plan, results)] == 2 * [[12.0] * 3] + 2 * [[5.0] * 3]


def test_each_pair_has_a_row_for_its_teacher():
    def result(method, pair, seed):
        run = {"last": {"top1": 50.0}, "seconds": {"train": 1.0}, "images_seen": 1200}
        scores = {"p": 90.0, "q": 80.0 + seed}  # one file for all seeds, and one for each
        teacher = {"name": "resnet20", "sha256": f"{scores[pair]}", "top1": scores[pair]}
        return run if method == "plain" else run | {"teacher": teacher}

    plan = make_plan()
    rows = summarize(plan, {(m, p, s): result(m, p, s) for m in ("KD", "plain") for p in "pq" for s in (0, 1, 2)})
    assert [(row.method, row.pair, row.values) for row in rows[:2]] == [
        ("teacher (resnet20)", "p", [90.0]), ("teacher (resnet20)", "q", [80.0, 81.0, 82.0])
    ]  # fmt: skip
    assert render(rows).splitlines()[2].split("|")[3:8] == [" " * 16 + "90.00 ", " 0.00 ", "   1 ", " " * 14, " " * 13]
    assert [row.method for row in rows[2:]] == ["KD", "KD", "plain", "plain"]


def test_the_seconds_can_be_left_out():
    assert "training [s]" not in render(ROWS, seconds=False)
    assert render(ROWS, seconds=False).splitlines()[3].replace(" ", "") == "|plain|p|80.00|0.00|1|1,200|"


ROWS = [row("KD", [90.0, 92.0, 97.0], seconds=(10.0, 11.0, 12.4)), row("plain", [80.0])]


def test_the_table_as_text():
    assert render(ROWS).splitlines() == [
        "| method | pair | last-epoch top-1 [%] |  std |   n | training [s] | images seen |",
        "| ------ | ---- | -------------------: | ---: | --: | -----------: | ----------: |",
        "| KD     | p    |                93.00 | 3.61 |   3 |         11.1 |       1,200 |",
        "| plain  | p    |                80.00 | 0.00 |   1 |          1.0 |       1,200 |",
    ]


def test_the_table_as_csv():
    header, first, second = csv.reader(io.StringIO(to_csv(ROWS)))
    assert header[:5] == ["method", "pair", "last-epoch top-1 [%]", "std", "n"]
    assert first == ["KD", "p", "93.00", "3.61", "3", "11.1", "1,200"]
    assert second[:3] == ["plain", "p", "80.00"]


WEAK = " (weak: with 2 seeds, equal methods pass in 1 of 6 plans)"


@pytest.mark.parametrize(
    ("better", "worse", "holds", "sentence"),
    [
        ([90.0, 92.0], [88.0, 90.0], True, f"KD beats plain on p: +2.00 points, larger std 1.41{WEAK}"),
        ([90.0, 94.0], [89.0, 91.0], False, "KD does NOT beat plain on p: +2.00 points, larger std 2.83"),
        ([90.0, 92.0], [87.0, 93.0], False, "KD does NOT beat plain on p: +1.00 points, larger std 4.24"),
        ([90.0, 90.0], [90.0, 90.0], False, "KD does NOT beat plain on p: +0.00 points, larger std 0.00"),
        ([80.0, 80.0], [90.0, 90.0], False, "KD does NOT beat plain on p: -10.00 points, larger std 0.00"),
        ([95.0], [90.0, 91.0], False, "whether KD beats plain on p cannot be told from one seed"),
    ],
)
def test_a_claim_holds_above_the_larger_standard_deviation(better, worse, holds, sentence):
    plan = make_plan(claims=[("KD", "plain")])
    same = [row("KD", [91.0, 91.0], "q"), row("plain", [90.0, 90.0], "q")]
    verdicts = check_claims(plan, [row("KD", better), row("plain", worse), *same])
    assert verdicts == [(holds, sentence), (True, f"KD beats plain on q: +1.00 points, larger std 0.00{WEAK}")]


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 6])
def test_a_claim_of_few_seeds_says_how_often_chance_passes_it(seeds):
    """Drawn: two methods of one mean and one spread, in many plans."""
    one, other = torch.randn(2, 1_000_000, seeds, generator=torch.Generator().manual_seed(0))
    passes = (one.mean(1) - other.mean(1) > torch.maximum(one.std(1), other.std(1))).double().mean().item()
    values = [90.0 + seed / 10 for seed in range(seeds)]
    plan = Plan("t", Path("o"), list(range(seeds)), {"p": {}}, {"KD": {}, "plain": {}}, claims=[("KD", "plain")])
    [(holds, sentence)] = check_claims(plan, [row("KD", values), row("plain", [value - 5 for value in values])])
    said = re.search(rf"weak: with {seeds} seeds, equal methods pass in 1 of (\d+) plans", sentence)
    assert holds and bool(said) == (passes > 0.05)
    assert said is None or abs(1 / passes - int(said[1])) < 0.6


@pytest.mark.parametrize(
    ("one", "limit", "holds", "found"),
    [
        ([90.5, 94.0], 0.5, True, "+0.25 points seed by seed, std 0.35"),
        ([89.0, 94.0], 0.4, False, "-0.50 points seed by seed, std 0.71"),
        ([90.0, 94.0], 0, True, "+0.00 points seed by seed, std 0.00"),
    ],
)
def test_with_a_limit_a_claim_is_about_the_differences_of_each_seed(one, limit, holds, found):
    """The seeds themselves lie 4 points apart, which says nothing about the two ways of computing."""
    plan = Plan("t", Path("o"), [0, 1], {"p": {}}, {"KD": {}, "plain": {}}, claims=[("KD", "plain", limit)])
    verdicts = check_claims(plan, [row("KD", one), row("plain", [90.0, 94.0])])
    verdict = f"KD is {'' if holds else 'NOT '}within {limit} points of plain on p"
    assert verdicts == [(holds, f"{verdict}: {found} over 2 seeds")]


def test_one_seed_has_a_difference_without_a_spread():
    plan = Plan("t", Path("o"), [0], {"p": {}}, {"KD": {}, "plain": {}}, claims=[("KD", "plain", 0.5)])
    [(holds, sentence)] = check_claims(plan, [row("KD", [90.0]), row("plain", [90.0])])
    assert holds and sentence == "KD is within 0.5 points of plain on p: +0.00 points seed by seed"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.1, 0.5, 0.9], [0.1, 0.5, 0.9]),
        ([0.1, 0.1, 0.9], [0.1, 0.3, 0.9]),
        ([0.9, 0.95, 1.0], [0.6, 0.8, 1.0]),
        ([-0.5, 0.5], [-0.5, 0.5]),
        ([0.5] * 7, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        ([], []),
    ],
)
def test_labels_of_curves_do_not_overlap(places, expected):
    assert apart(places, 0.2) == pytest.approx(expected)
