"""Captions of one dataset or of several become one table: a frame with image, image_id, caption, split and dataset.

    python -m data.annotations archive coco

prints what these folders hold. `image` is the picture's path below its image folder; where there are several datasets,
it and `image_id` begin with the dataset's name. `split` is train, val or test. No module after this one knows which
format the captions came in (see `data.formats`), and this one needs no torch.
"""

from cli import Parser, UserError, run_script, say, shorten  # first, so that Ctrl-C is quiet during the imports

# isort: split
import json
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import pandas as pd

from config import DataConfig, load_config, pick, setting_names
from data import formats, sample, splits
from data.folders import (
    caption_files,
    dataset_name,
    datasets,
    find_names,
    image_folder,
    image_folders,
    list_folder,
    other_captions,
    plural,
    split_in_name,
)
from data.splits import SPLITS
from data.vocab import TOKENISERS

CHINESE, JAPANESE = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff]")
FOREIGN = re.compile("[^\\W\\d\u0000-\u024f\u1e00-\u1eff]")  # a letter that is not Latin


def load(
    config: DataConfig, saved_splits: dict[str, list[str]] | None = None, need_pictures: bool = True
) -> pd.DataFrame:
    """Read the captions that `config` names, decide each picture's split, and find the pictures.

    Of each dataset, official lists beside the captions decide alone where there are any, and pictures on no list are
    left out. Otherwise the splits in the files decide; else `saved_splits` (of a run, see `data.splits`) or a seeded
    split. Pictures may be missing without `need_pictures`. With `data.shards`, the table holds the pictures of val and
    test, unpacked: see `data.tars`.
    """
    tables = []
    for prefix, part in datasets(config):
        table, source, missing = read_dataset(part, need_pictures)
        if missing and need_pictures:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            raise UserError(
                f"{source} names {len(missing)} of {table['image'].nunique()} pictures that are not in "
                f"{image_folder(part)} ({names}); add them or remove their rows"
            )
        table["image"] = prefix + table["image"]
        if prefix:
            table["image_id"] = prefix + table["image_id"].astype(str)
        tables.append(splits.complete(table, saved_splits).assign(dataset=dataset_name(part, prefix)))
    return pd.concat(tables, ignore_index=True)


def references(table: pd.DataFrame) -> dict[str, list[str]]:
    """Return each picture's raw captions, pictures in the table's order."""
    return table.groupby("image", sort=False)["caption"].agg(list).to_dict()


def read_dataset(config: DataConfig, need_pictures: bool = True) -> tuple[pd.DataFrame, str, list[str]]:
    """Return the table of one dataset with the splits that its files name, these files for messages, and the pictures
    that are missing.
    """
    pick(TOKENISERS, config.language, "data.language")
    if config.shards:
        from data import tars  # which needs torch

        table, source = tars.held_out(config), config.shards
    else:
        table, source = read_captions(config)
    captions = table["caption"].str
    chinese = (captions.contains(CHINESE) & ~captions.contains(JAPANESE)).mean()  # of all captions
    if config.language == "en" and chinese > 0.5:
        raise UserError(f"the captions of {source} are Chinese; set data.language=zh, or zh-characters")
    foreign = captions.contains(FOREIGN).mean()
    if config.language == "en" and foreign > 0.5:
        raise UserError(f"the captions of {source} are not in Latin letters; set data.language=unicode")
    if config.language == "zh" and chinese < 0.1:
        raise UserError(f"the captions of {source} are not Chinese; leave data.language out")
    missing: list[str] = []
    with nullcontext() if need_pictures else suppress(UserError):  # there is no folder of pictures
        path_of, missing = find_names(image_folder(config), table["image"].unique())
        table["image"] = table["image"].map(lambda image: path_of.get(image, image))
    splits.check_splits(table, source)
    return table, source, missing


def read_captions(config: DataConfig) -> tuple[pd.DataFrame, str]:
    """Return the captions of all files, of the pictures on official lists where there are any, and the files' names."""
    if config.format == "sample":
        sample.draw(Path(config.roots[0]))
    paths, tables, root = caption_files(config), [], Path(config.roots[0])
    for path in paths:
        table, split = formats.read(path, config.format), split_in_name(path)
        if split and (len(paths) > 1 or split != "train"):  # a train file alone is split further
            table["split"] = table["split"].fillna(split)
        if path.name.startswith("metadata.") and root in path.parent.parents:  # it names pictures of its own folder
            table["image"] = f"{path.parent.relative_to(root).as_posix()}/" + table["image"]
        tables.append(table)
    table, source = pd.concat(tables, ignore_index=True), " and ".join(map(str, paths))
    if table.empty:
        raise UserError(f"{source} holds no captions; it should have the columns image and caption")
    official = splits.official_splits(paths[0].parent)
    if official is not None:
        table["split"] = table["image"].map(official)
        table = table[table["split"].notna()].reset_index(drop=True)
    if table.empty:
        raise UserError(f"the split lists in {paths[0].parent} name none of the pictures in {source}; check the lists")
    return table, source


def report(config: DataConfig) -> Iterator[str]:
    """Yield lines about each dataset, and about all of them together."""
    tables, parts = [], datasets(config)
    for prefix, part in parts:
        table, source, missing = read_dataset(part)
        note = ", chosen at random" if table["split"].isna().all() else ""
        table = splits.complete(table, None)
        kind = formats.recognise(caption_files(part)[0]) if part.format == "auto" else part.format
        yield f"captions:   {source} ({kind})"
        yield from (f"            not used: {path}; choose with data.captions=FILE" for path in other_captions(part))
        lacking = f"; {len(missing):,} missing: add them or remove their rows" if missing else ""
        yield f"pictures:   {table['image'].nunique():,}, in {image_folder(part)}{lacking}"
        yield from (f"            {note}" for note in list_folder(image_folder(part)).notes())
        yield from (f"            missing: {name}" for name in missing[:5])
        idle = len(set(list_folder(image_folder(part)).pictures()) - set(table["image"]))
        if idle:
            yield f"            {idle:,} other pictures there have no caption"
        image, caption = table[["image", "caption"]].iloc[0]
        yield f"the first:  {image}: {shorten(caption, 200)}"
        yield from describe(table, part, note)
        yield ""
        tables.append(table.assign(image=prefix + table["image"]))
    if len(parts) > 1:
        table = pd.concat(tables, ignore_index=True)
        yield f"together:   {config.source}"
        yield f"pictures:   {table['image'].nunique():,}"
        yield from describe(table, config, "")


def describe(table: pd.DataFrame, config: DataConfig, note: str) -> Iterator[str]:
    """Yield lines about captions: how many, their splits and lengths, and what the vocabulary covers."""
    each, twice = table.groupby("image").size(), table.duplicated(["image", "caption"]).sum()
    low, high = each.min(), each.max()
    count = f"{low} to {high} captions" if low < high else "1 caption" if low == 1 else f"{low} captions"
    yield f"            {count} each, {len(table):,} in all" + (f", {twice:,} of them repeated" if twice else "")
    for split in SPLITS:
        rows = table[table["split"] == split]
        pictures, captions = plural(rows["image"].nunique(), "picture", "pictures"), len(rows)
        yield f"{split + ':':<11} {pictures}, {plural(captions, 'caption', 'captions')}{note}"
    words = table["caption"].map(TOKENISERS[config.language]())
    lengths = words.str.len()
    short, long = lengths.quantile([0.05, 0.95]).round().astype(int)
    yield f"words:      {lengths.mean():.1f} a caption, {lengths.min()} to {lengths.max()}, mostly {short} to {long}"
    counts = Counter(word for each in words[table["split"] == "train"] for word in each)
    known = {word for word, count in counts.items() if count >= config.min_count}
    yield f"vocabulary: {len(known):,} of {len(counts):,} train words occur at least {config.min_count} times"
    for split in SPLITS:
        found = [word in known for each in words[table["split"] == split] for word in each]
        if found:
            yield f"            they are {100 * sum(found) / len(found):.1f} % of the words in {split}"


def main() -> None:
    parser = Parser(description="Print what a folder of captions and pictures holds, or several together.")
    parser.add_argument("folders", nargs="+", metavar="folder", help="such as archive")
    parser.add_argument("--check", action="store_true", help="open every picture, and list those that cannot be read")
    args = parser.parse_options(setting_names())
    for folder in args.folders:
        if not Path(folder).is_dir():
            raise UserError(f"there is no folder {folder}; check the path")
    root = args.folders[0] if len(args.folders) == 1 else json.dumps(args.folders)  # a list of YAML, too
    config = load_config(overrides=[f"data.root={root}", *args.overrides]).data
    for line in report(config):
        say(line)
    if args.check:
        check_pictures(config)


def check_pictures(config: DataConfig) -> None:
    """Open all pictures and print which of them cannot be read; raises UserError if there are any."""
    from data.features import find_broken  # which needs torch

    images = load(config)["image"].unique().tolist()
    broken = find_broken(images, image_folders(config))
    for name, reason in broken.items():
        say(f"{name}: {reason}")
    if broken:
        raise UserError(
            f"{len(broken):,} of {len(images):,} pictures cannot be read; replace them, remove their rows, or train "
            "without them: data.broken=skip"
        )
    say(f"all {len(images):,} pictures can be read")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
