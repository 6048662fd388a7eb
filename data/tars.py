"""WebDataset tar shards as a source of pictures and captions, for datasets too large for single files.

`python train.py "data.shards=tars/{00000..00001}.tar"` trains on them. A sample is a picture (`key.jpg`) and its
captions (`key.json`: {"captions": ["A dog runs."], "split": "train"}, where no split means train), as img2dataset and
others write them, and `data.write_tars` from any dataset.

Each tar is read once into `data.cache`/tars/: the tokens of its training captions become captions.npz, and the
pictures of val and test become files, a small dataset like any other. Training pictures stay in the tar until they are
encoded (`data.features`); after that the tar may be removed.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
from filelock import FileLock
from tqdm import tqdm

import distributed
from cli import UserError, say
from config import DataConfig
from data import formats, tokens
from data.features import Opener, Stamp
from data.folders import PICTURE_SUFFIXES
from data.tokens import Tokens
from data.transforms import open_picture
from utils import write_atomically

INDEX, HELD_OUT = "captions.npz", "held-out.jsonl"


@dataclass(frozen=True)
class Tar:
    """A tar that has been read, as a `data.features.Source` of its P training pictures."""

    path: Path
    place: Path  # the folder that it was read into
    stamp: Stamp  # of the tar as it was read
    names: list[str]
    captions_per_image: np.ndarray  # (P,)

    @property
    def key(self) -> str:
        return self.place.name

    @property
    def captions(self) -> int:
        return int(self.captions_per_image.sum())

    def tokens(self) -> Tokens:
        """Return the training captions, those of a picture together, pictures in order."""
        with np.load(self.place / INDEX) as saved:
            return tokens.unpack(saved)

    def stamps(self) -> list[Stamp]:
        _, size, mtime = self.stamp
        return [(name, size, mtime) for name in self.names]

    def openers(self, numbers: Sequence[int]) -> Iterator[Opener]:
        if not self.path.is_file():
            raise UserError(f"{self.path} is gone, and its pictures are not all encoded yet; put it back")
        wanted = {self.names[number] for number in numbers}
        for key, ending, sample in samples(self.path):
            if f"{self.key}/{key}" in wanted:
                yield partial(open_picture, f"{self.path}/{key}.{ending}", sample[ending])


def find(config: DataConfig) -> list[Tar]:
    """Return the tars that `data.shards` names, after reading those that are new; none without the setting."""
    paths = expand(config.shards) if config.shards else []
    tars = {path: look_up(path, config) for path in paths}
    new = [path for path, tar in tars.items() if tar is None]
    distributed.wait()  # until all processes have seen the same ones, before any is read
    if new:
        say(f"reading the captions of {len(new):,} of {len(paths):,} tars, once, into {config.cache}/tars/")
    for path in tqdm(distributed.share(new), unit="tar", disable=distributed.bar_hidden() or not new):
        read(path, config)
    distributed.wait()
    for path in new:
        tars[path] = look_up(path, config)
        if not tars[path]:
            raise UserError(f"{path} changed while it was read; start again")
    return [tar for tar in tars.values() if tar]


def look_up(path: Path, config: DataConfig) -> Tar | None:
    """Return a tar as it was read, if it is still as it was then, or gone: once it is encoded, it may be."""
    place = place_of(path, config)
    try:
        with np.load(place / INDEX) as saved:
            stamp, tokeniser, names = json.loads(saved["about"].item())
            stamp = tuple(stamp)
            captions_per_image = saved["captions_per_image"]
    except tokens.DAMAGED:
        return None
    if tokeniser != tokens.tokeniser_version(config.language) or (path.exists() and stamp != stamp_of(path)):
        return None
    return Tar(path, place, stamp, [f"{place.name}/{name}" for name in names], captions_per_image)


def place_of(path: Path, config: DataConfig) -> Path:
    key = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]  # two folders may have a 00000.tar each
    return Path(config.cache) / "tars" / f"{path.stem}-{key}"


def held_out(config: DataConfig) -> pd.DataFrame:
    """Return the table of the pictures that are not for training."""
    return pd.concat([formats.read(tar.place / HELD_OUT, "jsonl") for tar in find(config)], ignore_index=True)


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
    return list(dict.fromkeys(map(Path, expand_urls(Path(pattern).as_posix()))))


def stamp_of(path: Path) -> Stamp:
    try:
        stat = os.stat(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check data.shards, whose numbers stand in braces: {{000..127}}"
        ) from None
    return path.name, stat.st_size, stat.st_mtime_ns


def read(path: Path, config: DataConfig) -> None:
    """Write the tokens of a tar's training captions, and the pictures of val and test, into its place."""
    stamp, place = stamp_of(path), place_of(path, config)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):
        if look_up(path, config):
            return
        names, captions_per_image, captions, held_out = [], [], list[str](), []
        for number, (key, ending, sample) in enumerate(samples(path)):
            texts, split, image_id = read_sample(sample, path)
            if split == "train":
                names.append(key)
                captions_per_image.append(len(texts))
                captions += texts
            else:
                file = place / f"{number:06}.{ending}"  # a key could lead out of the folder
                file.write_bytes(sample[ending])
                row = {"image": f"{place.name}/{file.name}", "image_id": image_id, "captions": texts, "split": split}
                held_out.append(json.dumps(row))
        write_atomically(place / HELD_OUT, "\n".join(held_out).encode())
        about = [stamp, tokens.tokeniser_version(config.language), names]
        tokens.write(  # last of all: the tar counts as read from then on
            place / INDEX,
            tokens.tokenise(captions, config.language),
            about=json.dumps(about).encode(),
            captions_per_image=np.array(captions_per_image, dtype=np.int64),
        )


def samples(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield each sample of a whole tar: its key, the ending of its picture, and what its files hold, by ending."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    keys, last = set[str](), "its start"
    try:
        with open(path, "rb") as stream:
            if is_cut_short(stream):  # tarfile says so only where it is cut within a picture or a JSON
                raise UserError(f"{path} is cut short: the mark at its end is missing; take a whole copy of it")
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                last = sample["__key__"]
                endings = [ending for ending in sample if f".{ending}" in PICTURE_SUFFIXES]
                if len(endings) != 1 or last in keys:
                    found = "comes twice" if last in keys else f"has {', '.join(endings) or 'no picture'}"
                    raise UserError(
                        f"{last} in {path} {found}; it should be one picture, such as a .jpg, and one .json"
                    )
                keys.add(last)
                yield last, endings[0], sample
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged after {last} ({error}); take a whole copy of it") from None


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
    try:
        entry = json.loads(sample["json"])
        found, split = formats.captions_of(entry, where)
        captions = [formats.tidy(text) for text in found if text and formats.WORD.search(text)]
    except formats.UNLIKE as error:
        form = '{"captions": ["A dog runs."], "split": "train"}'
        raise UserError(f"{where} cannot be used ({error!r}); it should read {form}") from None
    if not captions:
        raise UserError(f"{where} holds no caption with a word; fill it, or remove the picture")
    return captions, split or "train", entry.get("image_id", f"{path.stem}/{sample['__key__']}")
