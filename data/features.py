"""Features of a frozen encoder: computed once per picture, and kept on disk.

`cache/<encoder>-<key>/` holds all that one encoder has made: the key names its weights, transform, precision and view.
Inside, each image folder (or tar) has a folder of its own with files of fp16 rows, 00000.npy …, and beside each a
manifest, 00000.json, that says whose rows they are: name, size and mtime of each picture. A picture that is new or has
changed is encoded into a new file, and no other picture is. A file is never written again, so that a training run that
has it mapped keeps its rows.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import distributed
from cli import UserError, say
from data.folders import ImageFolders, plural
from data.transforms import WHOLE, Transform, View, open_picture
from utils import write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")
Stamp = tuple[str, int, int]  # name, size and mtime (ns) of a picture, or its name and those of the tar it lies in

CHECKED = 64  # pictures opened at a time
NOBODY: Stamp = ("", 0, 0)  # in the place of a picture that could not be encoded
SHOWN = 5  # broken pictures in a message
BATCH = {"cpu": 8, "mps": 32, "cuda": 128}  # 8 pictures keep a CPU's activations in its cache


class Opener(Protocol):
    """Opens a picture, wherever it lies; a large JPEG at a part of its size, see `open_picture`."""

    def __call__(self, *, least: int) -> Image.Image: ...


class Features:
    """Encoded pictures: files of fp16 rows (rows, D) or (rows, L, D), where row `rows[i]`, or i, is of `names[i]`."""

    def __init__(self, files: Sequence[torch.Tensor], names: Sequence[str], rows: np.ndarray | None = None) -> None:
        self.files, self.names = list(files), names
        self.rows = np.arange(len(names)) if rows is None else rows  # (P,)
        self.ends = np.cumsum([len(file) for file in self.files])  # (files,)

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def index(self, names: Sequence[str]) -> np.ndarray:
        """Return the indices of these pictures in `names` (B,)."""
        return np.array([self._place_of[name] for name in names], dtype=np.int64)

    def take(self, places: np.ndarray | Sequence[str]) -> torch.Tensor:
        """Return the features (B, D) or (B, L, D) of pictures, given by place (see `index`) or by name."""
        places = places if isinstance(places, np.ndarray) else self.index(places)
        rows = self.rows[places]  # (B,)
        file_of = np.searchsorted(self.ends, rows, side="right").tolist()  # (B,)
        taken = [self.files[file][row - self.ends[file]] for row, file in zip(rows, file_of, strict=True)]
        return torch.stack(taken)  # much faster than indexing, for rows as large as grids

    def without(self, names: Collection[str]) -> "Features":
        """Return the features of all pictures but these."""
        if not names:
            return self
        kept = [place for place, name in enumerate(self.names) if name not in names]
        return Features(self.files, [self.names[place] for place in kept], self.rows[kept])

    def move(self, device: torch.device) -> None:
        """Keep all features on a GPU from now on, if they take no more than half of what is free there."""
        size = sum(file.nbytes for file in self.files)
        if device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]:
            self.files = [file.to(device) for file in self.files]


@dataclass(eq=False)
class Extractor:
    """From pictures to features, by a frozen copy of the encoder made for speed; also while a backbone is validated."""

    encoder: Any  # a models.encoder.EncoderCNN, of which this floor knows nothing more
    transform: Transform
    precision: torch.dtype  # or torch.int8, on a CPU
    device: torch.device
    folder: Path  # where what is made only once of the encoder is kept

    @cached_property
    def network(self) -> nn.Module:
        if self.precision == torch.int8:
            return self.encoder.in_8_bits(self.transform, self.folder)
        return self.encoder.for_inference(self.precision).to(self.device)

    def encode(self, openers: Iterable[Opener], view: View = WHOLE) -> Iterator[list[torch.Tensor | UserError]]:
        """Yield, in batches, the fp16 features (D,) or (L, D) of each picture, or the UserError that it raised."""

        def read(opener: Opener) -> tuple[str, torch.Tensor] | UserError:
            try:
                picture = opener(least=self.transform.least)
                return str(picture.info.get("path", "a picture")), self.transform.resize(picture, view)
            except UserError as error:
                return error

        def compute(items: Sequence[tuple[str, torch.Tensor] | UserError]) -> list[torch.Tensor | UserError]:
            good = [item[1] for item in items if not isinstance(item, UserError)]  # uint8 (3, S, S) each
            rows: Iterator[torch.Tensor] = iter(self(torch.stack(good)) if good else [])
            return [item if isinstance(item, UserError) else self.checked(next(rows), item[0]) for item in items]

        size = BATCH[self.device.type]
        if self.precision != torch.int8:
            yield from map(compute, read_ahead(read, openers, size))
            return
        _ = self.network  # made here, before several threads ask for it
        threads, left = torch.get_num_threads(), iter(openers)
        parts = iter(lambda: list(islice(left, size)), [])
        for several in read_ahead(lambda part: compute([read(each) for each in part]), parts, threads, threads):
            yield from several

    def checked(self, row: torch.Tensor, picture: str) -> torch.Tensor | UserError:
        """Return the features (D,) or (L, D) of a picture, or, where some are infinite or NaN, an error that says so.

        One such picture would spoil the mean and the scale of all, so it counts as one that cannot be read.
        """
        if row.isfinite().all():
            return row
        name, weights = self.encoder.config.name, self.encoder.config.weights or "null"
        return UserError(
            f"the features that {name} with encoder.weights={weights} makes of {picture} are infinite or NaN in fp16; "
            "take weights that were trained, or leave the picture out if all others are encoded"
        )

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, S, S) as fp16 rows (B, D) or (B, L, D), on the CPU."""
        if self.precision == torch.int8:  # which normalises, too
            return self.network(pixels).to(torch.float16)
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True))
        encoded = self.network(images.to(self.precision, memory_format=torch.channels_last))
        return encoded.to(torch.float16).cpu()


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], batch: int, threads: int | None = os.cpu_count()
) -> Iterator[list[Result]]:
    """Yield `function` of the items in batches, computed by threads one batch ahead of the caller."""
    waiting, ahead = iter(items), list[Future[Result]]()
    with ThreadPoolExecutor(threads) as pool:
        while True:
            ready, ahead = ahead, [pool.submit(function, item) for item in islice(waiting, batch)]
            if ready:
                yield [future.result() for future in ready]
            elif not ahead:
                return


def find_broken(names: Sequence[str], folders: ImageFolders) -> dict[str, str]:
    """Return what is wrong with those of these pictures that cannot be read, after opening all of them."""

    def check(name: str) -> str | None:
        try:
            open_picture(folders.path(name))
        except UserError as error:
            return str(error)
        return None

    broken = dict[str, str]()
    with tqdm(total=len(names), desc="checking", unit="img", disable=distributed.bar_hidden()) as bar:
        left = iter(names)
        for batch in read_ahead(check, names, CHECKED):
            broken |= {name: reason for name, reason in zip(islice(left, len(batch)), batch, strict=True) if reason}
            bar.update(len(batch))
    return broken


def broken_error(broken: dict[str, str], count: int) -> UserError:
    """Return the error that names the pictures that cannot be read, among `count` of them."""
    if len(broken) == 1:
        return UserError(f"{next(iter(broken.values()))}, or go on without it: data.broken=skip")
    names = ", ".join(list(broken)[:SHOWN]) + (", …" if len(broken) > SHOWN else "")
    return UserError(
        f"{len(broken):,} of {count:,} pictures cannot be read ({names}); replace them or remove their rows, after "
        "python -m data.annotations --check FOLDER has listed them all, or go on without them: data.broken=skip"
    )


def encode_files(
    extractor: Extractor, names: Sequence[str], folders: ImageFolders, skip_broken: bool = False
) -> Features:
    """Encode pictures into memory, as for a backbone that is being trained; raises UserError for a broken one, unless
    such are to be skipped.
    """
    rows, kept, left = list[torch.Tensor](), list[str](), iter(names)
    for batch in extractor.encode(partial(open_picture, folders.path(name)) for name in names):
        good = [(name, item) for name, item in zip(islice(left, len(batch)), batch, strict=True) if is_good(item)]
        if good or not skip_broken:
            rows.append(stack([item for _, item in good] if skip_broken else batch))
        kept += [name for name, _ in good]
    if not kept:
        raise UserError(f"none of {len(names):,} pictures can be read, the first of them {names[0]}; replace them")
    return Features([torch.cat(rows)], kept)


def is_good(item: torch.Tensor | UserError) -> bool:
    return isinstance(item, torch.Tensor)


def stack(items: list[torch.Tensor | UserError]) -> torch.Tensor:
    """Return the features of pictures as one tensor (B, D) or (B, L, D); raises the error of one that has none."""
    for item in items:
        if isinstance(item, UserError):
            raise item
    return torch.stack([item for item in items if isinstance(item, torch.Tensor)])


class Source(Protocol):
    """Pictures that lie together, in a folder or in a tar; `key` names their folder in the cache."""

    @property
    def key(self) -> str: ...

    @property
    def names(self) -> list[str]: ...

    def stamps(self) -> list[Stamp]: ...

    def openers(self, numbers: Sequence[int]) -> Iterable[Opener]: ...  # of pictures with these numbers, which ascend


@dataclass(frozen=True)
class Files:
    """The pictures `names` in a folder; in the cache they are known by what follows the `prefix` of all names."""

    names: list[str]
    folder: Path
    prefix: str = ""

    @classmethod
    def group(cls, images: Iterable[str], folders: ImageFolders) -> list["Files"]:
        """Return the pictures of a table's `images` by the folders they lie in."""
        return [cls(names, folder, prefix) for prefix, folder, names in folders.group(images)]

    @property
    def key(self) -> str:
        path = self.folder.resolve()
        return f"{path.name}-{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()[:8]}"

    def stamps(self) -> list[Stamp]:
        try:
            files = [name.removeprefix(self.prefix) for name in self.names]
            stats = [os.stat(f"{self.folder}/{file}") for file in files]  # pathlib is slow for 100,000 of them
        except OSError as error:
            raise UserError(f"cannot read the picture {error.filename} ({error.strerror}); put it back") from None
        return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]

    def openers(self, numbers: Sequence[int]) -> Iterable[Opener]:
        names = (self.names[number].removeprefix(self.prefix) for number in numbers)
        return (partial(open_picture, self.folder / name) for name in names)


def map_rows(path: Path) -> torch.Tensor:
    """Return the fp16 array in a .npy file as it lies on disk. NumPy would keep each file open, and there may be more
    files than a process may have open.
    """
    with open(path, "rb") as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError("another version")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
        start, size = file.tell(), 2 * math.prod(shape)
        if fortran_order or dtype != np.float16 or os.fstat(file.fileno()).st_size != start + size:
            raise ValueError("another array")
    return torch.from_file(str(path), size=start + size, dtype=torch.uint8)[start:].view(torch.float16).view(shape)


@dataclass
class FeatureCache:
    """The cached features of one frozen encoder, for one view of the pictures."""

    folder: Path
    extractor: Extractor
    rows_per_file: int  # the unit of work shared among processes, and the most that a kill costs each
    view: View = WHOLE

    @cached_property
    def place(self) -> Path:
        encoder, transform, precision = self.extractor.encoder, self.extractor.transform, self.extractor.precision
        identity = {
            "encoder": {name: value for name, value in encoder.identity.items() if name != "source"},
            "spatial": encoder.spatial,
            "transform": asdict(transform),
            "precision": str(precision).removeprefix("torch."),
            "view": asdict(self.view),
        }
        if precision == torch.int8:
            identity["copy"] = encoder.name_in_8_bits(transform)
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{encoder.identity['name'].replace('/', '_')}-{key}"

    def find(self, *sources: Source) -> Features | None:
        """Return the features of all sources' pictures if all are in the cache, else None."""
        features, missing = self.look_up(*sources)
        return None if any(missing) else features

    def fill(self, *sources: Source, note: str = "", skip_broken: bool = False) -> Features:
        """Return the features of all sources' pictures, after encoding what is missing; processes share the work.

        Raises UserError for pictures that cannot be read, unless they are to be skipped, for one that changes
        meanwhile, and for a full disk.
        """
        features, missing = self.look_up(*sources)
        broken = dict[str, str]()
        if distributed.any_of(any(missing)):
            try:
                with distributed.locked(self.place / "lock", f"encoding into {self.place}/"):
                    broken = self.encode_missing(sources, note)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command resumes encoding where it stopped") from None
            except OSError as error:
                raise UserError(
                    f"cannot keep encoded pictures in {self.place}: {error.strerror or error}; make room or set "
                    "data.cache=FOLDER"
                ) from None
            features, missing = self.look_up(*sources)
        if broken and not skip_broken:
            raise broken_error(broken, len(features.names))
        for source, numbers in zip(sources, missing, strict=True):
            for name in [source.names[number] for number in numbers if source.names[number] not in broken][:1]:
                raise UserError(f"{name} changed while it was being encoded; start again")
        return features.without(broken)

    def look_up(self, *sources: Source) -> tuple[Features, list[list[int]]]:
        """Return the features that are there, and the numbers of each source's pictures that are missing or changed."""
        files, names, rows, missing, first = [], list[str](), [], [], 0
        for source in sources:
            row_of = dict[Stamp, int]()
            for _, stamps, file in self.files(source):
                row_of |= {stamp: first + row for row, stamp in enumerate(stamps)}
                files.append(file)
                first += len(file)
            found = np.array([row_of.get(stamp, -1) for stamp in source.stamps()], dtype=np.int64)  # (P,)
            names += source.names
            rows.append(found)
            missing.append(np.flatnonzero(found < 0).tolist())
        return Features(files, names, np.concatenate(rows)), missing

    def files(self, source: Source) -> Iterator[tuple[Path, list[Stamp], torch.Tensor]]:
        """Yield each file of a source, the oldest first: whose rows they are, and the rows, as they lie on disk."""
        for path in sorted((self.place / source.key).glob("*.npy")):
            try:
                stamps = [tuple(stamp) for stamp in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))]
                rows = map_rows(path)
            except (OSError, ValueError, TypeError, EOFError, RuntimeError):  # not finished, or damaged
                continue
            if rows.shape == (len(stamps), *self.extractor.encoder.feature_shape):
                yield path, stamps, rows

    def encode_missing(self, sources: Sequence[Source], note: str) -> dict[str, str]:
        """Encode what is missing into new files, each process its share of them; only one job does so at a time.

        Returns what is wrong with each picture that cannot be encoded.
        """
        chunks: list[tuple[Path, Source, list[int], list[Stamp]]] = []
        all_are_new = True
        for source in sources:
            stamps = source.stamps()  # before any picture is opened: one that changes meanwhile is found out
            _, [missing] = self.look_up(source)
            all_are_new &= len(missing) == len(source.names)
            folder = self.place / source.key
            number = max((int(path.stem) for path in folder.glob("[0-9]*.*")), default=-1)  # of rows or of a manifest
            for first in range(0, len(missing), self.rows_per_file):
                number += 1
                part = missing[first : first + self.rows_per_file]
                chunks.append((folder / f"{number:05}.npy", source, part, [stamps[i] for i in part]))
        if not distributed.any_of(bool(chunks)):  # once all processes have looked, before any writes
            return {}  # another job has encoded them meanwhile
        count = sum(len(part) for *_, part in chunks)
        say(f"encoding {plural(count, 'picture', 'pictures')}{note}, once, into {self.place}/")
        mine = distributed.share(chunks)
        total, broken = sum(len(part) for *_, part in mine), dict[str, str]()
        with tqdm(total=total, desc="encoding", unit="img", disable=distributed.bar_hidden()) as bar:
            for number, chunk in enumerate(mine, start=1):
                for rows in self.write(*chunk, broken, all_are_new and number == 1):
                    bar.update(rows)
                if bar.disable:
                    say(f"encoded {number:,} of {len(mine):,} files")
        distributed.wait()
        distributed.on_first_rank(self.remove_superseded, sources)
        return dict(distributed.gather(list(broken.items())))

    def write(
        self, path: Path, source: Source, numbers: list[int], stamps: list[Stamp], broken: dict[str, str], first: bool
    ) -> Iterator[int]:
        """Encode these pictures into a new file, whose rows count once its manifest is there; yields their numbers.

        What is wrong with a picture that cannot be encoded is put into `broken`, and its row counts for no picture.
        Raises UserError where that is so of the whole `first` batch of all, as it is with useless weights.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        nothing, written = torch.zeros(self.extractor.encoder.feature_shape, dtype=torch.float16), list[Stamp]()
        try:
            with open(path, "xb") as file:
                shape = (len(numbers), *self.extractor.encoder.feature_shape)
                np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": shape})
                for batch in self.extractor.encode(source.openers(numbers), self.view):
                    for item in batch:
                        good, place = isinstance(item, torch.Tensor), len(written)
                        written.append(stamps[place] if good else NOBODY)
                        if not good:
                            broken[source.names[numbers[place]]] = str(item)
                    if first and len(numbers) > 1 and all(stamp is NOBODY for stamp in written):
                        stack(batch)  # which raises the first error
                    rows = [item if isinstance(item, torch.Tensor) else nothing for item in batch]
                    file.write(torch.stack(rows).numpy().tobytes())
                    yield len(batch)
                file.flush()
                os.fsync(file.fileno())  # before the manifest: a power cut must not leave it promising zeros
        except UserError:
            path.unlink()
            raise
        if all(stamp is NOBODY for stamp in written):
            path.unlink()
        else:
            write_atomically(path.with_suffix(".json"), json.dumps(written).encode())

    def remove_superseded(self, sources: Sequence[Source]) -> None:
        """Delete files of which no row counts any more; a training run that has one mapped keeps it on POSIX."""
        for source in sources:
            latest = {stamp[0]: path.stem for path, stamps, _ in self.files(source) for stamp in stamps}
            used = set(latest.values())
            for path in [path for path in (self.place / source.key).iterdir() if path.stem not in used]:
                with contextlib.suppress(OSError):  # Windows deletes no file that is mapped
                    path.unlink()
