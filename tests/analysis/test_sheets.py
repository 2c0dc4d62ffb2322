"""Contact sheets: what stands where on them, and the command that draws them."""

from pathlib import Path

import pytest
import torch
from cli_runner import run_tool
from PIL import Image

from mdistiller.analysis.sheets import GAP, HEAD, class_sheet, contact_sheet, operation_sheet, page, view_sheet
from mdistiller.dataset import Split, dataset_dict
from mdistiller.dataset.randaugment import TRANSFORMS, transform_images

DIGITS = dataset_dict["digits"](Path())
SPLIT = Split(torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8), torch.arange(40) % 10)
PICTURES = SPLIT.images.pixels()


def found_at(sheet, image, size=16, zoom=4):
    """Upper left corners of the places where the sheet shows an image, at four times its size."""
    whole = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    corner = (whole[: -size * zoom, : -size * zoom] == image[:, 0, 0]).all(-1).nonzero().tolist()
    large = image.permute(1, 2, 0).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    return [(y, x) for y, x in corner if torch.equal(whole[y : y + size * zoom, x : x + size * zoom], large)]


def test_images_stand_where_they_belong():
    rows = [
        ("one", [(image, "") for image in PICTURES[:3]]),
        ("a longer name", [(image, "x") for image in PICTURES[3:6]]),
    ]
    places = [found_at(contact_sheet(rows, "title"), image) for image in PICTURES[:6]]
    assert all(len(place) == 1 for place in places)
    tops, lefts = zip(*[place for (place,) in places], strict=True)
    assert tops == (HEAD,) * 3 + (HEAD + 64 + GAP,) * 3
    assert lefts[:3] == lefts[3:] == tuple(lefts[0] + column * (64 + GAP) for column in range(3))


def test_operations_at_their_strengths_and_once_where_they_have_none():
    sheet = operation_sheet(DIGITS, SPLIT, count=1)
    position = [transform.name for transform in TRANSFORMS].index("Brightness")
    for level in (0.0, 0.25, 0.5, 0.75):
        expected = transform_images(PICTURES[:1], torch.tensor([position]), torch.tensor([level]))[0]
        assert len(found_at(sheet, expected)) == 1
    # As it is: Identity once, and the middle or the end of others, such as a rotation by nothing.
    tops = [top for top, _ in found_at(sheet, PICTURES[0])]
    assert len(tops) == len(set(tops))


def test_a_view_is_shown_once_where_it_stays_the_same():
    views = view_sheet(DIGITS, SPLIT, count=4, epochs=2)
    assert len(found_at(views, PICTURES[0])) == 1  # as it is, plain in two epochs, and the test view
    random = len(DIGITS.views) - len({"plain", "test"} & set(DIGITS.views))
    assert views.height == pytest.approx(HEAD + (1 + 2 * random) * (64 + GAP), abs=30)


def test_every_class_and_no_more_than_a_page_of_them():
    classes = class_sheet(DIGITS, SPLIT, count=2, classes_in_row=5)
    tops = [found_at(classes, image)[0][0] for image in PICTURES[:20]]
    assert len(set(tops[:5] + tops[10:15])) == 1 and tops[5] > tops[0]
    many = Split(torch.zeros(300, 3, 8, 8, dtype=torch.uint8), torch.arange(300))
    kind = type("Many", (), {"num_classes": 300, "classes": [str(n) for n in range(300)], "name": "many"})
    assert class_sheet(kind, many).height < 1000


def test_sheets_fill_a_page():
    wide, one, other = Image.new("RGB", (1400, 120)), Image.new("RGB", (600, 900)), Image.new("RGB", (800, 1000))
    assert page([wide, one, other]).size == (1400, 1120)
    assert page([one]).size == one.size


@pytest.mark.parametrize(("name", "kind"), [("sheet.png", "PNG"), ("sheet.jpg", "JPEG"), ("sheet.JPEG", "JPEG")])
def test_the_command_writes_a_picture(tmp_path, name, kind):
    out = run_tool("views", ["-d", "digits", "-o", tmp_path / name, "-s", "views", "DATASET.IMAGE_SIZE", "8"])
    assert out.code == 0
    assert Image.open(tmp_path / name).format == kind


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-d", "digit", "-o", "a.png"], "closest: digits"),
        (["-d", "digits", "-o", "no/a.png"], "cannot write no/a.png"),
        (["-d", "digits", "-o", "a.gif"], "-o: a.gif must end in .png or .jpg or .jpeg"),
        (["-d", "digits", "-o", "a"], "-o: a must end in .png"),
    ],
)
def test_what_a_user_gets_wrong(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run_tool("views", [*arguments, "-s", "classes"])
    assert result.code == 2
    assert says in result.err
