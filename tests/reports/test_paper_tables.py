"""The papers' tables as data, and README's table that is made of them."""

import runpy

import pytest
import yaml
from cli_runner import ROOT, run_tool

from mdistiller.registry import InputError
from mdistiller.reports.readme import BEGIN, END, papers_table
from mdistiller.reports.tables import Measured, measured, paper_tables, read_tables


def test_all_tables_are_there_and_numbers_are_those_of_the_papers():
    tables = paper_tables()
    assert len(tables) == 42 and {name.split("/")[0] for name in tables} == {"vrm", "mdr", "dist_plus", "dcd"}
    assert tables["vrm/tab1"].value("VRM", 1) == 78.76
    assert tables["mdr/tab1"].value("MDR", 8) == 75.94
    assert tables["dist_plus/tab3"].value("DIST+", 2) == 73.47
    assert tables["dcd/tab8"].value("DCD+KD", 5) == 76.51
    for table in tables.values():
        assert table.facts["paper"] and table.facts["number"].startswith("Tab.") and table.rows


def test_a_number_in_the_wrong_cell_counts_as_missing():
    table = paper_tables()["vrm/tab2"]
    (row,) = (row for row in table.rows if row["method"] == "CTKD")
    assert row["values"][2] == 90.47 and table.value("CTKD", 2) is None
    with pytest.raises(InputError, match="vrm/tab2: no method 'VRN'; closest: VRM"):
        table.value("VRN", 0)


def test_printed_means_are_the_means_of_their_cells():
    """Of the eight pairs; a number that was typed wrong would show. DKD's is off in the paper."""
    table = paper_tables()["mdr/tab1"]
    for row in table.rows:
        *cells, mean = row["values"]
        assert row["method"] == "DKD" or mean == pytest.approx(sum(cells) / len(cells), abs=0.0051), row["method"]


GOOD = dict.fromkeys(("paper", "number", "where", "caption", "dataset", "metric", "conditions"), "text") | {
    "id": "mine/tab1", "direction": "higher", "columns": [{"teacher": "a"}],
    "rows": [{"method": "KD", "values": [1.0]}],
}  # fmt: skip
DOUBT = {"col": 0, "printed": "1", "status": "likely", "note": "n"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"id": "other/tab1"}, "ids begin with mine/"),
        ({"title": "t"}, r"lacks \[\], has unknown \['title'\]"),
        ({"caption": None}, "caption must be text"),
        ({"columns": [{"taecher": "a"}]}, r"column 0: .*unknown \['taecher'\]"),
        ({"rows": [{"method": "KD", "values": [1.0, 2.0]}]}, "row KD: values has 2 entries, the table 1 columns"),
        (
            {"rows": [{"method": "KD", "values": [1.0], "doubts": [DOUBT | {"status": "maybe"}]}]},
            "doubt: no 'maybe'",
        ),
        ({"rows": [{"method": "KD", "values": [1.0], "doubts": [DOUBT | {"col": 3}]}]}, "a doubt about column 3 of 1"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, wrong, message):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump([GOOD]))
    assert [table.id for table in read_tables(path)] == ["mine/tab1"]
    path.write_text(yaml.safe_dump([GOOD | wrong]))
    with pytest.raises(InputError, match=message):
        read_tables(path)


RESULT = {"dataset": "CIFAR-100", "method": "VRM", "teacher": "vgg13", "student": "vgg8", "top1": [76.0, 76.2],
          "config": "c", "device": "d", "commit": "e"}  # fmt: skip


def test_own_results_stand_beside_the_papers():
    lines = papers_table([Measured(**RESULT)]).splitlines()
    columns = lines[0].split("|")
    (line,) = (line.split("|") for line in lines if line.startswith("|vgg13→vgg8|"))
    row = dict(zip(columns, line, strict=True))
    assert (row["teacher"], row["alone"], row["VRM"], row["KD"]) == ("74.64", "70.36", "76.19/76.10±0.14", "72.98/-")
    assert (row["MDR"], row["DIST"]) == ("75.97†/-", "-/-")
    assert "MDR wrn_40_2 76.41, resnet56 73.44, " in lines[-1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"top1": []}, "top1 must be"), ({"top1": [761.0]}, "761"), ({"seed": 1}, r"unknown \['seed'\]")],
)
def test_wrong_results_are_named(tmp_path, wrong, message):
    path = tmp_path / "measured.yaml"
    path.write_text(yaml.safe_dump([RESULT]))
    assert measured(path) == [Measured(**RESULT)]
    path.write_text(yaml.safe_dump([RESULT | wrong]))
    with pytest.raises(InputError, match=message):
        measured(path)


def test_the_table_in_the_readme_is_that_of_the_data(tmp_path):
    """Else: make pages, or python tools/list.py --page README.md."""
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    assert run_tool("list", ["--page", copy]).code == 0
    assert copy.read_text() == (ROOT / "README.md").read_text()
    copy.write_text(f"{BEGIN}\n")
    outcome = run_tool("list", ["--page", copy])
    assert outcome.code == 2 and END in outcome.err


def test_the_data_is_part_of_the_package(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: given.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    files = {path for pattern in given["package_data"]["mdistiller"] for path in (ROOT / "mdistiller").glob(pattern)}
    assert set((ROOT / "mdistiller" / "reports" / "tables").glob("*.yaml")) <= files
