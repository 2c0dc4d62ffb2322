"""A miniature CIFAR-100 in the true on-disk format, for tests that go through the files."""

import pickle
from pathlib import Path

import numpy as np

NUM_CLASSES = 100


def write_mini_cifar100(root: Path, train_per_class: int = 4, test_per_class: int = 2) -> Path:
    """Write ``root/cifar-100-python/{train,test,meta}`` and return the folder.

    Each class is a fixed colour pattern of 4x4 tiles plus noise, so that a network can learn it.
    """
    folder = Path(root) / "cifar-100-python"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    tiles = rng.integers(0, 256, (NUM_CLASSES, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    for name, per_class in (("train", train_per_class), ("test", test_per_class)):
        labels = rng.permutation(np.arange(NUM_CLASSES).repeat(per_class))
        noise = rng.integers(-30, 31, (len(labels), 3, 32, 32))
        images = (tiles[labels] + noise).clip(0, 255).astype(np.uint8)
        entry = {
            "filenames": [f"{name}_{i}.png" for i in range(len(labels))],
            "batch_label": f"{name}ing batch 1 of 1",
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels // 5).tolist(),
            "data": images.reshape(len(labels), 3 * 32 * 32),
        }
        (folder / name).write_bytes(dumps_like_the_original(entry))
    meta = {
        "fine_label_names": [f"class_{i}" for i in range(NUM_CLASSES)],
        "coarse_label_names": [f"group_{i}" for i in range(20)],
    }
    (folder / "meta").write_bytes(dumps_like_the_original(meta))
    return folder


def dumps_like_the_original(entry: dict) -> bytes:
    """Protocol 2 and numpy's old module names, as in files of Python 2."""
    return pickle.dumps(entry, protocol=2).replace(b"cnumpy._core.", b"cnumpy.core.")
