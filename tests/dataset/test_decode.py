"""Files of all kinds as pictures: what is decoded, how it is turned and scaled, and once for all views."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as official

from mdistiller.dataset import build_loaders
from mdistiller.dataset.base import Split
from mdistiller.dataset.decode import Cut, Encoded, cut_views, window
from mdistiller.dataset.files import InFiles, RandomResizedCrop, ResizeAndCentreCrop
from mdistiller.dataset.folder import PHOTOGRAPHS
from mdistiller.dataset.images import InMemory
from mdistiller.dataset.loader import BatchedImages, Loader
from mdistiller.dataset.views import Draws, apply_view, apply_views
from mdistiller.registry import InputError

LEFT, RIGHT = (220, 40, 40), (30, 60, 200)


def picture(width=40, height=30):
    """Red at the left, blue at the right, a bright line at the top."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :], pixels[: height // 5] = LEFT, RIGHT, 240
    return Image.fromarray(pixels)


def smooth(width, height):
    grid = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(0)) * 255
    pixels = F.interpolate(grid, (height, width), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    return Image.fromarray(pixels.byte().numpy())


def decoded(path, photographs=True):
    return InFiles([str(path)], 8, photographs=photographs)


def pixels_of(path, photographs=True):
    return Encoded(path.read_bytes(), photographs).pixels()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".ppm", ".tiff", ".webp", ".gif"])
def test_kinds_of_files(tmp_path, suffix):
    picture().save(tmp_path / f"a{suffix}")
    found = pixels_of(tmp_path / f"a{suffix}")
    assert (found.dtype, found.shape) == (torch.uint8, (3, 30, 40))
    difference = (found.int() - official.pil_to_tensor(picture()).int()).abs()
    assert difference.float().mean() < 8


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1", "LA", "YCbCr"])
def test_modes(tmp_path, mode):
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr") else "a.png")
    picture().convert(mode).save(path)
    found = pixels_of(path)
    assert found.shape == (3, 30, 40)
    expected = official.pil_to_tensor(Image.open(path).convert("RGB"))
    assert torch.equal(found, expected)


def test_cmyk_and_grey_jpegs(tmp_path):
    for mode in ("CMYK", "L"):
        picture().convert(mode).save(tmp_path / "a.jpg")
        expected = official.pil_to_tensor(Image.open(tmp_path / "a.jpg").convert("RGB"))
        assert torch.equal(pixels_of(tmp_path / "a.jpg"), expected)


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    level = np.arange(0, 2**16, 64, dtype=np.uint16).reshape(32, 32)
    for suffix in (".png", ".tiff"):
        Image.fromarray(level).save(tmp_path / f"a{suffix}")
        found = pixels_of(tmp_path / f"a{suffix}")
        assert torch.equal(found, torch.from_numpy((level >> 8).astype(np.uint8)).expand(3, -1, -1))
    Image.fromarray(level.astype(np.float32)).save(tmp_path / "b.tiff")
    with pytest.raises(InputError, match=r"b\.tiff: its levels are floating-point numbers"):
        decoded(tmp_path / "b.tiff").pixels()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_photographs_are_turned_as_exif_says(tmp_path, suffix):
    upright = official.pil_to_tensor(picture()).float()
    for orientation, back in ((1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_90),
                              (8, Image.Transpose.ROTATE_270), (2, Image.Transpose.FLIP_LEFT_RIGHT)):  # fmt: skip
        stored = picture() if back is None else picture().transpose(back)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / f"a{suffix}", exif=exif)
        opened = Encoded((tmp_path / f"a{suffix}").read_bytes(), photograph=True)
        assert opened.size == (40, 30) and opened.pixels().shape == (3, 30, 40)
        assert (opened.pixels().float() - upright).abs().mean() < 8, orientation
        assert pixels_of(tmp_path / f"a{suffix}", photographs=False).shape[1:] == stored.size[::-1]


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [picture(), Image.new("RGB", (40, 30), (0, 255, 0))]
    for suffix in (".gif", ".webp", ".png"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
        assert (pixels_of(tmp_path / f"a{suffix}").float() - official.pil_to_tensor(picture())).abs().mean() < 8


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    smooth(200, 150).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    for name, content in (("half.jpg", data[: len(data) // 2]), ("text.jpg", b"no image"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        for photographs in (True, False):
            with pytest.raises(InputError, match=rf"cannot read the image .*{name}: .*; replace or delete the file"):
                decoded(tmp_path / name, photographs).pixels()
    with pytest.raises(InputError, match=r"cannot read the image .*missing"):
        decoded(tmp_path / "missing.jpg").pixels()
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(InputError, match=r"whole\.jpg: Image size \(30000 pixels\) exceeds limit"):
        decoded(tmp_path / "whole.jpg").pixels()


def test_a_large_photograph_is_reduced_while_it_is_decoded(tmp_path):
    whole = smooth(1200, 900)
    whole.save(tmp_path / "a.jpg", quality=95)
    opened = Encoded((tmp_path / "a.jpg").read_bytes(), photograph=True)
    for reduction, side in ((1.9, 1200), (2, 600), (7, 300), (30, 150)):
        opened = Encoded((tmp_path / "a.jpg").read_bytes(), photograph=True)
        assert opened.pixels(reduction).shape[2] == side and opened.size == (1200, 900)
    assert Encoded((tmp_path / "a.jpg").read_bytes(), photograph=False).pixels(30).shape[2] == 1200
    images = InFiles([str(tmp_path / "a.jpg")] * 8, 64)
    for view in (PHOTOGRAPHS["weak"], PHOTOGRAPHS["test"]):  # borders move by half a pixel of the reduced picture
        rng = Draws.of_view("weak", 0, 1, torch.arange(8))
        exact, reduced = (
            apply_view(view, InFiles(images.paths, 64, photographs=photographs), rng).float()
            for photographs in (False, True)
        )
        assert 0 < (exact - reduced).abs().mean() < 2 and (exact - reduced).abs().max() < 24


def test_views_are_cut_from_one_decoding(tmp_path, monkeypatch):
    for number in range(4):
        smooth(90 + number, 70).save(tmp_path / f"{number}.jpg")
    images = InFiles([str(tmp_path / f"{number}.jpg") for number in range(4)], 32)
    decodings = []
    original = Encoded.pixels
    monkeypatch.setattr(Encoded, "pixels", lambda self, *given: decodings.append(1) or original(self, *given))
    named = [(PHOTOGRAPHS[name], Draws.of_view(name, 3, 2, torch.arange(4))) for name in ("weak", "strong", "test")]
    together = apply_views(named, images)
    assert len(decodings) == 4
    for found, (view, rng) in zip(together, named, strict=True):
        assert torch.equal(found, apply_view(view, images, rng))


def test_without_torchvision_s_decoder(tmp_path, monkeypatch):
    smooth(100, 80).save(tmp_path / "a.jpg")
    before = pixels_of(tmp_path / "a.jpg")
    monkeypatch.setattr("mdistiller.dataset.decode.decode_jpeg", None)
    assert (pixels_of(tmp_path / "a.jpg").int() - before.int()).abs().max() <= 2


def test_a_window_is_scaled_as_pillow_does(tmp_path):
    whole = smooth(100, 80)
    found = window(official.pil_to_tensor(whole), Cut(10, 20, 60, 45, (24, 24)), whole.size, (24, 24))
    expected = whole.crop((10, 20, 70, 65)).resize((24, 24), Image.Resampling.BILINEAR)
    assert (found.int() - official.pil_to_tensor(expected).int()).abs().max() <= 2
    tiny = window(torch.zeros(3, 2, 2, dtype=torch.uint8), Cut(15, 15, 1, 1, (4, 4)), (16, 16), (4, 4))
    assert tiny.shape == (3, 4, 4)


def test_images_in_memory_are_cut_alike():
    tensor = torch.randint(0, 256, (3, 3, 20, 20), dtype=torch.uint8)
    found = cut_views(InMemory(tensor), [(RandomResizedCrop((1, 1), (1, 1)), Draws(torch.arange(3)))])
    assert torch.equal(found[0], tensor)
    assert ResizeAndCentreCrop()(tensor, None).shape == tensor.shape


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_send_bytes_and_batches_are_as_ever(tmp_path, workers):
    for number in range(6):
        smooth(60 + number, 50).save(tmp_path / f"{number}.png")
    split = Split(InFiles([str(tmp_path / f"{n}.png") for n in range(6)], 16), torch.arange(6))
    views = {"image_weak": ("weak", PHOTOGRAPHS["weak"]), "image_strong": ("strong", PHOTOGRAPHS["strong"])}
    dataset = BatchedImages(split, views, (0.4,) * 3, (0.2,) * 3, 5, channels_last=True)
    loader = Loader(dataset, 4, shuffle=True, num_workers=workers)
    for _ in range(2):
        epoch = loader.sampler.epoch
        for batch, indices in zip(loader, loader.sampler.order(epoch).split(4), strict=True):
            images = split.images.take(indices)
            for field, (name, view) in views.items():
                bytes_ = apply_view(view, images, Draws.of_view(name, 5, epoch, indices))
                expected = (bytes_.float() / 255 - 0.4) / 0.2
                assert torch.allclose(batch[field], expected, atol=1e-6)
                assert batch[field].is_contiguous(memory_format=torch.channels_last)
    sent = dataset.unnormalised((1, torch.arange(4)))
    assert {name: value.dtype for name, value in sent.items() if "image" in name} == dict.fromkeys(views, torch.uint8)


def test_one_process_and_workers_see_the_same_photographs(tmp_path):
    from image_folders import write_images

    from mdistiller.engine.cfg import load_config

    write_images(tmp_path, ["a", "b"], count=6, suffix=".jpg")

    def batches(workers):
        given = {"TYPE": "folder", "FOLDER.TRAIN": str(tmp_path), "IMAGE_SIZE": 16, "NUM_WORKERS": workers}
        options = [part for key, value in given.items() for part in (f"DATASET.{key}", value)]
        return list(
            build_loaders(load_config(options=[*options, "SOLVER.BATCH_SIZE", 5, "DISTILLER.TYPE", "VRM"])).train
        )

    for here, there in zip(batches(0), batches(2), strict=True):
        assert all(torch.equal(here[name], there[name]) for name in here)
