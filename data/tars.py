"""WebDataset tar shards, for datasets that are too large for one machine's memory or disk: written, and read.

    python -m data.tars tars data.root=archive

writes any dataset as tars/00000.tar …, and `python train.py "data.shards=tars/{00000..00001}.tar"` trains on them. A
sample is a picture (`key.jpg`) and its captions (`key.json`: {"captions": ["A dog runs."], "split": "train"}, where
no split means train); so img2dataset and others write them.

Each tar is first taken apart, into `data.cache`/tars/: the captions of train become words in captions.npz, of which
training holds some at a time (`data.stream`), and what is held out becomes files, a small dataset like any other.
Train pictures stay in the tar until they are encoded (`data.features`); after that it may be removed.
"""

from cli import Parser, UserError, run_script

import hashlib
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

import distributed
from config import DataConfig, load_config, setting_names
from data import annotations, formats, words
from data.transforms import open_picture
from utils import write_atomically

INDEX, HELD_OUT = "captions.npz", "held-out.jsonl"


@dataclass
class Tar:
    """One tar: a `data.features.Source` of its train pictures.

    Attributes:
        place: the folder of what it was taken apart into.
        cut_by: what its words depend on besides the captions; see `data.words.cut_by`.
        stamp: name, size and mtime (ns) of the tar that was.
        pictures, captions: how many of train are in it; held_out: pictures of other splits.
    """

    path: Path
    place: Path
    cut_by: list[Any]
    stamp: list[Any] = field(default_factory=list)
    pictures: int = 0
    captions: int = 0
    held_out: int = 0

    def __len__(self) -> int:
        return self.pictures

    def stamps(self) -> list[list[Any]]:
        return [self.stamp]

    def is_known(self) -> bool:
        """Whether it has been taken apart and is as it was then, or gone: it may be, once it is encoded."""
        try:
            with np.load(self.place / INDEX) as saved:
                size, mtime, self.pictures, self.captions, self.held_out = saved["numbers"].tolist()
                cut_by = json.loads(saved["cut_by"].tobytes())
        except words.DAMAGED:
            return False
        self.stamp = [self.path.name, size, mtime]
        return cut_by == self.cut_by and (not self.path.exists() or self.stamp == stamp_of(self.path))

    def names(self) -> list[str]:
        """Return the keys of the train pictures, in order."""
        with np.load(self.place / INDEX) as saved:
            return json.loads(saved["names"].tobytes())

    def repeats(self) -> np.ndarray:
        """Return how many captions each train picture has (pictures,)."""
        with np.load(self.place / INDEX) as saved:
            return saved["repeats"]

    def read_words(self) -> words.Words:
        """Return the words of the train captions, pictures in order."""
        with np.load(self.place / INDEX) as saved:
            return words.unpack(saved)

    def openers(self, first: int = 0) -> Iterator[partial]:
        """Yield what opens each train picture from this place on."""
        if not self.path.is_file():
            raise UserError(f"{self.path} is gone, and its pictures are not all encoded yet; put it back")
        wanted = set(self.names()[first:])
        for sample in samples(self.path):
            if sample["__key__"] in wanted:
                ending = picture_ending(sample, self.path)
                yield partial(open_picture, f"{self.path}/{sample['__key__']}.{ending}", sample[ending])


def find(config: DataConfig) -> list[Tar]:
    """Return the tars that `data.shards` names, taken apart by several processes in turn; none without the setting."""
    tars = named(config)
    new = [tar for tar in tars if not tar.is_known()]
    distributed.wait()  # until all processes have seen the same ones, before any is taken apart
    if new:
        print(f"reading the captions of {count(len(new))}, once, into {config.cache}/tars/")
    for tar in tqdm(distributed.share(new), unit="tar", disable=distributed.bar_hidden() or not new):
        take_apart(tar, config.language)
    distributed.wait()
    for tar in new:
        if not tar.is_known():
            raise UserError(f"{tar.path} changed while it was read; start again")
    return tars


def named(config: DataConfig) -> list[Tar]:
    """Return the tars that `data.shards` names, whether there or not."""
    cut_by, tars = words.cut_by(config.language), []
    for path in expand(config.shards) if config.shards else []:
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]  # two folders may have a 00000.tar each
        tars.append(Tar(path, Path(config.cache) / "tars" / f"{path.stem}-{key}", cut_by))
    return tars


def expand(pattern: str) -> list[Path]:
    """Return the paths that a pattern such as tars/{000..127}.tar stands for."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise UserError("data.shards needs webdataset; install it: pip install -r requirements-extras.txt") from None
    if re.search(r"[*?\[]", pattern) and not Path(pattern).is_file():
        numbered = re.sub(r"([*?]|\[.*?\])+", "{000..127}", pattern, count=1)
        raise UserError(
            f"data.shards = {pattern} is for shells; here numbers count tars, those that are gone as well: "
            f'write "data.shards={numbered}" with your first and last number'
        )
    return list(dict.fromkeys(map(Path, expand_urls(Path(pattern).as_posix()))))


def count(tars: int) -> str:
    return f"{tars:,} tar{'' if tars == 1 else 's'}"


def stamp_of(path: Path) -> list[Any]:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check data.shards, and the numbers in braces"
        ) from None
    return [path.name, stat.st_size, stat.st_mtime_ns]


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar: `__key__` and, by ending, what each of its files holds.

    Raises UserError for a tar that is damaged, naming the last sample that could be read.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    last = "its start"
    try:
        with open(path, "rb") as stream:
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                last = sample["__key__"]
                yield sample
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged after {last} ({error.args[0]}); take a whole copy of it") from None


def take_apart(tar: Tar, language: str) -> None:
    """Write the words of its train captions, and what is held out as files, into the tar's place."""
    stamp = stamp_of(tar.path)
    tar.place.mkdir(parents=True, exist_ok=True)
    with FileLock(tar.place / "lock"):
        if tar.is_known():
            return
        for old in tar.place.iterdir():
            if old.name != "lock":
                old.unlink()
        names, repeats, captions, held_out = list[str](), list[int](), list[str](), list[str]()
        for number, sample in enumerate(unlike(samples(tar.path), tar.path)):
            told, split, row = read_sample(sample, tar.path)
            if split == "train":
                names.append(sample["__key__"])
                repeats.append(len(told))
                captions += told
            else:
                ending = picture_ending(sample, tar.path)
                file = tar.place / f"{number:06}.{ending}"  # a key could lead out of the folder
                file.write_bytes(sample[ending])
                held_out.append(json.dumps({"image": f"{tar.place.name}/{file.name}", **row}))
        write_atomically(tar.place / HELD_OUT, "\n".join(held_out).encode())
        tar.stamp, tar.held_out = stamp, len(held_out)
        write_index(tar, names, repeats, words.cut_afresh(captions, language))


def write_index(tar: Tar, names: list[str], repeats: list[int], cut: words.Words) -> None:
    """Write what is known of a tar, last of all: it has been taken apart from then on."""
    numbers = [*tar.stamp[1:], len(names), sum(repeats), tar.held_out]
    words.write(
        tar.place / INDEX,
        cut,
        names=as_json(names),
        repeats=np.array(repeats, dtype=np.int64),
        numbers=np.array(numbers, dtype=np.int64),
        cut_by=as_json(tar.cut_by),
    )


def as_json(value: list[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unlike(found: Iterator[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples; raises UserError for a key that comes twice in a tar."""
    keys = set()
    for sample in found:
        if sample["__key__"] in keys:
            raise UserError(f"{path} has {sample['__key__']} twice, in two places; keep its files together, once")
        keys.add(sample["__key__"])
        yield sample


def read_sample(sample: dict[str, Any], path: Path) -> tuple[list[str], str, dict[str, Any]]:
    """Return a sample's captions, its split, and its row in captions.jsonl, but for the picture's name."""
    where = f"{path}/{sample['__key__']}.json"
    picture_ending(sample, path)
    if "json" not in sample:
        raise UserError(f"there is no {where}, which should hold the captions of a picture; add it")
    try:
        entry = json.loads(sample["json"])
        found, split = formats.told_of(entry, where)
        captions = [text for text in map(formats.tidy, found) if formats.WORD.search(text)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"captions": ["A dog runs."], "split": "train"}'
        raise UserError(f"{where} cannot be used ({error!r}); it should read {form}") from None
    if not captions:
        raise UserError(f"{where} holds no caption with a word; fill it, or remove the picture")
    image_id = entry.get("image_id", f"{path.stem}/{sample['__key__']}")
    return captions, split or "train", {"image_id": image_id, "captions": captions, "split": split}


def picture_ending(sample: dict[str, Any], path: Path) -> str:
    endings = [ending for ending in sample if f".{ending}" in annotations.SUFFIXES]
    if len(endings) != 1:
        what = f"is {len(endings)} pictures ({', '.join(endings)})" if endings else "has no picture"
        raise UserError(
            f"{sample['__key__']} in {path} {what}; it should be one picture, such as a .jpg, and one .json"
        )
    return endings[0]


def count_words(tars: list[Tar]) -> Counter[str]:
    """Return how often each word occurs in the train captions."""
    counts = Counter[str]()
    for tar in tars:
        counts.update(tar.read_words().count())
    return counts


def held_out(config: DataConfig) -> pd.DataFrame:
    """Return the table of the pictures that are not for training."""
    tables = [formats.read(tar.place / HELD_OUT, "jsonl") for tar in find(config) if tar.held_out]
    columns = ["image", "image_id", "caption", "split"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def train_captions(config: DataConfig) -> Iterator[str]:
    """Yield the words of every train caption as a text."""
    return (" ".join(caption) for tar in find(config) if tar.captions for caption in tar.read_words())


def export(config: DataConfig, folder: Path, each: int) -> int:
    """Write a dataset as tars of `each` pictures, in an order drawn once; returns how many tars.

    Raises UserError where there are tars already, and for a picture that could not be found again by its ending.
    """
    from webdataset import TarWriter

    table, images = annotations.load(config), annotations.image_folder(config)
    rows = list(table.groupby(["image", "image_id", "split"], sort=False)["caption"])
    order = np.random.default_rng(annotations.SPLIT_SEED).permutation(len(rows))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise UserError(f"{folder} has tars already; name another folder")
    for image in table["image"][~table["image"].str.lower().str.endswith(annotations.SUFFIXES)][:1]:
        raise UserError(f"{image} ends in none of {', '.join(annotations.SUFFIXES)}; rename it, in the captions too")
    paths = [folder / f"{number:05}.tar" for number in range(-(-len(rows) // each))]
    for path, first in zip(tqdm(paths, unit="tar", disable=None), range(0, len(rows), each), strict=True):
        unfinished = path.with_suffix(".unfinished")
        with open(unfinished, "wb") as stream, TarWriter(stream, mtime=0) as tar:
            for number in range(first, min(first + each, len(rows))):
                (image, image_id, split), captions = rows[order[number]]
                told = {"image_id": image_id, "image": image, "captions": captions.tolist(), "split": split}
                ending = Path(image).suffix.lower().removeprefix(".")
                content = (images / image).read_bytes()
                tar.write({"__key__": f"{number:09}", ending: content, "json": json.dumps(told).encode()})
        unfinished.replace(path)
    return len(paths)


def main() -> None:
    parser = Parser(
        description="Write a dataset as WebDataset tar shards.",
        epilog="Example: python -m data.tars tars data.root=archive",
    )
    parser.add_argument("out", type=Path, help="the folder for them")
    parser.add_argument("--pictures", type=int, default=5000, metavar="N", help="in each tar (5000)")
    args = parser.parse_options_and_settings(setting_names())
    config = load_config(overrides=args.overrides).data
    expand("")  # says what to install, before any work
    written = export(config, args.out, max(1, args.pictures))
    pattern = f"{args.out.as_posix()}/{{00000..{written - 1:05}}}.tar"
    print(f'wrote {count(written)}; train on them with: python train.py "data.shards={pattern}"')


if __name__ == "__main__":
    sys.exit(run_script(main))
