"""Contact sheets: what stands where on them, and the command that draws them."""

import pytest
import torch
from cli_runner import run_tool
from PIL import Image

from mdistiller.analysis.sheets import GAP, class_sheet, contact_sheet, operation_sheet, stacked, view_sheet
from mdistiller.dataset import Split, dataset_dict
from mdistiller.dataset.randaugment import TRANSFORMS, transform_images

DIGITS = dataset_dict["digits"]
SPLIT = Split(torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 10)


def cell(sheet, line, column_from_right, columns, size=16, zoom=4):
    """The image in a cell, at its own size; columns are counted from the right border, where the margin is not."""
    step = size * zoom + GAP
    left, top = sheet.width - step * (columns - column_from_right), 22 + line * step
    picture = sheet.crop((left, top, left + size * zoom, top + size * zoom)).resize(
        (size, size), Image.Resampling.NEAREST
    )
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def test_images_stand_where_they_belong():
    sheet = contact_sheet([("one", SPLIT.images.pixels()[:3]), ("a longer name", SPLIT.images.pixels()[3:6])], "title")
    for i in range(6):
        assert torch.equal(cell(sheet, i // 3, i % 3, 3), SPLIT.images.pixels()[i])


def test_operations_at_their_strengths():
    sheet = operation_sheet(DIGITS, SPLIT, count=1)
    names = [transform.name for transform in TRANSFORMS]
    position = names.index("Brightness")
    for column, level in enumerate([0.0, 0.25, 0.5, 0.75]):
        expected = transform_images(SPLIT.images.pixels()[:1], torch.tensor([position]), torch.tensor([level]))[0]
        assert torch.equal(cell(sheet, 1 + position, column, 5), expected)


def test_every_view_and_class_has_its_line():
    views = view_sheet(DIGITS, SPLIT, count=4, epochs=2)
    assert views.height == 22 + (1 + 2 * len(DIGITS.views)) * (64 + GAP)
    classes = class_sheet(DIGITS, SPLIT, count=2, classes_in_row=5)
    assert torch.equal(cell(classes, 1, 3, 10), SPLIT.images.pixels()[16])  # the second image of class 6
    both = stacked([views, classes])
    assert both.size == (max(views.width, classes.width), views.height + classes.height)


def test_the_command_writes_a_picture(tmp_path):
    path = tmp_path / "sheet.png"
    out = run_tool("views", ["-d", "digits", "-o", str(path), "-s", "views", "DATASET.IMAGE_SIZE", "8"])
    assert out.code == 0
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "digit", "-o", "a.png"], "closest: digits"),
        (["-d", "digits", "-o", "no/a.png"], "cannot write no/a.png"),
    ],
)
def test_what_a_user_gets_wrong(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_tool("views", [*arguments, "-s", "classes"])
    assert result.code == 2
    assert says in result.err
