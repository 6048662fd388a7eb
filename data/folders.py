"""Where the captions and pictures of one dataset or of several lie; needs no pandas and no PyTorch."""

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cli import UserError
from config import DataConfig

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# Where captions and pictures lie unless a setting says otherwise: the first pattern that matches.
CAPTION_FILES = (
    *("captions.csv", "captions.txt", "captions.jsonl"),
    *("Flickr*.token.txt", "Flickr8k_text/Flickr8k.token.txt", "results.csv", "results_20130124.token"),
    *("dataset*.json", "annotations/captions_*.json", "captions_*.json"),
    *("caption_*annotations*.json", "*/caption_*annotations*.json", "flickr8kzhc.caption.txt"),
)
IMAGE_FOLDERS = ("images", "Images", "Flicker8k_Dataset", "flickr30k_images")


@dataclass(frozen=True)
class ImageFolders:
    """Where pictures lie: each folder by what the names of its pictures begin with, "" where there is one alone."""

    folders: dict[str, Path]

    def path(self, image: str) -> Path:
        """Return the path of the picture that a table calls `image`."""
        prefix = "" if "" in self.folders else image.partition("/")[0] + "/"
        return self.folders[prefix] / image.removeprefix(prefix)

    def group(self, images: Iterable[str]) -> Iterator[tuple[str, Path, list[str]]]:
        """Yield each prefix with its folder and those of the pictures that lie there, sorted."""
        found = sorted(images)
        for prefix, folder in self.folders.items():
            yield prefix, folder, [image for image in found if image.startswith(prefix)]


def datasets(config: DataConfig) -> list[tuple[str, DataConfig]]:
    """Return the config of each dataset, and what its pictures' names begin with: "" where there is one alone."""
    if config.shards or len(config.roots) == 1:
        return [("", config.model_copy(update={"root": config.roots[0]}))]
    names: list[str] = []
    for root in map(Path, config.roots):
        own = root.name if root.name.strip(".") else root.resolve().name
        numbered = (f"{own}-{number}" for number in itertools.count(2))
        names.append(next(name for name in itertools.chain([own], numbered) if name not in names))
    parts = [config.model_copy(update={"root": root}) for root in config.roots]
    return [(f"{name}/", part) for name, part in zip(names, parts, strict=True)]


def dataset_name(config: DataConfig, prefix: str) -> str:
    return prefix.removesuffix("/") or Path(config.source).name


def image_folders(config: DataConfig) -> ImageFolders:
    return ImageFolders({prefix: image_folder(part) for prefix, part in datasets(config)})


def caption_files(config: DataConfig) -> list[Path]:
    """Return the files with captions: one, or several whose names say which split each is."""
    paths = find_captions(config)
    if not paths:
        wanted = f"file {config.captions}" if config.captions else "captions file"
        raise UserError(
            f"there is no {wanted} in {config.source}/; put it there (python -m data.download tells how), "
            "or set its place: data.root=FOLDER data.captions=FILE"
        )
    named = [split_in_name(path) for path in paths]
    if len(paths) > 1 and (None in named or len(set(named)) < len(named)):
        names = ", ".join(path.name for path in paths)
        raise UserError(f"{config.source} has several captions files ({names}); choose with data.captions=FILE")
    return paths


def find_captions(config: DataConfig) -> list[Path]:
    """Return the captions files of one dataset that exist: those `data.captions` names, here or in `data.root`."""
    root = Path(config.roots[0])
    if config.captions is None:
        return next(filter(None, (sorted(root.glob(pattern)) for pattern in CAPTION_FILES)), [])
    for place in (Path(config.captions), root / config.captions):
        paths = [place] if place.is_file() else sorted(map(Path, glob.glob(str(place))))
        if paths:
            return paths
    return []


def split_in_name(path: Path) -> str | None:
    """Return the split in a file's name: train for captions_train2014.json."""
    named = re.search(r"(?<![a-z])(train|val|test)", path.name.lower())
    return named[1] if named else None


def image_folder(config: DataConfig) -> Path:
    """Return the folder of one dataset's pictures: `data.root` itself when folders in it hold pictures."""
    if config.shards:
        return Path(config.cache) / "tars"
    root = Path(config.roots[0])
    places = [Path(config.images), root / config.images] if config.images else [root / name for name in IMAGE_FOLDERS]
    for place in places:
        if place.is_dir():
            return place
    if not config.images and any(path.lower().endswith(PICTURE_SUFFIXES) for path in paths_below(root)):
        return root
    raise UserError(f"there is no picture folder at {places[0]}; put it there or set its place: data.images=FOLDER")


def paths_below(folder: Path) -> Iterator[str]:
    """Yield the paths, with forward slashes, of all that lies in `folder` and three levels below."""
    for pattern in ("*", "*/*", "*/*/*", "*/*/*/*"):
        yield from (path.replace(os.sep, "/") for path in glob.iglob(pattern, root_dir=folder))


def pictures_at(pattern: str) -> Iterator[Path]:
    """Yield the picture files named by a path, a folder (with all below) or a glob."""
    path = Path(pattern)
    if path.is_dir():
        yield from (found for found in path.rglob("*") if found.suffix.lower() in PICTURE_SUFFIXES and found.is_file())
    else:
        names = [pattern] if path.exists() else glob.glob(pattern, recursive=True)
        yield from (Path(name) for name in names if Path(name).is_file())


def has_pictures(pattern: str) -> bool:
    return next(pictures_at(pattern), None) is not None
