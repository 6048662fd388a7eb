"""From a picture file to the tensor that a backbone expects; one transform for training, validation and inference."""

import contextlib
import importlib
import io
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.nn import functional as F

from cli import UserError, shorten
from data.folders import PHONES, PICTURE_SUFFIXES

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # for EPS, Pillow would start Ghostscript
# A small file can hold a huge picture, so one beyond Pillow's limit of 89 million pixels is refused. A JPEG may have
# more, such as a phone's of 108, since it is decoded at a part of its size; Pillow's warning of still more is an error.
MOST_PIXELS, Image.MAX_IMAGE_PIXELS = 89_478_485, 250_000_000
REDUCED = 2048  # pixels of the shorter side that a JPEG keeps at least where it must be reduced
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of tags that nobody asked for
LONGEST = 65_535  # pixels of a side, as in a JPEG
WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # of cameras, whose 12 bits lie in files of 16
CROP = 0.8  # of each side is left in a corner view, or at least in a random crop
JITTER = 0.4  # the most by which brightness, contrast and saturation change
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """How a picture is shown: mirrored or not, whole or one of its corners (0 to 3, with 80 % of each side)."""

    mirrored: bool = False
    corner: int | None = None

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.corner is not None:
            width, height = (round(CROP * side) for side in picture.size)
            left = (picture.width - width) * (self.corner % 2)
            top = (picture.height - height) * (self.corner // 2)
            picture = picture.crop((left, top, left + width, top + height))
        return ImageOps.mirror(picture) if self.mirrored else picture


WHOLE = View()


def other_views(mirror: bool, corners: int) -> list[View]:
    """Return the views that training adds to the whole picture: its mirror image, and this many corners."""
    views = [View(mirrored=True)] if mirror else []
    return views + [View(mirror and corner % 2 == 1, corner) for corner in range(corners)]


def color_jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by up to 40 % each. Hue stays, since captions name colours."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(1 - JITTER, 1 + JITTER))
    return picture


def random_crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Keep 80 to 100 % of each side, anywhere in the picture. More would cut off what captions speak of."""
    width, height = (round(side * rng.uniform(CROP, 1)) for side in picture.size)
    left, top = int(rng.integers(picture.width - width + 1)), int(rng.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))


# By the names that `train.augment` can have. None of them flips a picture: views do that, and swap left and right in
# its captions too.
AUGMENTATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "color_jitter": color_jitter,
    "random_crop": random_crop,
}


@dataclass(frozen=True)
class Transform:
    """Resizes the whole picture to `image_size` squared, without a crop, and normalises it; kept in checkpoints."""

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bilinear"  # or bicubic

    @property
    def least(self) -> int:
        """The pixels that the shorter side of a picture must have, for what this makes of it to be no worse."""
        return 2 * self.image_size

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return an RGB `picture` as a float tensor (3, image_size, image_size)."""
        return self.normalise(self.resize(picture))

    def resize(self, picture: Image.Image, view: View = WHOLE) -> torch.Tensor:
        """Return a view of the picture as a uint8 tensor (3, image_size, image_size)."""
        pixels = torch.from_numpy(np.array(view(picture))[None]).permute(0, 3, 1, 2)  # (1, 3, H, W)
        size = (self.image_size, self.image_size)
        if pixels.shape[2:] != size:
            pixels = F.interpolate(pixels, size, mode=self.interpolation, align_corners=False, antialias=True)
        return pixels[0]

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 pixels (…, 3, H, W) into the floats that the backbone was trained on."""
        mean, std = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (self.mean, self.std))
        return (pixels * (1 / 255) - mean) / std


def open_picture(path: str | Path, content: bytes | None = None, least: int | None = None) -> Image.Image:
    """Open any picture file as it is meant to be seen: upright, in 8-bit RGB, with transparent parts white.

    An animation gives its first frame. Raises UserError when it cannot be decoded in full or has too many pixels.

    Args:
        content: the file's bytes when it lies in an archive.
        least: a JPEG may be decoded at a half, a quarter or an eighth of its size, which is much faster, while its
            shorter side keeps this many pixels.
    """
    of_phone = str(path).lower().endswith(PHONES)
    if of_phone and PHONES[0] in PICTURE_SUFFIXES:
        importlib.import_module("pillow_heif").register_heif_opener()
    if content is None and not os.path.isfile(path):  # nor a pipe, which would block
        raise UserError(f"there is no picture {path}; check the path")
    formats = FORMATS if "HEIF" not in Image.OPEN else (*FORMATS, "HEIF")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=formats) as file:
            picture = upright(file, least)
    except Exception as error:  # Pillow's decoders raise nearly anything for a damaged file
        reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
        if isinstance(error, UnidentifiedImageError):
            empty = content is None and os.path.getsize(path) == 0
            reason = "an empty file" if empty else "unknown format"
        if of_phone and formats is FORMATS:
            reason = "HEIC, which needs a package: pip install pillow-heif"
        raise UserError(f"cannot read the picture {path} ({reason}); replace it or leave it out") from None
    picture.info["path"] = str(path)  # for errors that come later
    return picture


def upright(picture: Image.Image, least: int | None = None) -> Image.Image:
    """Return an open picture as `open_picture` would read its file; raises ValueError for one that is too large."""
    if max(picture.size) > LONGEST:  # resizing takes memory by the side, too
        raise ValueError(f"{picture.width:,} x {picture.height:,} pixels, and {LONGEST:,} are the most in a row")
    if least or picture.width * picture.height > MOST_PIXELS:
        picture.draft(None, (least or REDUCED, least or REDUCED))  # JPEGs alone are changed by that
    if picture.width * picture.height > MOST_PIXELS:
        raise ValueError(f"{picture.width:,} x {picture.height:,} pixels: too many; make a smaller copy of it")
    picture.load()
    with contextlib.suppress(Exception):  # of damaged EXIF, in which nobody can tell what is meant
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I") or picture.mode == "F":  # PIL's own conversion would clip them
        values = np.nan_to_num(np.array(picture, dtype=np.float32), copy=False, nan=0, posinf=0, neginf=0)
        highest = float(values.max())
        white = 1 if picture.mode == "F" and highest <= 1 else next((w for w in WHITES if highest <= w), highest)
        values *= 255 / white
        picture = Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # no needless copy
