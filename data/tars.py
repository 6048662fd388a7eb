"""WebDataset tar shards as a source of pictures and captions, for datasets too large for single files.

`python train.py "data.shards=tars/{00000..00001}.tar"` trains on them. A sample is a picture (`key.jpg`) and its
captions (`key.json`: {"captions": ["A dog runs."], "split": "train"}, where no split means train), as img2dataset and
others write them, and `data.write_tars` from any dataset.

Each tar is read once into `data.cache`/tars/: the tokens of its training captions become captions.npz, and the
pictures of val and test become files, a small dataset like any other. Training pictures stay in the tar until they are
encoded (`data.features`); after that the tar may be removed.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

import distributed
from cli import UserError, say, shorten
from cli.files import open_file
from config import DataConfig
from data import formats, tokens
from data.features import Opener, Stamp
from data.folders import PICTURE_SUFFIXES
from data.tokens import Tokens
from data.transforms import open_picture
from utils import cut_name, hold, write_atomically

INDEX, HELD_OUT = "captions.npz", "held-out.jsonl"
MOST_TARS = 100_000  # that a pattern stands for
MOST_BYTES, MOST_JSON, MOST_NAME = 1 << 28, 1 << 24, 1 << 20  # of a picture, of a .json, and of what extends a header
MOST_TIMES = 100  # its size, that a compressed tar may unpack to
UNPACKERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
NO_SAMPLE = re.compile("__[^/]*__(?:$|/)")  # names that webdataset keeps for itself
# What reading a damaged tar raises.
DAMAGED = (
    *(tarfile.TarError, zlib.error, lzma.LZMAError),
    *(OSError, EOFError, ValueError, LookupError, RecursionError, OverflowError, MemoryError),
)


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
    return Path(config.cache) / "tars" / f"{cut_name(path.stem, 200)}-{key}"


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
        from webdataset.shardlists import braceexpand
    except ImportError:
        raise UserError("data.shards needs webdataset; install it: pip install -r requirements-extras.txt") from None
    found = list[str]()
    with contextlib.suppress(ValueError, RecursionError):  # of braces that do not fit, or too deep ones
        spans = re.findall(r"(-?\d+)\.\.(-?\d+)", pattern)
        if sum(abs(int(last) - int(first)) for first, last in spans) < MOST_TARS:  # each is a list in memory
            found = list(itertools.islice(braceexpand.braceexpand(Path(pattern).as_posix()), MOST_TARS + 1))
    if not 0 < len(found) <= MOST_TARS:
        raise UserError(
            f"data.shards={shorten(pattern)} stands for no tars, or for more than {MOST_TARS:,}; write their numbers "
            "in braces, such as tars/{000..127}.tar"
        )
    return list(dict.fromkeys(map(Path, found)))


def stamp_of(path: Path) -> Stamp:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); check data.shards, whose numbers stand in braces: {{000..127}}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no file; check data.shards, whose numbers stand in braces: {{000..127}}")
    return path.name, status.st_size, status.st_mtime_ns


def read(path: Path, config: DataConfig) -> None:
    """Write the tokens of a tar's training captions, and the pictures of val and test, into its place."""
    stamp, place = stamp_of(path), place_of(path, config)
    place.mkdir(parents=True, exist_ok=True)
    with hold(place / "lock", f"reading {path}"):
        if look_up(path, config):
            return
        names, captions_per_image, captions, held_out = [], [], list[str](), []
        for number, (key, ending, sample) in enumerate(samples(path)):
            texts, split, image_id = read_sample(key, sample, path)
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


class Header(tarfile.TarInfo):
    """The header of a member, of which a broken one is an error; tarfile takes it for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Header":
        header = super().frombuf(buf, encoding, errors)
        known = header.type in tarfile.SUPPORTED_TYPES and header.type not in tarfile.GNU_TYPES
        header.check(MOST_BYTES if known else MOST_NAME)  # before names and the like are read
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "Header":
        try:
            header = super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None
        header.check(MOST_BYTES)  # of which an extended header may say something else
        return header

    def check(self, most: int) -> None:
        if self.type == tarfile.GNUTYPE_SPARSE or self.issparse():
            raise tarfile.ReadError(f"{shorten(self.name)} is stored as a sparse file")
        if not 0 <= self.size <= most:
            raise tarfile.ReadError(f"{shorten(self.name)} has {self.size:,} bytes, and at most {most:,} are read")

    def _proc_gnusparse_10(self, *_: object) -> None:  # which reads a map of any length
        raise tarfile.ReadError("a file is stored as a sparse one")


def samples(path: Path) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Yield each sample of a whole tar: its key, the ending of its picture, and what its files hold, by ending.

    A sample is what lies together and has the same name up to the first dot, as webdataset takes it.
    """
    keys, last = set[str](), "its start"
    with open_file(path) as file:
        try:
            for key, files in itertools.groupby(members(file), key=itemgetter(0)):
                if key in keys:
                    raise UserError(f"{key} in {path} comes twice; keep one, or give each sample a name of its own")
                keys.add(key)
                last = key
                sample, pictures = dict[str, bytes](), list[str]()
                for _, ending, content in files:
                    if ending in sample:
                        raise UserError(f"{path} has {key}.{ending} twice; keep one")
                    sample[ending] = content
                    pictures += [ending] if f".{ending}" in PICTURE_SUFFIXES else []
                    if len(pictures) > 1:
                        break
                if len(pictures) != 1:
                    found = ", ".join(pictures) or "no picture"
                    raise UserError(
                        f"{key} in {path} has {found}; it should be one picture, such as a .jpg, and one .json"
                    )
                yield key, pictures[0], sample
            if not keys:
                raise UserError(f"{path} holds no pictures; take another one, or leave it out")
        except DAMAGED as error:
            reason = shorten(" ".join(str(error).split()) or type(error).__name__, 200)
            raise UserError(f"{path} is damaged after {last} ({reason}); take a whole copy of it") from None


def members(file: io.BufferedReader) -> Iterator[tuple[str, str, bytes]]:
    """Yield the key, the ending and the content of each file in a tar; of others than pictures and .json, b"".

    Raises one of DAMAGED for a tar that is cut short or damaged, or swells, before it takes much memory.
    """
    start, size = file.peek(8), os.fstat(file.fileno()).st_size
    unpack = next((each for mark, each in UNPACKERS.items() if start.startswith(mark)), None)
    # Not tarfile's own unpacking, by which a few bytes may become gigabytes at once.
    with tarfile.open(fileobj=unpack(file) if unpack else file, mode="r|", tarinfo=Header) as tar:
        for member in tar:
            tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined]  # they would grow with the tar
            if tar.offset > MOST_BYTES + MOST_TIMES * size:
                raise tarfile.ReadError(f"it unpacks to more than {MOST_TIMES} times its size")
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            ending = ending.lower()
            if not stem or member.isdir() or NO_SAMPLE.match(member.name):
                continue
            if not member.isreg():
                raise UserError(
                    f"{member.name} in {file.name} is a link or a device; pack the file itself, such as by: "
                    "tar --dereference --hard-dereference"
                )
            if ending == "json" and member.size > MOST_JSON:
                raise UserError(
                    f"{member.name} in {file.name} has {member.size:,} bytes, too many for captions; leave other "
                    "things out of it"
                )
            content = tar.extractfile(member) if ending == "json" or f".{ending}" in PICTURE_SUFFIXES else None
            yield f"{folder}/{stem}" if folder else stem, ending, content.read() if content else b""
        padding = tar.fileobj.read(MOST_NAME) if tar.fileobj else b""
        if padding.strip(b"\0") or len(padding) == MOST_NAME:
            raise tarfile.ReadError("it goes on behind its end")


def read_sample(key: str, sample: dict[str, bytes], path: Path) -> tuple[list[str], str, str | int]:
    """Return a sample's captions, its split and its image id."""
    where = f"{path}/{key}.json"
    try:
        entry = json.loads(sample["json"])
        found, split = formats.captions_of(entry, where)
        captions = [formats.tidy(text) for text in found if text and formats.WORD.search(text)]
        image_id = formats.as_image_id(entry.get("image_id", f"{path.stem}/{key}"), where)
    except formats.UNLIKE as error:
        form = '{"captions": ["A dog runs."], "split": "train"}'
        raise UserError(f"{where} cannot be used ({formats.reason_of(error)}); it should read {form}") from None
    formats.check_lengths(captions, where)
    if not captions:
        raise UserError(f"{where} holds no caption with a word; fill it, or remove the picture")
    return captions, split or "train", image_id
