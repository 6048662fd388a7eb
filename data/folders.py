"""Where the captions and pictures of one dataset or of several lie; needs no pandas and no PyTorch."""

import contextlib
import glob
import itertools
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from cli import UserError
from config import DataConfig

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm"),
    *((".heic", ".heif") if find_spec("pillow_heif") else ()),
)
MADE_HERE = ".made-by-image-captioning"  # marks a folder of drawings or copies, which are not captioned again
PHONES = (".heic", ".heif")  # pictures of iPhones, which need the package pillow-heif
# What systems and programs keep beside people's pictures, in lower case; and all whose names begin with a dot.
OF_SYSTEMS = frozenset(
    (
        *("@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "__pycache__"),
        *("thumbs.db", "desktop.ini", "ehthumbs.db", "icon\r"),  # files
    )
)
# Where captions and pictures lie unless a setting says otherwise: the first pattern that matches.
CAPTION_FILES = (
    *("captions.csv", "captions.txt", "captions.tsv", "captions.xlsx", "captions.jsonl", "captions.json"),
    *("Flickr*.token.txt", "Flickr8k_text/Flickr8k.token.txt", "results.csv", "results_20130124.token"),
    *("dataset*.json", "annotations/captions_*.json", "captions_*.json"),
    *("caption_*annotations*.json", "*/caption_*annotations*.json", "flickr8kzhc.caption.txt"),
    *("metadata.jsonl", "metadata.csv", "*/metadata.jsonl", "*/metadata.csv"),  # of Hugging Face's ImageFolder
    *("*.csv", "*.tsv", "*.xlsx", "*.jsonl", "*.json", "*.xls", "*.ods"),  # any other table
)
LEFT_ASIDE = ("*.lemma.*", "results*.json", "predictions*.json", "scores-*.json", "splits.json", "~$*", ".*")
MADE_TABLE = "image,caption,log_prob"  # the first line of a captions.csv that this project has written
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
    if not paths and not Path(config.roots[0]).is_dir():
        raise UserError(
            f"there is no folder {config.roots[0]}; check the path, or fetch a dataset into it, as docs/data.md says"
        )
    if not paths:
        wanted = f"file {config.captions}" if config.captions else "captions file"
        raise UserError(
            f"there is no {wanted} in {config.source}/; put it there, as docs/data.md says, "
            "or set its place: data.root=FOLDER data.captions=FILE"
        )
    named = [split_in_name(path) for path in paths]
    if config.captions is None and len(paths) > 1 and (None in named or len(set(named)) < len(named)):
        names = ", ".join(path.name for path in paths)
        raise UserError(f"{config.source} has several captions files ({names}); choose with data.captions=FILE")
    return paths


def find_captions(config: DataConfig) -> list[Path]:
    """Return the captions files of one dataset that exist: those `data.captions` names, in `data.root` or here."""
    root = Path(config.roots[0])
    if config.captions is None:
        found = ([each for each in sorted(root.glob(pattern)) if not is_aside(each)] for pattern in CAPTION_FILES)
        return next(filter(None, found), texts_beside(config))
    for place in (root / config.captions, Path(config.captions)):
        paths = [place] if place.is_file() else sorted(map(Path, glob.glob(str(place))))
        if paths:
            return paths
    return []


def other_captions(config: DataConfig) -> list[Path]:
    """Return the captions files of a dataset that are there, but not read."""
    root, used = Path(config.roots[0]), find_captions(config)
    found = {path for pattern in CAPTION_FILES for path in root.glob(pattern) if not is_aside(path)}
    return sorted(found - set(used))


def is_aside(path: Path) -> bool:
    """Whether a file is no table of captions by people: of another kind, or written by this project."""
    if not path.is_file() or any(fnmatch(path.name, pattern) for pattern in LEFT_ASIDE):
        return True
    with contextlib.suppress(OSError), open(path, "rb") as file:
        first = file.readline(1 << 12)
        return first.rstrip() == MADE_TABLE.encode() or b'"log_probs": [' in first
    return False


def texts_beside(config: DataConfig) -> list[Path]:
    """Return the folder of pictures with a .txt of the same name beside them, as image trainers keep captions."""
    with contextlib.suppress(UserError):  # no pictures
        folder = image_folder(config)
        paths = set(paths_below(folder))
        pictures = (path for path in paths if path.lower().endswith(PICTURE_SUFFIXES))
        return [folder] if any(f"{path.rpartition('.')[0]}.txt" in paths for path in pictures) else []
    return []


def split_in_name(path: Path) -> str | None:
    """Return the split in a file's name, train for captions_train2014.json, or of its folder for metadata.jsonl."""
    name = path.parent.name if path.name.startswith("metadata.") else path.name
    named = re.search(
        r"(?<![a-z])(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(dev)|(test)(?:ing)?)(?![a-z])", name.lower()
    )
    return {"dev": "val"}.get(named[0], next(filter(None, named.groups()))) if named else None


def image_folder(config: DataConfig) -> Path:
    """Return the folder of one dataset's pictures: `data.root` itself when folders in it hold pictures."""
    if config.shards:
        return Path(config.cache) / "tars"
    root = Path(config.roots[0])
    places = [Path(config.images), root / config.images] if config.images else [root / name for name in IMAGE_FOLDERS]
    for place in places:
        if place.is_dir():
            return place
    if not config.images and list_folder(root).pictures():
        return root
    raise UserError(f"there is no picture folder at {places[0]}; put it there or set its place: data.images=FOLDER")


@dataclass
class Listing:
    """What lies in a folder and below: paths with forward slashes, and what was left aside."""

    paths: list[str]
    aside: list[str]  # what systems keep there: ._photo.jpg, .DS_Store, Thumbs.db, @eaDir/ …
    made_here: list[str]  # folders of drawings

    def pictures(self) -> list[str]:
        return [path for path in self.paths if path.lower().endswith(PICTURE_SUFFIXES)]

    def notes(self) -> list[str]:
        """Return what is to be said of the files that are not taken, if any."""
        notes = []
        if self.aside:
            notes.append(
                f"left aside: {plural(len(self.aside), 'file of the system', 'files of the system')}, "
                f"such as {self.aside[0]}"
            )
        notes += [f"left out: {folder}, which holds what this project has drawn" for folder in self.made_here]
        phones = [path for path in self.paths if path.lower().endswith(PHONES)]
        if phones and PHONES[0] not in PICTURE_SUFFIXES:
            notes.append(
                f"left out: {plural(len(phones), 'HEIC picture', 'HEIC pictures')}, such as {phones[0]}; to read them: "
                "pip install pillow-heif"
            )
        return notes


def plural(count: int, one: str, several: str) -> str:
    return f"{count:,} {one if count == 1 else several}"


def list_folder(folder: Path, first: bool = False) -> Listing:
    """Return what lies in a folder and below it; of folders that are linked, each is entered once.

    With `first`, nothing beyond the first picture.
    """
    found, known, left = Listing([], [], []), set[tuple[int, int]](), [""]
    while left:
        below = left.pop()
        try:
            status = os.stat(folder / below)
            entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
        except OSError:  # gone meanwhile, or not to be read
            continue
        if (status.st_dev, status.st_ino) in known:
            continue
        known.add((status.st_dev, status.st_ino))
        if any(entry.name == MADE_HERE for entry in entries):
            found.made_here.append(below or f"{folder.name}/")
            continue
        folders = []
        for entry in entries:
            path, name = f"{below}{entry.name}", entry.name.lower()
            if name.startswith(".") or name in OF_SYSTEMS:
                found.aside.append(path)
            elif is_folder(entry):
                if not entry.is_symlink() or not folder.resolve().is_relative_to(Path(entry.path).resolve()):
                    folders.append(f"{path}/")  # but for a link to a folder that this one is in
            else:
                found.paths.append(path)
                if first and name.endswith(PICTURE_SUFFIXES):
                    return found
        left += reversed(folders)
    return found


def is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def paths_below(folder: Path) -> list[str]:
    """Return the paths, with forward slashes, of all files in `folder` and below."""
    return list_folder(folder).paths


def same_name(name: str) -> str:
    """Return a name as systems compare it: macOS takes accents off their letters, and Windows is blind to case."""
    return unicodedata.normalize("NFC", name).lower()


def ends_of(path: str) -> list[str]:
    """Return the ends of a path at its slashes, the longest first: a/b/c.jpg, b/c.jpg and c.jpg."""
    parts = path.split("/")
    return ["/".join(parts[first:]) for first in range(len(parts))]


class Ends:
    """Paths by their ends, where each is looked up at once: many folders may hold an 0001.jpg."""

    def __init__(self, paths: Iterable[tuple[str, str]]) -> None:
        """Take each path with what it is called here."""
        self.whole, self.longer = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
        for name, path in paths:
            self.whole[name].append(path)
            for end in ends_of(name):
                self.longer[end].append(path)

    def find(self, name: str) -> list[str]:
        """Return the paths that end with a name, and those with which it ends."""
        shorter = (path for end in ends_of(name)[1:] for path in self.whole.get(end, ()))
        return [*self.longer.get(name, ()), *shorter]


class Nearby:
    """Paths by names that are not quite theirs; what is needed for that is made when a name is first looked up."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    @cached_property
    def pictures(self) -> list[str]:
        return [path for path in self.paths if path.lower().endswith(PICTURE_SUFFIXES)]

    @cached_property
    def by_name(self) -> Ends:
        return Ends((same_name(path), path) for path in self.paths)

    @cached_property
    def by_stem(self) -> Ends:
        return Ends((same_name(path.rpartition(".")[0]), path) for path in self.pictures)

    @cached_property
    def by_number(self) -> dict[int, list[str]]:
        """Pictures such as 001.jpg, which a spreadsheet makes 1."""
        found = defaultdict[int, list[str]](list)
        for path in self.pictures:
            stem = path.rpartition("/")[2].rpartition(".")[0]
            if stem.isdecimal():
                found[int(stem)].append(path)
        return found

    def find(self, name: str) -> list[str]:
        name = same_name(name)
        near = self.by_name.find(name) or self.by_stem.find(name)
        if not near and (number := re.fullmatch(r"(\d{1,18})(?:\.0)?", name.rpartition("/")[2])):
            return self.by_number.get(int(number[1]), [])
        return near


def find_names(folder: Path, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Return the path below `folder` of each picture that is there, and the names of the others.

    A picture lies where its name says; else it is the only file whose path ends with its name, or the other way round,
    however its letters are composed; else the only one that has this name and an ending. Raises UserError where there
    are several.
    """
    paths = paths_below(folder)
    exact, nearby, path_of, missing = set(paths), Nearby(paths), dict[str, str](), list[str]()
    for name in names:
        near = [name] if name in exact else nearby.find(name)
        if len(near) > 1:
            raise UserError(f"there are {', '.join(near)} in {folder} for {name}; name it with its folder")
        if near:
            path_of[name] = near[0]
        else:
            missing.append(name)
    return path_of, missing


def pictures_at(pattern: str, first: bool = False) -> tuple[list[Path], list[str]]:
    """Return the picture files named by a path, a folder (with all below) or a glob, and notes on those not taken.

    With `first`, a folder is read no further than to its first picture: enough to know that there is one.
    """
    path = Path(pattern)
    if path.is_dir():
        listing = list_folder(path, first)
        return [path / name for name in listing.pictures()], listing.notes()
    if "**" in path.parts and not path.exists():
        return pictures_below(path.parts)
    names = [pattern] if path.exists() else sorted(glob.glob(pattern))
    if not names and path.parent.is_dir():  # typed with its accents composed in another way
        wanted = unicodedata.normalize("NFC", path.name)
        names = [str(each) for each in path.parent.iterdir() if unicodedata.normalize("NFC", each.name) == wanted]
    files = [name for name in names if os.path.isfile(name)]  # pathlib is slow for 100,000 of them
    drawn = {folder for folder in set(map(os.path.dirname, files)) if Path(folder, MADE_HERE).exists()}
    mine = [Path(name) for name in files if os.path.dirname(name) not in drawn]
    return mine, [f"left out: {Path(folder)}/, which holds what this project has drawn" for folder in sorted(drawn)]


def pictures_below(parts: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    """Return the pictures that a glob with ** names, and notes on those not taken; folders are entered once each, where
    Python's own globs follow links that lead back for ever.
    """
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    folder, wanted = Path(*fixed), parts[len(fixed) :]

    def fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
        if not names or not patterns:
            return not names and all(pattern == "**" for pattern in patterns)
        if patterns[0] == "**":
            return fits(names, patterns[1:]) or fits(names[1:], patterns)
        return fnmatch(names[0], patterns[0]) and fits(names[1:], patterns[1:])

    listing = list_folder(folder)
    return [folder / path for path in listing.pictures() if fits(path.split("/"), wanted)], listing.notes()
