"""VOC's layout and its average precision."""

import types

import pytest
import torch
from PIL import Image

from mdistiller.detection import cfg as config
from mdistiller.detection.data import Pictures
from mdistiller.detection.run import test_data as data_of_test
from mdistiller.detection.run import training_data
from mdistiller.detection.task import VOCDetection, task_of
from mdistiller.detection.voc import average_precision, scores
from mdistiller.registry import InputError


@pytest.mark.parametrize("eleven, expected", [(True, (4 * 1 + 3 * 2 / 3) / 11), (False, 1 / 3 + 2 / 3 / 3)])
def test_average_precision_by_hand(eleven, expected):
    """Found, missed, found, and a third object that nothing finds: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    assert average_precision([True, False, True], 3, eleven) == pytest.approx(expected)
    assert average_precision([], 3, eleven) == 0
    assert average_precision([True], 1, eleven) == pytest.approx(1)


def picture(id, boxes, labels, difficult=None):
    flags = torch.tensor(difficult or [False] * len(labels))
    return types.SimpleNamespace(id=id, boxes=torch.tensor(boxes), labels=torch.tensor(labels), difficult=flags)


def detections(*rows):
    boxes, labels, values = zip(*rows, strict=True)
    return {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels), "scores": torch.tensor(values)}


def test_an_object_is_found_once_and_difficult_ones_do_not_count():
    box, far = [0.0, 0, 10, 10], [50.0, 50, 60, 60]
    pictures = [picture(1, [box, far], [1, 1], [False, True]), picture(2, [box], [2])]
    found = {1: detections((box, 1, 0.9), (box, 1, 0.8), (far, 1, 0.95)), 2: detections(([0.0, 0, 10, 7.6], 2, 0.5))}
    result = scores(pictures, found, True)
    assert result["AP50"] == pytest.approx(100)
    assert result["AP75"] == pytest.approx(100)  # 0.76
    assert result["AP"] == pytest.approx(100 * (1 + 6 / 10) / 2)  # class 2 up to 0.75, six of ten thresholds
    assert scores(pictures, {}, True)["AP50"] == 0


@pytest.fixture
def devkit(tmp_path, monkeypatch):
    """Two pictures of VOC 2007 and one of 2012."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for year, stems in ((2007, ("000001", "000002")), (2012, ("2008_000001",))):
        folder = tmp_path / f"VOC{year}"
        for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / name).mkdir(parents=True)
        for split in ("trainval", "test"):
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / f"{stem}.jpg")
            entry = (
                "<object><name>dog</name><difficult>1</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>40</xmax>"
                "<ymax>30</ymax></bndbox></object>"
            )
            size = "<size><width>40</width><height>30</height><depth>3</depth></size>"
            (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{entry}</annotation>")
    return tmp_path


def test_the_layout_is_read(devkit):
    data = Pictures("voc_2007_test")
    assert (len(data), len(data.names), data.names[11]) == (2, 20, "dog")
    first = data.pictures[0]
    assert first.boxes.tolist() == [[0, 1, 40, 30]] and first.labels.tolist() == [12] and first.difficult.all()
    assert isinstance(task_of(data), VOCDetection) and task_of(data).headline.name == "AP50"


def test_two_years_are_trained_on_together(devkit):
    cfg = config.load("configs/VOC/VOC-R18.yaml")
    assert (len(training_data(cfg)), len(data_of_test(cfg))) == (3, 2)


def test_broken_annotations_are_refused(devkit):
    (devkit / "VOC2007" / "Annotations" / "000002.xml").write_text("<annotation>")
    with pytest.raises(InputError, match=r"000002\.xml is no annotation of VOC"):
        Pictures("voc_2007_test")
    with pytest.raises(InputError, match="no list of pictures"):
        Pictures("voc_2012_val")
