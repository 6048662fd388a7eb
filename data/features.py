"""Frozen-encoder features, computed once per picture and kept on disk.

`cache/<encoder>-<key>/00000/`, the first shard, holds features.npy (fp16 rows, in the order of the picture names) and
manifest.json: what made the rows, each picture's name, size and mtime, and `rows_done`. Rows count only once the
manifest says so: after a kill, encoding goes on from there.
"""

from cli import UserError

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

import distributed
from data.dataset import Features
from data.transforms import WHOLE, View, open_picture, other_views
from utils import pick_precision, write_atomically

if TYPE_CHECKING:  # it imports this file
    from models.model import CaptionModel

Item = TypeVar("Item")
Result = TypeVar("Result")
Opener = Callable[[], Image.Image]  # opens a picture, wherever it lies

BATCH = {"cpu": 8, "mps": 32, "cuda": 128}  # 8 pictures keep a CPU's activations in its cache
SAVE_EVERY = 256  # pictures between two manifests: the most a kill can cost


class Extractor:
    """Encodes pictures at full speed with a frozen copy of the model's encoder: the one way from pixels to features."""

    def __init__(self, model: "CaptionModel", device: torch.device) -> None:
        self.transform, self.device = model.transform, device
        self.dtype = pick_precision(model.config.train.precision, device)
        self.batch = BATCH[device.type]
        self._encoder = model.encoder.for_inference(self.dtype).to(device)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pictures (B, 3, S, S), however many, as fp16 rows (B, D) or (B, L, D), on the CPU."""
        rows = []
        for part in pixels.split(self.batch):
            images = self.transform.normalise(part.to(self.device, non_blocking=True))
            encoded = self._encoder(images.to(self.dtype, memory_format=torch.channels_last))
            rows.append(encoded.to(torch.float16).cpu())
        return torch.cat(rows)

    def read(self, openers: Iterable[Opener], view: View = WHOLE) -> Iterator[torch.Tensor]:
        """Yield a view of each picture as uint8 batches (b, 3, S, S)."""
        for pictures in read_ahead(lambda opener: self.transform.resize(opener(), view), openers, self.batch):
            yield torch.stack(pictures)


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


def encode_pictures(
    model: "CaptionModel", names: Sequence[str], folder: Path, device: torch.device, view: View = WHOLE
) -> Features:
    """Return the features of these pictures in `folder`: from the cache, filled, where the encoder is frozen."""
    if model.config.encoder.frozen:
        return FeatureCache(model, sorted(names), folder, device, view).fill()
    extractor = Extractor(model, device)
    rows = torch.cat([extractor(pixels) for pixels in extractor.read(Files(list(names), folder).openers())])
    return Features([rows], names)


class Source(Protocol):
    """Pictures in a fixed order, of which the features make a shard."""

    def __len__(self) -> int: ...

    def stamps(self) -> list[list[Any]]:
        """Return name, size and mtime of what the pictures lie in: of each, or of one file for all."""
        ...

    def openers(self, first: int = 0) -> Iterable[Opener]:
        """Return what opens each picture from this place on."""
        ...


@dataclass(frozen=True)
class Files:
    """Pictures that are files in a folder."""

    names: list[str]
    folder: Path

    def __len__(self) -> int:
        return len(self.names)

    def stamps(self) -> list[list[Any]]:
        try:
            stats = [os.stat(f"{self.folder}/{name}") for name in self.names]  # pathlib is slow for 100,000 of them
        except OSError as error:
            raise UserError(f"cannot read the picture {error.filename} ({error.strerror}); put it back") from None
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(self.names, stats, strict=True)]

    def openers(self, first: int = 0) -> Iterable[Opener]:
        return (partial(open_picture, self.folder / name) for name in self.names[first:])


class Shards:
    """The features of pictures from several sources, a shard for each, in the folder `place`."""

    def __init__(
        self, model: "CaptionModel", device: torch.device, view: View, place: Path, shards: list["Shard"]
    ) -> None:
        self.model, self.device, self.view, self.place, self.shards = model, device, view, place, shards

    def complete(self) -> None:
        """Encode what is missing; several processes share the shards.

        Raises UserError for a picture that cannot be read and for a disk that cannot take the rows.
        """
        try:
            missing = [shard for shard in distributed.share(self.shards) if not shard.is_whole()]
            if missing:
                self.encode(missing)
            distributed.wait()
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command goes on with encoding where it stopped") from None
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot keep encoded pictures in {self.place}: {reason}; make room or set data.cache=FOLDER"
            ) from None

    def encode(self, shards: list["Shard"]) -> None:
        total = sum(len(shard.source) for shard in shards)
        extractor = Extractor(self.model, self.device)
        views = [WHOLE, *other_views(self.model.config.train.mirror, self.model.config.train.corners)]
        which = "" if self.view == WHOLE else f", view {views.index(self.view) + 1} of {len(views)}"
        print(f"encoding {total:,} pictures{which}, once, into {self.place}/")
        done = 0
        with tqdm(total=total, desc="encoding", unit="img", disable=distributed.bar_hidden()) as bar:
            for rows in (rows for shard in shards for rows in shard.fill(extractor, self.view)):
                bar.update(rows)
                done += rows
                if bar.disable and (done % SAVE_EVERY < rows or done == total):
                    print(f"encoded {done:,} of {total:,}", flush=True)


class FeatureCache(Shards):
    """The features of the pictures `names` in `folder`, kept below `data.cache` in shards of `data.shard_rows`."""

    def __init__(
        self, model: "CaptionModel", names: list[str], folder: Path, device: torch.device, view: View = WHOLE
    ) -> None:
        self.names, self.folder = names, folder
        made_by = identity(model, device, view) | {"folder": str(folder.resolve())}
        place = cache_place(model, made_by, names)
        rows, shape = model.config.data.shard_rows, model.encoder.feature_shape
        shards = [
            Shard(place / f"{first // rows:05}", Files(names[first : first + rows], folder), shape, made_by)
            for first in range(0, len(names), rows)
        ]
        super().__init__(model, device, view, place, shards)

    def find(self) -> Features | None:
        """Return the features when all of them are there, else None."""
        return self.open() if all(shard.is_whole() for shard in self.shards) else None

    def open(self) -> Features:
        return Features([shard.open() for shard in self.shards], self.names)

    def fill(self) -> Features:
        """Return the features, after encoding those that are missing."""
        self.complete()
        return self.open()


def identity(model: "CaptionModel", device: torch.device, view: View) -> dict[str, Any]:
    """Return what features depend on besides the pictures.

    The weights are known by their hash: where their file lies may differ from one environment to the next.
    """
    made_by = {
        "encoder": {name: value for name, value in model.encoder.identity.items() if name != "source"},
        "grid": model.encoder.grid,
        "transform": asdict(model.transform),
        "computed_in": str(pick_precision(model.config.train.precision, device)).removeprefix("torch."),
    }
    return made_by | {name: value for name, value in asdict(view).items() if value != getattr(WHOLE, name)}


def cache_place(model: "CaptionModel", *made_by: Any) -> Path:
    """Return the folder below `data.cache` for features that were made by this."""
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
    return Path(model.config.data.cache) / f"{model.config.encoder.name}-{key}"


class Shard:
    """The features of the pictures of one source in a folder of their own, made by one process at a time.

    Rows count when encoder, transform, precision and names are the same and the sizes and mtimes of files are too.
    """

    def __init__(self, place: Path, source: Source, shape: tuple[int, ...], identity: dict[str, Any]) -> None:
        self.place, self.source, self.identity = place, source, identity
        self.shape = [len(source), *shape]

    def is_whole(self) -> bool:
        return self.manifest()[0]["rows_done"] == len(self.source)

    def open(self) -> torch.Tensor:
        """Return the rows as they lie on disk: what is read of them takes memory that the system can have back."""
        return torch.from_numpy(np.load(self.place / "features.npy", mmap_mode="c"))

    def fill(self, extractor: Extractor, view: View) -> Iterator[int]:
        """Encode the rows that are missing; yields how many are there, then how many more.

        Plain writes, not stores to a map, so that a full disk is an error.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        with FileLock(self.place / "lock"):
            manifest, reason = self.manifest()
            if reason:
                print(f"{self.place}: rows from {manifest['rows_done']:,} on are not used: {reason}")
            done = manifest["rows_done"]
            yield done
            if done == len(self.source):
                return
            path = self.place / "features.npy"
            mode = "r+" if done else "w+"
            start = np.lib.format.open_memmap(path, mode, np.float16, tuple(self.shape)).offset
            with open(path, "r+b") as file:
                file.seek(start + done * 2 * math.prod(self.shape[1:]))
                for pixels in extractor.read(self.source.openers(done), view):
                    file.write(extractor(pixels).numpy().tobytes())
                    done += len(pixels)
                    if done - manifest["rows_done"] >= SAVE_EVERY or done == len(self.source):
                        file.flush()
                        os.fsync(file.fileno())  # before the manifest: a power cut must not leave it promising zeros
                        manifest["rows_done"] = done
                        write_atomically(self.place / "manifest.json", json.dumps(manifest).encode())
                    yield len(pixels)

    def manifest(self) -> tuple[dict[str, Any], str | None]:
        """Return the expected manifest, with `rows_done` set to the rows on disk that still match, and the reason if
        some do not.
        """
        pictures = self.source.stamps()
        wanted: dict[str, Any] = {"identity": self.identity, "shape": self.shape, "rows_done": 0, "pictures": pictures}
        found = read_manifest(self.place)
        if found is None:
            return wanted, None
        reason = None
        if found["identity"] != json.loads(json.dumps(self.identity)) or found["shape"] != self.shape:
            reason = "another encoder made them"
        elif not has_rows(self.place / "features.npy", self.shape):
            reason = "features.npy is missing or cut short"
        else:
            old = found["pictures"][: found["rows_done"]]
            changed = [row for row, (was, now) in enumerate(zip(old, pictures, strict=False)) if was != now]
            whole = len(found["pictures"]) == len(pictures) and 0 <= found["rows_done"] <= len(self.source)
            wanted["rows_done"] = changed[0] if changed else found["rows_done"] * whole
            if changed:
                reason = f"{pictures[changed[0]][0]} has changed since"
        return wanted, reason


def read_manifest(place: Path) -> dict[str, Any] | None:
    """Return the manifest in `place`, or None when there is none that can be read."""
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    kinds = {"identity": dict, "shape": list, "rows_done": int, "pictures": list}
    whole = isinstance(manifest, dict) and all(isinstance(manifest.get(key), kind) for key, kind in kinds.items())
    return manifest if whole else None


def has_rows(path: Path, shape: list[int]) -> bool:
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return rows.dtype == np.float16 and list(rows.shape) == shape
