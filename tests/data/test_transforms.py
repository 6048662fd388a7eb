"""Any picture file is read as it is meant to be seen, or refused by name; never cropped, never black."""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli import UserError
from data import transforms
from data.folders import PHONES, PICTURE_SUFFIXES
from data.transforms import AUGMENTATIONS, Transform, View, open_picture, other_views

ROOT = Path(transforms.__file__).parents[1]
RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def plain(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (6, 4), colour)  # type: ignore[arg-type]


PICTURES = {
    "rgb.png": (plain("RGB", RED), RED),
    "grey.png": (plain("L", 120), (120, 120, 120)),
    "grey.jpg": (plain("L", 120), (120, 120, 120)),
    "palette.gif": (plain("RGB", BLUE).convert("P", palette=Image.Palette.ADAPTIVE), BLUE),
    "transparent-colour.png": (plain("P", 0), WHITE),
    "transparent.png": (plain("RGBA", (*BLACK, 0)), WHITE),
    "half-transparent.png": (plain("RGBA", (*BLACK, 128)), (127, 127, 127)),
    "transparent-grey.png": (plain("LA", (0, 0)), WHITE),
    "opaque-grey.png": (plain("LA", (90, 255)), (90, 90, 90)),
    "cmyk.jpg": (plain("CMYK", (255, 0, 0, 0)), (0, 255, 255)),
    "cmyk.tif": (plain("CMYK", (0, 255, 255, 0)), RED),
    "middle-16-bit.png": (plain("I;16", 32768), (127, 127, 127)),
    "32-bit-float.tif": (plain("F", 40.0), (40, 40, 40)),
    "float-up-to-1.tif": (plain("F", 0.5), (127, 127, 127)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_is_seen_in_its_colours(name: str, tmp_path: Path) -> None:
    picture, colour = PICTURES[name]
    picture.save(tmp_path / name, transparency=0 if name == "transparent-colour.png" else None)
    seen = open_picture(tmp_path / name)
    assert (seen.mode, seen.size) == ("RGB", (6, 4))
    assert np.abs(np.asarray(seen, dtype=int) - colour).max() <= 3


def test_a_16_bit_picture_keeps_its_contrast(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    seen = np.asarray(open_picture(tmp_path / "ramp.png"))
    assert (seen.min(), seen.max()) == (0, 255)
    assert len(np.unique(seen)) == 256


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_grey_of_fewer_bits_in_a_file_of_16_is_not_dark(bits: int, tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    for name in ("ramp.png", "ramp.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        seen = np.asarray(open_picture(tmp_path / name))
        assert (seen.min(), seen.max()) == (0, 255)


@pytest.mark.parametrize("hole", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_darkens_no_other(hole: float, tmp_path: Path) -> None:
    for name, brightest in (("unit.tif", 1), ("byte.tif", 200), ("high.tif", 1e6)):
        values = np.full((8, 8), brightest, dtype=np.float32)
        values[3, 3] = hole
        Image.fromarray(values).save(tmp_path / name)
        assert np.median(np.asarray(open_picture(tmp_path / name))) >= 200


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010F], EXIF[0x8298] = 6, "maker", "somebody"
ODD_EXIF = [
    (b"\x00\x01\x00\x06", b"\x00\x01\x40\x06"),  # an orientation of which no integer tells
    (b"maker", b"\xff\xfe\x00\x00\x00"),
    (b"\x01\x12\x00\x03", b"\x01\x12\x00\x0a"),  # of a fraction
    (b"\x01\x12\x00\x03", b"\x01\x12\x00\x02"),  # of text
    (b"\x82\x98\x00\x02", b"\x82\x98\x00\x0d"),  # another tag of no kind
    (b"\x82\x98\x00\x02", b"\x82\x98\x00\x0c"),
]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_picture_with_damaged_exif_is_seen_all_the_same(suffix: str, tmp_path: Path) -> None:
    raw = EXIF.tobytes()
    cuts = [raw[:length] for length in range(6, len(raw), 5)]
    for number, exif in enumerate([*(raw.replace(*change) for change in ODD_EXIF), *cuts, b"Exif\0\0" + bytes(40)]):
        plain("RGB", RED).save(tmp_path / f"{number}{suffix}", exif=exif)
        seen = open_picture(tmp_path / f"{number}{suffix}")
        assert np.abs(np.asarray(seen, dtype=int) - RED).max() <= 3


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536), (70_000, 3)])
def test_a_picture_that_is_too_long_is_refused(size: tuple[int, int], tmp_path: Path, refused: Callable) -> None:
    Image.new("L", size).save(tmp_path / "thin.png")
    with refused("cannot read the picture", f"{size[0]:,} x {size[1]:,} pixels, and 65,535 are the most in a row"):
        open_picture(tmp_path / "thin.png")
    Image.new("L", (65_535, 1)).save(tmp_path / "just.png")
    assert Transform(32).resize(open_picture(tmp_path / "just.png")).shape == (3, 32, 32)


def test_a_picture_turned_by_exif_is_seen_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (40, 20), BLUE)
    picture.paste(RED, (0, 0, 20, 20))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right by 90 degrees
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    seen = open_picture(tmp_path / "turned.jpg")
    assert seen.size == (20, 40)
    assert np.abs(np.asarray(seen, dtype=int)[[5, 35], 10] - [RED, BLUE]).max() <= 5


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((4000, 3000), (1000, 750)), ((4032, 3023), (1008, 756)), ((3000, 900), (1500, 450)), ((890, 1200), (890, 1200))],
)
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size_and_resized_to_the_same(
    size: tuple[int, int], decoded: tuple[int, int], tmp_path: Path
) -> None:
    small = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    picture.save(tmp_path / "large.jpg", quality=95)
    picture.save(tmp_path / "large.bmp")
    transform = Transform(224)
    seen = open_picture(tmp_path / "large.jpg", least=transform.least)
    assert seen.size == decoded
    assert open_picture(tmp_path / "large.jpg").size == open_picture(tmp_path / "large.bmp", least=448).size == size
    whole = transform.resize(open_picture(tmp_path / "large.jpg")).int()
    difference = (transform.resize(seen).int() - whole).abs().float()
    assert difference.mean() < 0.6 and difference.max() <= 8  # of 255

    content = (tmp_path / "large.jpg").read_bytes()
    (tmp_path / "large.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cannot read the picture .*large\.jpg"):
        open_picture(tmp_path / "large.jpg", least=transform.least)


def test_the_first_picture_of_an_animation_is_seen(tmp_path: Path) -> None:
    for path in (tmp_path / "a.gif", tmp_path / "a.png", tmp_path / "a.webp"):
        plain("RGB", GREEN).save(path, save_all=True, append_images=[plain("RGB", RED)], duration=50, lossless=True)
        assert open_picture(path).getpixel((0, 0)) == GREEN


def noisy() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_picture_is_refused_by_name_or_read_whole(suffix: str, tmp_path: Path, refused: Callable) -> None:
    if suffix in PHONES:
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / f"damaged{suffix}"
    noisy().save(path)
    content = path.read_bytes()
    for share in (0.02, 0.5, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with refused(str(path)):
            open_picture(path)
    for place in range(200):
        path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
        with contextlib.suppress(UserError):
            assert open_picture(path).mode == "RGB"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"  # Pillow would call Ghostscript


@pytest.mark.parametrize("content", [b"", b"just text\n", b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n", EPS, None])
def test_a_file_that_is_no_picture_is_refused_by_name(content: bytes | None, tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "odd.jpg"
    if content is not None:
        path.write_bytes(content)
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path)  # which is not waited for
    with refused(str(path), "unknown format" if content == EPS else ""):
        open_picture(path)
    with refused(str(tmp_path)):  # a folder
        open_picture(tmp_path)


@pytest.mark.parametrize("size", [(300, 80), (80, 300), (20, 20)])
def test_the_whole_picture_is_resized_without_a_crop(size: tuple[int, int]) -> None:
    width, height = size
    picture = Image.new("RGB", size, WHITE)
    w, h = width // 5, height // 5
    for colour, x, y in ((RED, 0, 0), (GREEN, width - w, 0), (BLUE, 0, height - h), (BLACK, width - w, height - h)):
        picture.paste(colour, (x, y, x + w, y + h))
    pixels = Transform(40).resize(picture)
    assert (pixels.shape, pixels.dtype) == ((3, 40, 40), torch.uint8)
    corners = pixels[:, [0, 0, -1, -1], [0, -1, 0, -1]].T.int()
    assert (corners - torch.tensor([RED, GREEN, BLUE, BLACK])).abs().max() <= 3


def test_pictures_are_resized_as_the_backbone_asks() -> None:
    resized = {name: Transform(32, interpolation=name).resize(noisy()) for name in ("bilinear", "bicubic")}
    assert torch.equal(Transform(32).resize(noisy()), resized["bilinear"])
    for name, pixels in resized.items():
        by_pillow = noisy().resize((32, 32), Image.Resampling[name.upper()])
        assert np.abs(pixels.permute(1, 2, 0).numpy() - np.asarray(by_pillow, dtype=int)).max() <= 1
    assert not torch.equal(resized["bilinear"], resized["bicubic"])


def augmented(name: str, seed: int, size: tuple[int, int] = (50, 40)) -> np.ndarray:
    return np.asarray(AUGMENTATIONS[name](noisy().resize(size), np.random.default_rng(seed)), dtype=int)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_is_drawn_from_its_generator_alone(name: str) -> None:
    assert np.array_equal(augmented(name, 1), augmented(name, 1))
    assert len({augmented(name, seed).tobytes() for seed in range(20)}) == 20
    assert augmented(name, 0, (1, 1)).shape == (1, 1, 3)


def test_augmentations_change_a_picture_and_keep_what_captions_say_of_it() -> None:
    whole, red = noisy().resize((50, 40)), plain("RGB", (200, 60, 60))
    for seed in range(50):
        height, width = augmented("random_crop", seed).shape[:2]
        assert 40 <= width <= 50 and 32 <= height <= 40
        r, g, b = np.asarray(AUGMENTATIONS["color_jitter"](red, np.random.default_rng(seed)), dtype=int)[0, 0]
        assert g == b and r > g + 20  # still red
    crop = augmented("random_crop", 3)
    parts = np.lib.stride_tricks.sliding_window_view(np.asarray(whole), crop.shape)
    assert (parts == crop).all((-3, -2, -1)).sum() == 1  # a part of it, as it is


def test_a_view_is_the_mirror_image_or_a_corner() -> None:
    numbers = np.arange(50, dtype=np.uint8).reshape(5, 10)  # rows, columns
    picture = Image.fromarray(numbers)
    views = {
        View(): numbers,
        View(mirrored=True): numbers[:, ::-1],
        View(corner=0): numbers[:4, :8],
        View(corner=1): numbers[:4, 2:],
        View(corner=2): numbers[1:, :8],
        View(mirrored=True, corner=3): numbers[1:, 2:][:, ::-1],
    }
    for view, seen in views.items():
        assert np.array_equal(np.asarray(view(picture)), seen)


def test_half_of_the_corners_are_mirrored_where_pictures_are() -> None:
    assert other_views(mirror=False, corners=0) == []
    assert other_views(mirror=True, corners=0) == [View(mirrored=True)]
    assert [view.mirrored for view in other_views(mirror=True, corners=4)] == [True, False, True, False, True]
    assert other_views(mirror=False, corners=2) == [View(corner=0), View(corner=1)]


def test_pixels_are_normalised_with_the_mean_and_std_of_the_weights() -> None:
    grey = Transform(32, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.5))(Image.new("RGB", (9, 9), (255, 255, 0)))
    assert grey.dtype == torch.float32
    torch.testing.assert_close(grey[:, 0, 0], torch.tensor([5.0, 2.5, -1.0]))


def test_a_small_file_of_a_huge_picture_is_refused(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    script = "import sys; from data.transforms import open_picture; open_picture(sys.argv[1])"
    command = [sys.executable, "-c", script, str(tmp_path / "bomb.png")]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    assert re.search(r"UserError: cannot read the picture .*bomb.png \(10,000 x 9,000 pixels: too many; make a", said)


def test_a_photograph_of_a_phone_with_108_million_pixels_is_read_at_a_part_of_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (12_000, 9_000), (200, 30, 30)).save(tmp_path / "phone.jpg")
    for least in (None, 448):
        picture = open_picture(tmp_path / "phone.jpg", least=least)
        assert min(picture.size) >= (least or 2000) and max(picture.size) < 4000
        assert picture.getpixel((5, 5)) == pytest.approx((200, 30, 30), abs=2)
