"""Listings: rows chosen by words, cut to a width."""

import pytest

from mdistiller.registry import InputError
from mdistiller.reports.listing import chosen, table

ROWS = [("NAME", "KIND"), ("MLKD (KD_ours)", "logit"), ("KD", "logit"), ("AT", "of KD's kin: feature")]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["kd"], ["KD"]),
        (["kd_OURS"], ["MLKD (KD_ours)"]),
        (["at", "KD"], ["KD", "AT"]),
        (["logit", "ours"], ROWS[1][:1]),
    ],
)
def test_rows_by_name_else_by_all_words(words, names):
    assert [row[0] for row in chosen(ROWS, words, "things")] == ["NAME", *names]


def test_no_row():
    with pytest.raises(InputError, match="nothing in the list of things matches 'KDD logit'; closest: KD"):
        chosen(ROWS, ["KDD", "logit"], "things")


def test_lines_are_cut_to_the_width():
    assert table(ROWS).splitlines()[-1] == "AT              of KD's kin: feature"
    lines = table(ROWS, 20).splitlines()
    assert lines[0] == "NAME            KIND" and lines[-1] == "AT              of …"
