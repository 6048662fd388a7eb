"""WebDataset tar shards as a source of pictures and captions, for datasets too large for single files.

`python train.py "data.shards=tars/{00000..00001}.tar"` trains on them. A sample is a picture (`key.jpg`) and its
captions (`key.json`: {"captions": ["A dog runs."], "split": "train"}, where no split means train), as img2dataset and
others write them, and `data.write_tars` from any dataset.

Each tar is read once into `data.cache`/tars/: the tokens of its training captions become captions.npz, and the
pictures of val and test become files, a small dataset like any other. Training pictures stay in the tar until they are
encoded (`data.features`); after that the tar may be removed.
"""

from cli import UserError

import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

import distributed
from config import DataConfig
from data import formats, tokens
from data.features import Opener, Stamp
from data.formats import PICTURE_SUFFIXES
from data.tokens import Tokens
from data.transforms import open_picture
from utils import write_atomically

INDEX, HELD_OUT = "captions.npz", "held-out.jsonl"


@dataclass
class Tar:
    """One tar, as a `data.features.Source` of its training pictures.

    Attributes:
        place: the folder that it was read into.
        tokeniser: what its tokens depend on besides the captions; see `data.tokens.tokeniser_version`.
        stamp: name, size and mtime (ns) that the tar had then.
        pictures, captions: how many there are for training; held_out: how many pictures of val and test.
    """

    path: Path
    place: Path
    tokeniser: list[Any]
    stamp: Stamp = field(default_factory=list)
    pictures: int = 0
    captions: int = 0
    held_out: int = 0

    @property
    def key(self) -> str:
        return self.place.name

    @property
    def names(self) -> list[str]:
        """The names of the training pictures, in order."""
        with np.load(self.place / INDEX) as saved:
            return [f"{self.key}/{name}" for name in json.loads(saved["names"].tobytes())]

    def captions_per_image(self) -> np.ndarray:
        """Return how many captions each training picture has (pictures,)."""
        with np.load(self.place / INDEX) as saved:
            return saved["captions_per_image"]

    def tokens(self) -> Tokens:
        """Return the training captions, those of a picture together, pictures in order."""
        with np.load(self.place / INDEX) as saved:
            return tokens.unpack(saved)

    def is_read(self) -> bool:
        """Whether the tar has been read and is as it was then, or gone: once it is encoded, it may be."""
        try:
            with np.load(self.place / INDEX) as saved:
                size, mtime, self.pictures, self.captions, self.held_out = saved["numbers"].tolist()
                tokeniser = json.loads(saved["tokeniser"].tobytes())
        except tokens.DAMAGED:
            return False
        self.stamp = [self.path.name, size, mtime]
        return tokeniser == self.tokeniser and (not self.path.exists() or self.stamp == stamp_of(self.path))

    def stamps(self) -> list[Stamp]:
        _, size, mtime = self.stamp
        return [[name, size, mtime] for name in self.names]

    def openers(self, numbers: Sequence[int]) -> Iterator[Opener]:
        if not self.path.is_file():
            raise UserError(f"{self.path} is gone, and its pictures are not all encoded yet; put it back")
        names = self.names
        wanted = {names[number] for number in numbers}
        for sample in samples(self.path):
            key = sample["__key__"]
            if f"{self.key}/{key}" in wanted:
                ending = picture_ending(sample, self.path)
                yield partial(open_picture, f"{self.path}/{key}.{ending}", sample[ending])


def find(config: DataConfig) -> list[Tar]:
    """Return the tars that `data.shards` names, after reading those that are new; none without the setting."""
    tokeniser, tars = tokens.tokeniser_version(config.language), []
    for path in expand(config.shards) if config.shards else []:
        key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]  # two folders may have a 00000.tar each
        tars.append(Tar(path, Path(config.cache) / "tars" / f"{path.stem}-{key}", tokeniser))
    new = [tar for tar in tars if not tar.is_read()]
    distributed.wait()  # until all processes have seen the same ones, before any is read
    if new:
        print(f"reading the captions of {count(len(new))}, once, into {config.cache}/tars/")
    for tar in tqdm(distributed.share(new), unit="tar", disable=distributed.bar_hidden() or not new):
        read(tar, config.language)
    distributed.wait()
    for tar in new:
        if not tar.is_read():
            raise UserError(f"{tar.path} changed while it was read; start again")
    return tars


def count_words(tars: list[Tar]) -> Counter[str]:
    """Return how often each word occurs in the training captions."""
    counts = Counter[str]()
    for tar in tars:
        counts.update(tar.tokens().count())
    return counts


def held_out(config: DataConfig) -> pd.DataFrame:
    """Return the table of the pictures that are not for training."""
    tables = [formats.read(tar.place / HELD_OUT, "jsonl") for tar in find(config) if tar.held_out]
    columns = ["image", "image_id", "caption", "split"]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)


def train_captions(config: DataConfig) -> Iterator[str]:
    """Yield every training caption as its words, joined by blanks."""
    for tar in find(config):
        captions = tar.tokens()
        for number in range(len(captions)):
            yield " ".join(captions.types[i] for i in captions[number])


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


def stamp_of(path: Path) -> Stamp:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check data.shards, and the numbers in braces"
        ) from None
    return [path.name, stat.st_size, stat.st_mtime_ns]


# ---- reading a tar ---------------------------------------------------------------------------------------------------


def read(tar: Tar, language: str) -> None:
    """Write the tokens of a tar's training captions, and the pictures of val and test, into its place."""
    stamp = stamp_of(tar.path)
    tar.place.mkdir(parents=True, exist_ok=True)
    with FileLock(tar.place / "lock"):
        if tar.is_read():
            return
        for old in tar.place.iterdir():
            if old.name != "lock":
                old.unlink()
        names, captions_per_image, captions, held_out, keys = [], [], list[str](), [], set[str]()
        for number, sample in enumerate(samples(tar.path)):
            key = sample["__key__"]
            if key in keys:
                raise UserError(f"{tar.path} has {key} twice, in two places; keep its files together, once")
            keys.add(key)
            texts, split, image_id = read_sample(sample, tar.path)
            if split == "train":
                names.append(key)
                captions_per_image.append(len(texts))
                captions += texts
            else:
                ending = picture_ending(sample, tar.path)
                file = tar.place / f"{number:06}.{ending}"  # a key could lead out of the folder
                file.write_bytes(sample[ending])
                row = {"image": f"{tar.key}/{file.name}", "image_id": image_id, "captions": texts, "split": split}
                held_out.append(json.dumps(row))
        write_atomically(tar.place / HELD_OUT, "\n".join(held_out).encode())
        tokens.write(  # last of all: the tar counts as read from then on
            tar.place / INDEX,
            tokens.tokenise(captions, language),
            names=as_array(names),
            captions_per_image=np.array(captions_per_image, dtype=np.int64),
            numbers=np.array([*stamp[1:], len(names), len(captions), len(held_out)], dtype=np.int64),
            tokeniser=as_array(tar.tokeniser),
        )


def as_array(value: list[Any]) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar: `__key__` and, by ending, what each of its files holds.

    Raises UserError for a tar that is cut short or damaged.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    last = "its start"
    try:
        with open(path, "rb") as stream:
            if is_cut_short(stream):  # tarfile says so only where it is cut within a picture or a JSON
                raise UserError(f"{path} is cut short: the mark at its end is missing; take a whole copy of it")
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                last = sample["__key__"]
                yield sample
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged after {last} ({error.args[0]}); take a whole copy of it") from None


def is_cut_short(tar: BinaryIO) -> bool:
    """Whether a tar lacks the zeros that end it; a compressed one is not judged. Leaves `tar` at its start."""
    first = tar.read(tarfile.BLOCKSIZE)
    tar.seek(max(0, tar.seek(0, os.SEEK_END) - tarfile.BLOCKSIZE))
    last = tar.read()
    tar.seek(0)
    return first[257:262] == b"ustar" and bool(last.strip(b"\0"))


def read_sample(sample: dict[str, Any], path: Path) -> tuple[list[str], str, str | int]:
    """Return a sample's captions, its split and its image id."""
    where = f"{path}/{sample['__key__']}.json"
    picture_ending(sample, path)
    if "json" not in sample:
        raise UserError(f"there is no {where}, which should hold the captions of a picture; add it")
    try:
        entry = json.loads(sample["json"])
        found, split = formats.captions_of(entry, where)
        captions = [text for text in map(formats.tidy, found) if formats.WORD.search(text)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        form = '{"captions": ["A dog runs."], "split": "train"}'
        raise UserError(f"{where} cannot be used ({error!r}); it should read {form}") from None
    if not captions:
        raise UserError(f"{where} holds no caption with a word; fill it, or remove the picture")
    return captions, split or "train", entry.get("image_id", f"{path.stem}/{sample['__key__']}")


def picture_ending(sample: dict[str, Any], path: Path) -> str:
    endings = [ending for ending in sample if f".{ending}" in PICTURE_SUFFIXES]
    if len(endings) != 1:
        what = f"is {len(endings)} pictures ({', '.join(endings)})" if endings else "has no picture"
        raise UserError(
            f"{sample['__key__']} in {path} {what}; it should be one picture, such as a .jpg, and one .json"
        )
    return endings[0]
