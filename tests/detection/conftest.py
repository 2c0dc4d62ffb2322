"""A small copy of the miniature, and configurations for it."""

import os

import pytest

from mdistiller.detection import minicoco


@pytest.fixture(scope="session")
def small_minicoco(tmp_path_factory):
    """The folder of data sets, with 24 training pictures and 8 test pictures."""
    root, splits = tmp_path_factory.mktemp("data"), dict(minicoco.SPLITS)
    minicoco.SPLITS.update(train=(24, 0), test=(8, 1))
    minicoco.write(root / "minicoco")
    minicoco.SPLITS.update(splits)
    return root


@pytest.fixture(autouse=True)
def folders(small_minicoco, tmp_path, monkeypatch):
    """Data from the small copy; runs go to the test's own folder."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(small_minicoco))
    monkeypatch.chdir(tmp_path)
    assert os.environ["DETECTRON2_DATASETS"]
