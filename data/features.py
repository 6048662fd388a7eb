"""Frozen-encoder features, computed once per picture and kept on disk.

`cache/<encoder>-<key>/` holds features.npy (fp16 rows, in the order of the picture names) and manifest.json: what made
the rows, each picture's name, size and mtime, and `rows_done`. Rows count only once the manifest says so: after a
kill, encoding goes on from there.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from config import UserError
from data.transforms import Transform, open_picture
from models.encoder import EncoderCNN
from utils import pick_precision, write_atomically

BATCH = {"cpu": 8, "mps": 32, "cuda": 128}  # 8 pictures keep a CPU's activations in its cache
SAVE_EVERY = 256  # pictures between two manifests: the most a kill can cost


class Extractor:
    """Encodes pictures at full speed with a frozen copy of `encoder`: the one way from pixels to features.

    Args:
        precision: as `train.precision`.
    """

    def __init__(self, encoder: EncoderCNN, transform: Transform, device: torch.device, precision: str) -> None:
        self.transform, self.device = transform, device
        self.dtype = pick_precision(precision, device)
        self.batch = BATCH[device.type]
        self._encoder = encoder.for_inference(self.dtype).to(device)

    @torch.inference_mode()
    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode uint8 pictures (B, 3, S, S) as fp16 rows (B, D) or (B, L, D), on the CPU."""
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True))
        rows = self._encoder(images.to(self.dtype, memory_format=torch.channels_last))
        return rows.to(torch.float16).cpu()

    def read(self, paths: Sequence[Path]) -> Iterator[torch.Tensor]:
        """Yield the pictures as uint8 batches (b, 3, S, S), read by threads one batch ahead of the encoder."""
        with ThreadPoolExecutor() as pool:
            ahead = None
            for first in range(0, len(paths), self.batch):
                batch = [pool.submit(self.read_one, path) for path in paths[first : first + self.batch]]
                if ahead:
                    yield torch.stack([picture.result() for picture in ahead])
                ahead = batch
            if ahead:
                yield torch.stack([picture.result() for picture in ahead])

    def read_one(self, path: Path) -> torch.Tensor:
        return self.transform.resize(open_picture(path))


def load_features(
    names: list[str],
    folder: Path,
    cache: Path,
    encoder: EncoderCNN,
    transform: Transform,
    device: torch.device,
    precision: str,
) -> np.ndarray:
    """Return the features of the pictures `names` in `folder`: a memory map (len(names), D) or (…, L, D), row by name.

    Rows that the cache has are used when encoder, transform, names and the pictures' sizes and mtimes are the same;
    the others are encoded first, under a lock. Raises UserError for a picture that cannot be read.
    """
    identity = {
        "encoder": encoder.identity,
        "grid": encoder.grid,
        "transform": asdict(transform),
        "computed_in": str(pick_precision(precision, device)).removeprefix("torch."),
        "folder": str(folder.resolve()),
    }
    key = hashlib.sha256(json.dumps([identity, names]).encode()).hexdigest()[:12]
    place = cache / f"{encoder.config.name}-{key}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "lock"):
            manifest = matching_manifest(place, identity, names, folder, encoder.feature_shape)
            if manifest["rows_done"] < len(names):
                extractor = Extractor(encoder, transform, device, precision)
                fill(place, manifest, [folder / name for name in names], extractor)
        return np.load(place / "features.npy", mmap_mode="r")
    except OSError as error:
        raise UserError(
            f"cannot keep encoded pictures in {place}: {error.strerror or error}; make room or set data.cache=FOLDER"
        ) from None


def matching_manifest(
    place: Path, identity: dict[str, Any], names: list[str], folder: Path, row_shape: tuple[int, ...]
) -> dict[str, Any]:
    """Return the manifest of what is asked for, with `rows_done` as far as what lies in `place` agrees with it."""
    stats = [(folder / name).stat() for name in names]
    pictures = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)]
    wanted = {"identity": identity, "shape": [len(names), *row_shape], "rows_done": 0, "pictures": pictures}
    found = read_manifest(place)
    if found is None:
        return wanted
    reason = None
    if found["identity"] != json.loads(json.dumps(identity)) or found["shape"] != wanted["shape"]:
        reason = "it was made by another encoder"
    elif not has_rows(place / "features.npy", wanted["shape"]):
        reason = "its rows are missing or cut short"
    else:
        pairs = zip(found["pictures"], pictures, strict=True)
        same = next((row for row, (old, new) in enumerate(pairs) if old != new), len(names))
        wanted["rows_done"] = min(found["rows_done"], same)
        if same < found["rows_done"]:
            reason = f"{names[same]} has changed since"
    if reason:
        print(f"{place}: encoding again from row {wanted['rows_done']:,}: {reason}")
    return wanted


def read_manifest(place: Path) -> dict[str, Any] | None:
    """Return the manifest in `place`, or None when there is none that can be read."""
    try:
        manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    complete = isinstance(manifest, dict) and manifest.keys() >= {"identity", "shape", "rows_done", "pictures"}
    return manifest if complete else None


def has_rows(path: Path, shape: list[int]) -> bool:
    try:
        rows = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return rows.dtype == np.float16 and list(rows.shape) == shape


def fill(place: Path, manifest: dict[str, Any], paths: list[Path], extractor: Extractor) -> None:
    """Encode the rows from `rows_done` on. Plain writes, not stores to a map, so that a full disk is an error."""
    shape, done = tuple(manifest["shape"]), manifest["rows_done"]
    path = place / "features.npy"
    if done == 0:
        rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        start = rows.offset
    else:
        start = np.load(path, mmap_mode="r").offset
    row_bytes = 2 * int(np.prod(shape[1:]))
    with open(path, "r+b") as file, tqdm(total=len(paths), initial=done, desc="encoding", unit="img") as bar:
        file.seek(start + done * row_bytes)
        for pixels in extractor.read(paths[done:]):
            file.write(extractor(pixels).numpy().tobytes())
            done += len(pixels)
            bar.update(len(pixels))
            if done - manifest["rows_done"] >= SAVE_EVERY or done == len(paths):
                file.flush()
                manifest["rows_done"] = done
                write_atomically(place / "manifest.json", json.dumps(manifest).encode())
