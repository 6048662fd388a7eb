"""Every caption file format becomes one table: a pandas frame with the columns image, image_id, caption, split.

`image` is the picture's path below the image folder, `split` is train, val or test, always decided per picture.
Nothing after this module knows where captions came from, and nothing here needs torch.
"""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from config import DataConfig, UserError
from data import sample

SPLITS = ("train", "val", "test")
# The official lists of Flickr8k and Flickr30k: one picture name a line.
SPLIT_LISTS = {
    "train": "*[tT]rain[iI]mages.txt",
    "val": "*[dD]ev[iI]mages.txt",
    "test": "*[tT]est[iI]mages.txt",
}
SAVED_SPLITS = "splits.json"
SPLIT_SEED = 0  # the same pictures are held out whatever train.seed says, so that runs can be compared


def load(config: DataConfig, saved_splits: dict[str, list[str]] | None = None) -> pd.DataFrame:
    """Read the captions named by `config` and decide each picture's split.

    Official lists beside the captions decide alone where there are any: pictures on no list are left out. Otherwise
    `saved_splits` (of the run, see `splits_of`) or a seeded split by picture, 80/10/10.

    Raises UserError for an unreadable file, rows without picture or words, a name that leaves the image folder, and
    pictures that are missing.
    """
    if config.format == "sample":
        sample.draw(Path(config.root))
    path = captions_file(config)
    table = FORMATS[config.format](path)
    if table.empty:
        raise UserError(f"{path} holds no captions; it should have the columns image and caption")
    official = official_splits(path.parent)
    table["split"] = table["image"].map(saved_or_seeded(table, saved_splits) if official is None else official)
    table = table[table["split"].notna()].reset_index(drop=True)
    if table.empty:
        raise UserError(f"the split lists in {path.parent} name none of the pictures in {path.name}; check the lists")
    check_pictures(table, image_folder(config), path)
    return table


def captions_file(config: DataConfig) -> Path:
    path = find_captions(config)
    if path is None:
        wanted = config.captions or f"{config.root}/captions.csv"
        raise UserError(f"there is no captions file at {wanted}; put it there or say where it is: data.root=FOLDER")
    return path


def find_captions(config: DataConfig) -> Path | None:
    names = [Path(config.captions)] if config.captions else [Path(config.root) / name for name in CAPTION_FILES]
    return next((path for path in names if path.is_file()), None)


def image_folder(config: DataConfig) -> Path:
    """Return the folder that the `image` column is relative to."""
    names = [Path(config.images)] if config.images else [Path(config.root) / name for name in ("images", "Images")]
    for path in names:
        if path.is_dir():
            return path
    raise UserError(f"there is no picture folder at {names[0]}; put it there or say where it is: data.images=FOLDER")


def read_csv(path: Path) -> pd.DataFrame:
    """Read `image,caption` rows: Flickr8k's captions.csv and Kaggle's captions.txt, unquoted commas included."""
    images, captions = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            header = [name.strip().lower() for name in next(rows, [])]
            if "image" not in header or "caption" not in header:
                raise UserError(f"{path} starts with {','.join(header)!r}; its first line should be: image,caption")
            for row in rows:
                if row:
                    image, caption = split_row(row, header, f"{path} line {rows.line_num}")
                    images.append(image)
                    captions.append(caption)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); save it as such") from None
    return pd.DataFrame({"image": images, "image_id": images, "caption": captions}, dtype=str)


FORMATS: dict[str, Callable[[Path], pd.DataFrame]] = {"auto": read_csv, "csv": read_csv, "sample": read_csv}
CAPTION_FILES = ("captions.csv", "captions.txt")


def split_row(row: list[str], header: list[str], where: str) -> tuple[str, str]:
    """Return image and caption of one row; a caption in the last column may hold commas without quotes."""
    if header[-1] == "caption" and len(row) > len(header):
        row = [*row[: len(header) - 1], ",".join(row[len(header) - 1 :])]
    if len(row) != len(header):
        raise UserError(f"{where} has {len(row)} columns, not {len(header)}; write it as: image,caption")
    image, caption = (row[header.index(name)].strip() for name in ("image", "caption"))
    if "\n" in caption or "\r" in caption:
        raise UserError(f"{where}: the caption of {image} runs over several lines; close its quotation mark")
    if not re.search(r"\w", caption):
        raise UserError(f"{where}: the caption of {image or 'an unnamed picture'} is empty; fill or remove it")
    name = PurePosixPath(image.replace("\\", "/"))
    if not image or name.is_absolute() or ".." in name.parts or re.match(r"[A-Za-z]:", image):
        raise UserError(f"{where} names the picture {image!r}, which is not inside the image folder; mend or remove it")
    return name.as_posix(), caption


def official_splits(folder: Path) -> dict[str, str] | None:
    """Return each picture's split by the official lists in `folder`; None where there are no lists.

    Raises UserError for a list that cannot be read and for a picture on two of them.
    """
    paths = [(split, path) for split, pattern in SPLIT_LISTS.items() for path in sorted(folder.glob(pattern))]
    split_of: dict[str, str] = {}
    for split, path in paths:
        try:
            names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file in UTF-8; save it as such, one picture name a line") from None
        for name in filter(None, names):
            if split_of.setdefault(name, split) != split:
                raise UserError(f"{path} lists {name}, which is also in {split_of[name]}; remove it from one list")
    return split_of if paths else None


def choose_split(table: pd.DataFrame, split: str | None, source: str) -> tuple[str, pd.DataFrame]:
    """Return the name and the rows of a split: `dev` is val, None is test, or val where there is no test.

    Raises UserError, naming the `source` of the table, for a split without pictures.
    """
    if split is None:
        split = "test" if (table["split"] == "test").any() else "val"
    split = "val" if split == "dev" else split
    rows = table[table["split"] == split]
    if rows.empty:
        raise UserError(f"{source} has no {split} pictures; take another --split")
    return split, rows


def references(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return each picture's raw captions, pictures in the table's order."""
    return table.groupby("image", sort=False)["caption"].agg(list).to_dict()


def saved_or_seeded(table: pd.DataFrame, saved: dict[str, list[str]] | None) -> dict[str, str]:
    if saved is not None:
        return {image: split for split, images in saved.items() for image in images}
    images = np.array(sorted(table["image"].unique()), dtype=object)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    held_out = max(round(len(images) / 10), 1 if len(images) >= 3 else 0)
    of_rank = np.repeat(np.array(SPLITS)[[1, 2, 0]], [held_out, held_out, len(images) - 2 * held_out])
    return dict(zip(images[order], of_rank, strict=True))


def read_splits(run: Path) -> dict[str, list[str]] | None:
    """Return the splits saved in a run's folder, None where there are none."""
    path = run / SAVED_SPLITS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def splits_of(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the picture names of each split, to be saved with a run."""
    return {split: pictures(table[table["split"] == split])["image"].tolist() for split in SPLITS}


def pictures(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row per picture, in the table's order."""
    return table.drop_duplicates("image")


def check_pictures(table: pd.DataFrame, folder: Path, source: Path) -> None:
    """Raise UserError when pictures are missing, with their number and the first five names."""
    images = table["image"].unique()
    present: set[str] = set()
    for parent in {PurePosixPath(image).parent for image in images}:
        where = folder / parent
        if where.is_dir():
            present.update((parent / path.name).as_posix() for path in where.iterdir())
    missing = [image for image in images if image not in present]
    if missing:
        names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise UserError(
            f"{source} names {len(missing)} of {len(images)} pictures that are not in {folder} ({names}); "
            "add them or remove their rows"
        )
