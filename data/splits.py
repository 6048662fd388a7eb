"""Which pictures are for training, which for choosing (val, also called dev) and which for the final score (test).

Splits are by picture, so that no caption of a held-out picture is trained on. Official lists beside the captions
decide; else the captions file does; else 10 % each are drawn for val and test, and saved with the run.
"""

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cli import UserError
from cli.files import read_file
from data.folders import ends_of

SPLITS = ("train", "val", "test")
# The official lists of Flickr8k and Flickr30k: one picture name a line.
SPLIT_LISTS = {"train": "*[tT]rain[iI]mages.txt", "val": "*[dD]ev[iI]mages.txt", "test": "*[tT]est[iI]mages.txt"}
SAVED_SPLITS = "splits.json"
DIGESTS = "digests"  # there: a hash of the captions of each split
SPLIT_SEED = 0  # the same pictures are held out whatever train.seed says, so that runs can be compared


def official_splits(folder: Path) -> dict[str, str] | None:
    """Return each picture's split by the official lists in `folder`, on one of which it may be; None without lists."""
    paths = [(split, path) for split, pattern in SPLIT_LISTS.items() for path in sorted(folder.glob(pattern))]
    split_of: dict[str, str] = {}
    for split, path in paths:
        try:
            lines = read_file(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a text file in UTF-8; save it as such, one picture name a line") from None
        for name in filter(None, map(str.strip, lines)):
            if split_of.setdefault(name, split) != split:
                raise UserError(f"{path} lists {name}, which is also in {split_of[name]}; remove it from one list")
    return split_of if paths else None


def check_splits(table: pd.DataFrame, source: str) -> None:
    """Raise UserError where only some captions have a split, and for a picture that is in several."""
    without = table.loc[table["split"].isna(), "image"].unique()
    if len(without) and table["split"].notna().any():
        raise UserError(
            f"{source} names the split of some pictures, but not that of {without[0]} (without one: {len(without):,}); "
            "name it for all of them, or for none"
        )
    splits = table.drop_duplicates(["image", "split"])
    for image in splits.loc[splits.duplicated("image"), "image"][:1]:
        several = " and ".join(splits.loc[splits["image"] == image, "split"])
        raise UserError(f"{source} has {image} in {several}; leave it in one split, or no score can be trusted")


def complete(table: pd.DataFrame, saved: dict[str, list[str]] | None) -> pd.DataFrame:
    """Return the table with a split for every row: as it names them, else as `saved` or drawn by a seed."""
    if table["split"].notna().any():
        return table
    if saved is not None:
        split_of = find_again(saved, table["image"].unique().tolist())
    else:
        images = np.array(sorted(table["image"].unique()), dtype=object)
        order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
        held_out = max(round(len(images) / 10), 1 if len(images) >= 3 else 0)
        of_rank = np.repeat(["val", "test", "train"], [held_out, held_out, len(images) - 2 * held_out])
        split_of = dict(zip(images[order], of_rank.tolist(), strict=True))
    table = table.assign(split=table["image"].map(split_of))
    return table[table["split"].notna()].reset_index(drop=True)  # a picture that is new since the run is left out


def find_again(saved: dict[str, list[str]], images: list[str]) -> dict[str, str]:
    """Return the split that a run had for each picture: by its name, or, where the dataset has moved or is nested in
    another way, by the longest end of its path that is the same.

    Raises UserError where no picture is called as it was.
    """
    split_of = {image: split for split, names in saved.items() for image in names}
    new = [image for image in images if image not in split_of]
    if not new or len(new) < len(images):
        return split_of
    known = next((name.rpartition("/")[2] for name in split_of), "none")
    names_of = defaultdict[str, list[str]](list)  # by each end of their paths: a/b/c.jpg, b/c.jpg and c.jpg
    for name in split_of:
        for end in ends_of(name):
            names_of[end].append(name)
    for image in new:
        near = next((names_of[end] for end in ends_of(image) if end in names_of), [])
        if len(near) == 1:
            split_of[image] = split_of[near[0]]
    if not any(image in split_of for image in images):
        raise UserError(
            f"the run's pictures have changed their names: it knows {known}, and the dataset has {images[0]}; name "
            "them as before, or train a new run"
        )
    return split_of


def read_splits(run: Path) -> dict[str, list[str]] | None:
    """Return the splits saved in a run's folder, None where there are none."""
    content = read_saved(run)
    return content and {split: list(map(str, content[split])) for split in SPLITS}


def read_saved(run: Path) -> dict[str, Any] | None:
    """Return what a run's splits.json holds: the pictures of each split, and, but in older runs, DIGESTS."""
    path = run / SAVED_SPLITS
    if not path.is_file():
        return None
    try:
        content = json.loads(read_file(path))
        if all(isinstance(content[split], list) for split in SPLITS):
            return content
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise UserError(f"{path} is damaged, so nobody knows what was trained on; train a new run")


def splits_of(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return the picture names of each split, to be saved with a run."""
    return {split: table.loc[table["split"] == split, "image"].drop_duplicates().tolist() for split in SPLITS}


def digests_of(table: pd.DataFrame) -> dict[str, str]:
    """Return a hash of the captions of each split, in order, with the names of their pictures without folders."""
    names = table["image"].str.rpartition("/")[2]
    found = {}
    for split in SPLITS:
        rows = (table["split"] == split).to_numpy()
        lines = json.dumps([names[rows].tolist(), table.loc[rows, "caption"].tolist()])
        found[split] = hashlib.sha256(lines.encode()).hexdigest()
    return found


def what_changed(saved: dict[str, Any], table: pd.DataFrame) -> str:
    """Return in words how the pictures of the splits `saved` with a run differ from those of the table now; where they
    do not, captions do.
    """
    before = {str(name).rpartition("/")[2]: split for split in SPLITS for name in saved[split]}
    now = dict(zip(table["image"].str.rpartition("/")[2], table["split"], strict=True))
    moved = [name for name in now.keys() & before.keys() if now[name] != before[name]]
    cases = [
        ([name for name in moved if now[name] == "train"], "held-out pictures are for training now"),
        ([name for name in moved if now[name] != "train"], "other pictures are held out now"),
        (now.keys() - before.keys(), "pictures are new"),
        (before.keys() - now.keys(), "pictures are gone"),
    ]
    parts = [f"{what} ({len(names):,}, such as {min(names)})" for names, what in cases if names]
    return " and ".join(parts) or "captions of the same pictures differ"


def choose_split(table: pd.DataFrame, split: str | None, source: str) -> tuple[str, pd.DataFrame]:
    """Return the name and the rows of a split: `dev` is val, None is test, or val where there is no test."""
    if split is None:
        split = "test" if (table["split"] == "test").any() else "val"
    split = "val" if split == "dev" else split
    rows = table[table["split"] == split]
    if rows.empty:
        raise UserError(f"{source} has no {split} pictures; take another --split")
    return split, rows
