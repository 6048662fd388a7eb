"""Features of a frozen encoder: computed once per picture, and kept on disk.

`cache/<encoder>-<key>/` holds all that one encoder has made: the key names its weights, transform, precision and view.
Inside, each image folder (or tar) has a folder of its own with files of fp16 rows, 00000.npy …, and beside each a
00000.json that says whose rows they are (name, size and mtime of each picture) and how many are done. A picture that is
new or has changed is encoded into a new file, and no other picture is. A file is never written again once it can be
read, so that a training that has it mapped keeps its rows.
"""

from cli import UserError

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from data.transforms import WHOLE, Transform, View, open_picture
from utils import write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")
Opener = Callable[[], Image.Image]  # opens a picture, wherever it lies
Stamp = list[Any]  # name, size and mtime (ns) of a picture, or of the tar it lies in

BATCH = {"cpu": 8, "mps": 32, "cuda": 128}  # 8 pictures keep a CPU's activations in its cache
SAVE_EVERY = 256  # pictures between two writes of `rows_done`: the most that a kill can cost


class Features:
    """Encoded pictures: the features of `names[i]` are row `rows[i]` of all files, one after the other.

    Args:
        files: fp16 rows (rows, D) or (rows, L, D), usually mapped from disk.
        names: P pictures; rows: (P,), by default 0 … P - 1.
    """

    def __init__(self, files: Sequence[torch.Tensor], names: Sequence[str], rows: np.ndarray | None = None) -> None:
        self.files, self.names = list(files), names
        self.rows = np.arange(len(names)) if rows is None else rows  # (P,)
        self.ends = np.cumsum([len(file) for file in self.files])  # (files,)

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}

    def index(self, names: Sequence[str]) -> np.ndarray:
        """Return where these pictures stand among `names` (B,)."""
        return np.array([self._place_of[name] for name in names], dtype=np.int64)

    def take(self, places: np.ndarray | Sequence[str]) -> torch.Tensor:
        """Return the features (B, D) or (B, L, D) of pictures, given by place (see `index`) or by name."""
        places = places if isinstance(places, np.ndarray) else self.index(places)
        rows = self.rows[places]  # (B,)
        file_of = np.searchsorted(self.ends, rows, side="right").tolist()  # (B,)
        taken = [self.files[file][row - self.ends[file]] for row, file in zip(rows, file_of, strict=True)]
        return torch.stack(taken)  # much faster than indexing, for rows as large as grids

    def move(self, device: torch.device) -> None:
        """Keep all features on a GPU from now on, if they take no more than half of what is free there."""
        size = sum(file.nbytes for file in self.files)
        if device.type == "cuda" and 2 * size < torch.cuda.mem_get_info(device)[0]:
            self.files = [file.to(device) for file in self.files]


def concatenate(parts: Sequence[Features]) -> Features:
    """Return the features of all parts' pictures."""
    before = np.cumsum([0] + [int(part.ends[-1]) if len(part.ends) else 0 for part in parts])
    rows = [part.rows + first for part, first in zip(parts, before[:-1].tolist(), strict=True)]
    names = [name for part in parts for name in part.names]
    return Features([file for part in parts for file in part.files], names, np.concatenate(rows))


# ---- from pictures to features ---------------------------------------------------------------------------------------


class Encoder(Protocol):
    """What this module needs of `models.encoder.EncoderCNN`."""

    identity: dict[str, Any]
    spatial: bool
    feature_shape: tuple[int, ...]

    def for_inference(self, dtype: torch.dtype) -> nn.Module: ...


class Extractor:
    """The one way from pictures to features, at full speed, by a frozen copy of the encoder."""

    def __init__(self, encoder: Encoder, transform: Transform, precision: torch.dtype, device: torch.device) -> None:
        self.transform, self.precision, self.device = transform, precision, device
        self.network = encoder.for_inference(precision).to(device)

    def encode(self, openers: Iterable[Opener], view: View = WHOLE) -> Iterator[list[torch.Tensor | UserError]]:
        """Yield, in batches, the fp16 features (D,) or (L, D) of each picture, on the CPU.

        Threads read a batch ahead. For a picture that cannot be read, its UserError is yielded.
        """

        def read(opener: Opener) -> torch.Tensor | UserError:
            try:
                return self.transform.resize(opener(), view)  # uint8 (3, S, S)
            except UserError as error:
                return error

        for batch in read_ahead(read, openers, BATCH[self.device.type]):
            good = [pixels for pixels in batch if not isinstance(pixels, UserError)]
            encoded: Iterator[torch.Tensor] = iter(self(torch.stack(good)) if good else [])
            yield [item if isinstance(item, UserError) else next(encoded) for item in batch]

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pixels (B, 3, S, S) as fp16 rows (B, D) or (B, L, D), on the CPU."""
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True))
        encoded = self.network(images.to(self.precision, memory_format=torch.channels_last))
        return encoded.to(torch.float16).cpu()


def read_ahead(function: Callable[[Item], Result], items: Iterable[Item], batch: int) -> Iterator[list[Result]]:
    """Yield `function` of the items in batches, computed by threads one batch ahead of the caller."""
    waiting, ahead = iter(items), list[Future[Result]]()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            ready, ahead = ahead, [pool.submit(function, item) for item in islice(waiting, batch)]
            if ready:
                yield [future.result() for future in ready]
            elif not ahead:
                return


def encode_files(extractor: Extractor, names: Sequence[str], folder: Path) -> Features:
    """Encode pictures into memory, as for a backbone that is being trained; raises UserError for a broken one."""
    rows = []
    for batch in extractor.encode(Files(list(names), folder).openers(range(len(names)))):
        rows += [raise_errors(item) for item in batch]
    return Features([torch.stack(rows)], names)


def raise_errors(item: torch.Tensor | UserError) -> torch.Tensor:
    if isinstance(item, UserError):
        raise item
    return item


# ---- the cache -------------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Pictures that lie together, in a folder or in a tar (`data.tars.Tar`)."""

    @property
    def key(self) -> str:
        """A name for their folder in the cache, unlike that of any other source."""
        ...

    @property
    def names(self) -> list[str]: ...

    def stamps(self) -> list[Stamp]:
        """Return name, size and mtime (ns) of each picture."""
        ...

    def openers(self, numbers: Sequence[int]) -> Iterable[Opener]:
        """Return what opens each of the pictures with these numbers, which ascend."""
        ...


@dataclass(frozen=True)
class Files:
    """The pictures `names` in a folder."""

    names: list[str]
    folder: Path

    @property
    def key(self) -> str:
        path = self.folder.resolve()
        return f"{path.name}-{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()[:8]}"

    def stamps(self) -> list[Stamp]:
        try:
            stats = [os.stat(f"{self.folder}/{name}") for name in self.names]  # pathlib is slow for 100,000 of them
        except OSError as error:
            raise UserError(f"cannot read the picture {error.filename} ({error.strerror}); put it back") from None
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(self.names, stats, strict=True)]

    def openers(self, numbers: Sequence[int]) -> Iterable[Opener]:
        return (partial(open_picture, self.folder / self.names[number]) for number in numbers)


class FeatureCache:
    """The features that one frozen encoder has made of one view of pictures.

    Args:
        folder: `data.cache`; rows_per_file: `data.shard_rows`, the share that processes take turns at.
    """

    def __init__(
        self,
        folder: Path,
        encoder: Encoder,
        transform: Transform,
        precision: torch.dtype,
        device: torch.device,
        rows_per_file: int,
        view: View = WHOLE,
    ) -> None:
        self.encoder, self.transform, self.precision, self.device = encoder, transform, precision, device
        self.rows_per_file, self.view = rows_per_file, view
        identity = {
            "encoder": {name: value for name, value in encoder.identity.items() if name != "source"},
            "spatial": encoder.spatial,
            "transform": asdict(transform),
            "precision": str(precision).removeprefix("torch."),
            "view": asdict(view),
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.place = folder / f"{encoder.identity['name'].replace('/', '_')}-{key}"

    def find(self, source: Source) -> Features | None:
        """Return the features of a source's pictures if all are in the cache, else None."""
        features, missing = self.look_up(source)
        return None if missing else features

    def fill(self, *sources: Source, note: str = "") -> list[Features]:
        """Return the features of each source's pictures, after encoding what is missing.

        Several processes share the work. Raises UserError for a picture that cannot be read or that changes meanwhile,
        and for a disk that cannot take the rows.
        """
        found = [self.look_up(source) for source in sources]
        if distributed.any_of(any(missing for _, missing in found)):
            try:
                with distributed.locked(self.place / "lock", f"another process encodes into {self.place}/"):
                    self.encode_missing(sources, note)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the same command goes on with encoding where it stopped") from None
            except OSError as error:
                raise UserError(
                    f"cannot keep encoded pictures in {self.place}: {error.strerror or error}; make room or set "
                    "data.cache=FOLDER"
                ) from None
            found = [self.look_up(source) for source in sources]
        for source, (_, missing) in zip(sources, found, strict=True):
            if missing:
                raise UserError(f"{source.names[missing[0]]} has changed while it was encoded; start again")
        return [features for features, _ in found]

    def look_up(self, source: Source) -> tuple[Features, list[int]]:
        """Return the features that are there, and the numbers of the pictures that are missing or have changed."""
        stamps = source.stamps()
        row_of: dict[str, tuple[Stamp, int]] = {}  # by name; a later file counts more than an earlier one
        files, first = [], 0
        for path in sorted((self.place / source.key).glob("*.json")):
            manifest, rows = self.open(path)
            if rows is not None:
                done = manifest["pictures"][: manifest["rows_done"]]
                row_of |= {stamp[0]: (stamp, first + row) for row, stamp in enumerate(done)}
                files.append(rows)
                first += len(rows)
        places = np.full(len(stamps), -1)  # (P,)
        for number, stamp in enumerate(stamps):
            saved, row = row_of.get(stamp[0], (None, -1))
            if saved == stamp:
                places[number] = row
        return Features(files, source.names, places), np.flatnonzero(places < 0).tolist()

    def open(self, path: Path) -> tuple[dict[str, Any], torch.Tensor | None]:
        """Return what a manifest says, and the rows beside it as they lie on disk; no rows if either is damaged."""
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            rows = np.load(path.with_suffix(".npy"), mmap_mode="c")
            done, pictures = manifest["rows_done"], manifest["pictures"]
            whole = rows.dtype == np.float16 and rows.shape == (len(pictures), *self.encoder.feature_shape)
            if whole and 0 <= done <= len(pictures) and all(len(stamp) == 3 for stamp in pictures):
                return manifest, torch.from_numpy(rows)
        except (OSError, ValueError, EOFError, KeyError, TypeError):
            pass
        return {}, None

    def encode_missing(self, sources: Sequence[Source], note: str) -> None:
        """Encode what is missing into new files, each process its share of them; only one job does so at a time."""
        chunks: list[tuple[Source, list[int], list[Stamp], Path]] = []
        for source in sources:
            stamps = source.stamps()  # before any picture is opened: one that changes meanwhile is found out
            _, missing = self.look_up(source)
            folder = self.place / source.key
            taken = [int(path.stem) for path in folder.glob("*.*") if path.stem.isdecimal()]  # rows or manifest
            parts = [missing[i : i + self.rows_per_file] for i in range(0, len(missing), self.rows_per_file)]
            chunks += [
                (source, part, [stamps[i] for i in part], folder / f"{number:05}.npy")
                for number, part in enumerate(parts, start=max(taken, default=-1) + 1)
            ]
        if not distributed.any_of(bool(chunks)):  # once all processes have looked, before any writes
            return  # another job has encoded them meanwhile
        mine, total, done = distributed.share(chunks), sum(len(part) for _, part, _, _ in chunks), 0
        print(f"encoding {total:,} pictures{note}, once, into {self.place}/")
        extractor = Extractor(self.encoder, self.transform, self.precision, self.device)
        own = sum(len(part) for _, part, _, _ in mine)
        with tqdm(total=own, desc="encoding", unit="img", disable=distributed.bar_hidden()) as bar:
            for source, part, part_stamps, path in mine:
                for rows in self.write(path, source, part, part_stamps, extractor):
                    bar.update(rows)
                    done += rows
                    if bar.disable and (done % SAVE_EVERY < rows or done == own):
                        print(f"encoded {done:,} of {own:,}", flush=True)
        distributed.wait()
        distributed.on_first_rank(self.remove_superseded, [self.place / source.key for source in sources])

    def write(
        self, path: Path, source: Source, numbers: list[int], stamps: list[Stamp], extractor: Extractor
    ) -> Iterator[int]:
        """Encode these pictures of a source, which have these stamps, into a new file; yields how many rows were added.

        Rows count once the manifest says so. They are plain writes, not stores to a map, so that a full disk is an
        error.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest: dict[str, Any] = {"pictures": stamps, "rows_done": 0}
        shape = (len(numbers), *self.encoder.feature_shape)
        begin = np.lib.format.open_memmap(path, "w+", np.float16, shape).offset
        done = 0
        with open(path, "r+b") as file:
            file.seek(begin)
            for batch in extractor.encode(source.openers(numbers), self.view):
                rows = torch.stack([raise_errors(item) for item in batch])  # (b, D) or (b, L, D)
                file.write(rows.numpy().tobytes())
                done += len(rows)
                if done - manifest["rows_done"] >= SAVE_EVERY or done == len(numbers):
                    file.flush()
                    os.fsync(file.fileno())  # before the manifest: a power cut must not leave it promising zeros
                    manifest["rows_done"] = done
                    write_atomically(path.with_suffix(".json"), json.dumps(manifest).encode())
                yield len(rows)

    def remove_superseded(self, folders: list[Path]) -> None:
        """Delete the files none of whose rows count any more; a training that has one mapped keeps it on POSIX."""
        for folder in folders:
            latest: dict[str, Path] = {}
            for path in sorted(folder.glob("*.npy")):
                manifest, _ = self.open(path.with_suffix(".json"))
                names = [stamp[0] for stamp in manifest["pictures"][: manifest["rows_done"]]] if manifest else []
                latest |= dict.fromkeys(names, path)
            every = {path.with_suffix(".npy") for path in folder.glob("*.*") if path.stem.isdecimal()}
            for path in every - set(latest.values()):
                with contextlib.suppress(OSError):  # Windows deletes no file that is mapped
                    path.unlink(missing_ok=True)
                    path.with_suffix(".json").unlink(missing_ok=True)
