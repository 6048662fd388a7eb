"""From a picture file to the tensor a backbone expects. One transform for training, validation and inference."""

from cli import UserError

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional as F

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # of others, Pillow hands EPS to Ghostscript
# A small file may hold a huge picture: beyond Pillow's limit, 89 million pixels, it is refused, not only warned of.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# What Pillow raises for damaged files, by format.
UNREADABLE = (OSError, UnidentifiedImageError, ValueError, SyntaxError, RuntimeError, *BOMBS)
PART = 0.8  # of the sides, in a view of a corner
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """How a picture is shown: mirrored or not, whole or one of its corners (0 to 3), 80 % of each side."""

    mirrored: bool = False
    corner: int | None = None

    def __call__(self, picture: Image.Image) -> Image.Image:
        if self.corner is not None:
            width, height = (round(PART * side) for side in picture.size)
            left = (picture.width - width) * (self.corner % 2)
            top = (picture.height - height) * (self.corner // 2)
            picture = picture.crop((left, top, left + width, top + height))
        return ImageOps.mirror(picture) if self.mirrored else picture


WHOLE = View()


def other_views(mirror: bool, corners: int) -> list[View]:
    """Return the views that training has besides the whole picture: its mirror image, and this many corners."""
    views = [View(mirrored=True)] if mirror else []
    return views + [View(mirror and corner % 2 == 1, corner) for corner in range(corners)]


@dataclass(frozen=True)
class Transform:
    """Resizes the whole picture to `image_size` squared (no crop) and normalises it; plain values, for checkpoints."""

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return an RGB `picture` as a float tensor (3, image_size, image_size)."""
        return self.normalise(self.resize(picture))

    def resize(self, picture: Image.Image, view: View = WHOLE) -> torch.Tensor:
        """Return a view of the picture as a uint8 tensor (3, image_size, image_size)."""
        pixels = F.pil_to_tensor(view(picture))
        return F.resize(pixels, [self.image_size, self.image_size], antialias=True)

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Turn uint8 pixels (…, 3, H, W) into the floats the backbone was trained on."""
        return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), list(self.mean), list(self.std))


def open_picture(path: str | Path, content: bytes | None = None) -> Image.Image:
    """Open any picture file as it is meant to be seen: upright, 8-bit RGB, transparent parts white.

    Greyscale, palette, CMYK, 16-bit, RGBA and EXIF-rotated files are all welcome; of an animation the first frame.
    `content` is what the file holds, where it lies in an archive. Raises UserError, naming the file, when it cannot be
    decoded in full, or has more than Pillow's limit of pixels.
    """
    if content is None and not os.path.isfile(path):  # a pipe of that name would be waited for
        raise UserError(f"there is no picture {path}; check the path")
    try:
        with Image.open(path if content is None else io.BytesIO(content), formats=FORMATS) as file:
            ImageOps.exif_transpose(file, in_place=True)
            return to_rgb(file)
    except UNREADABLE as error:
        reason = "of no format known here" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot read the picture {path} ({reason}); replace it or leave it out") from None


def upright(picture: Image.Image) -> Image.Image:
    """Return a picture that is open already as `open_picture` would; it stays as it is."""
    return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # PIL's own conversion would clip to white, or to black
        values = np.asarray(picture, dtype=np.float32)
        white = 65535 if values.max() > 255 else 1 if picture.mode == "F" and values.max() <= 1 else 255
        picture = Image.fromarray((values * (255 / white)).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture if picture.mode == "RGBA" else picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")  # a copy of a large one costs memory


def augment(picture: Image.Image, names: object, rng: object) -> Image.Image:
    """Stand-in until the encoder branch is merged."""
    return picture
