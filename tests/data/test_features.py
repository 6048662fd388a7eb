"""The feature cache: each picture is encoded once, a change costs that picture alone, and no doubtful row is used."""

import copy
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache as memoise
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from captioning import feature_cache
from data import features
from data.features import Extractor, FeatureCache, Files, encode_files
from data.folders import ImageFolders
from data.transforms import Transform, View, open_picture
from models.encoder import EncoderCNN
from models.model import CaptionModel

ROOT = Path(features.__file__).parents[1]
FOLDER = Path("archive/images")
NAMES = [f"{number:02}.jpg" for number in range(12)]
ALL = Files(NAMES, FOLDER)
for_inference = memoise(EncoderCNN.for_inference)


@pytest.fixture
def cache(archive: Path, tiny_model: CaptionModel, monkeypatch: pytest.MonkeyPatch) -> FeatureCache:
    monkeypatch.setattr(EncoderCNN, "for_inference", for_inference)  # made once for all tests, which takes its time
    return feature_cache(tiny_model)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures opened since; two are encoded at a time."""
    monkeypatch.setattr(features, "BATCH", {"cpu": 2})
    names: list[str] = []

    def note_and_open(path: Path, least: int) -> Image.Image:
        names.append(path.name)
        return open_picture(path)

    monkeypatch.setattr(features, "open_picture", note_and_open)
    return names


def assert_direct(rows: torch.Tensor, model: CaptionModel, names: list[str] = NAMES) -> None:
    """These are the features (B, D) that the encoder itself makes of these pictures."""
    with torch.inference_mode():
        own = model.encoder(torch.stack([model.transform(open_picture(FOLDER / name)) for name in names]))
    torch.testing.assert_close(rows.float(), own, rtol=2e-3, atol=2e-3)


def files(cache: FeatureCache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache.place / ALL.key).iterdir()}


def replace_picture(name: str) -> None:
    """Change a picture and its size in bytes, but not its time."""
    before = (FOLDER / name).stat().st_mtime_ns
    Image.new("RGB", (64, 64), "red").save(FOLDER / name)
    os.utime(FOLDER / name, ns=(before, before))


def touch_picture(name: str) -> None:
    os.utime(FOLDER / name, (1000, 1000))


def stop_after(batches: int, cache: FeatureCache) -> None:
    """Press Ctrl-C when so many batches are encoded."""
    encode, calls = Extractor.__call__, []

    def encode_or_stop(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(pixels)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return encode(self, pixels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="resumes encoding"):
        patch.setattr(Extractor, "__call__", encode_or_stop)
        cache.fill(ALL)


def test_each_picture_is_encoded_once_and_taken_by_name_or_place(
    cache: FeatureCache, opened: list[str], tiny_model: CaptionModel
) -> None:
    assert cache.find(ALL) is None
    filled = cache.fill(ALL)
    rows = filled.take(NAMES)
    assert (rows.shape, rows.dtype, len(rows.unique(dim=0))) == ((12, 512), torch.float16, 12)
    assert_direct(rows, tiny_model)
    assert torch.equal(filled.take(["07.jpg", "02.jpg"]), rows[[7, 2]])
    assert torch.equal(filled.take(filled.index(["07.jpg", "02.jpg"])), rows[[7, 2]])
    assert sorted(opened) == NAMES
    again = feature_cache(tiny_model)
    for found in (again.find(ALL), again.fill(ALL)):
        assert found and torch.equal(found.take(NAMES), rows)
    assert len(opened) == 12


@pytest.mark.parametrize("rows_per_file", [2000, 5])
@pytest.mark.parametrize("what", ["added", "removed", replace_picture, touch_picture])
def test_a_change_costs_that_picture_alone(
    what: str | Callable, rows_per_file: int, cache: FeatureCache, opened: list[str], tiny_model: CaptionModel
) -> None:
    cache.rows_per_file = rows_per_file
    others = [name for name in NAMES if name != "05.jpg"]
    before, after = others if what == "added" else NAMES, others if what == "removed" else NAMES
    old = cache.fill(Files(before, FOLDER))
    kept, rows = files(cache), old.take(others)
    assert len(old.files) == -(-len(before) // rows_per_file)
    opened.clear()
    if callable(what):
        what("05.jpg")
        assert cache.find(ALL) is None
    new = cache.fill(Files(after, FOLDER))
    assert opened == ([] if what == "removed" else ["05.jpg"])
    assert torch.equal(new.take(others), rows)
    assert_direct(new.take(np.arange(len(after))), tiny_model, after)  # in the order of the names
    assert files(cache).items() >= kept.items()  # no file is written again


def test_what_a_training_reads_stays_while_another_fills_the_cache(
    cache: FeatureCache, opened: list[str], tiny_model: CaptionModel
) -> None:
    mapped = cache.fill(ALL)
    found = cache.find(ALL)
    assert found  # through another map: of the first one, nothing is in memory yet
    expected, old = found.take(NAMES), files(cache)
    for name in NAMES:
        replace_picture(name)
    changed = cache.fill(ALL)
    assert_direct(changed.take(NAMES), tiny_model)
    assert torch.equal(mapped.take(NAMES), expected)
    if os.name == "posix":  # Windows deletes no file that is mapped
        assert files(cache).keys() == {"00001.npy", "00001.json"} and not files(cache).keys() & old.keys()


@pytest.mark.parametrize(("batches", "kept"), [(1, 0), (5, 8)])
def test_encoding_goes_on_where_it_was_interrupted(
    batches: int, kept: int, cache: FeatureCache, opened: list[str], tiny_model: CaptionModel
) -> None:
    cache.rows_per_file = 4
    stop_after(batches, cache)
    assert cache.find(ALL) is None
    opened.clear()
    filled = cache.fill(ALL)
    assert sorted(opened) == NAMES[kept:]
    assert_direct(filled.take(NAMES), tiny_model)
    assert len(files(cache)) == 2 * 3  # nothing is left of the file that was interrupted


def test_of_two_jobs_the_second_waits_and_encodes_nothing(
    cache: FeatureCache, opened: list[str], tiny_model: CaptionModel, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, go_on, encode, by = Event(), Event(), Extractor.__call__, set[Extractor]()

    def encode_later(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        by.add(self)
        begun.set()
        assert go_on.wait(60)
        return encode(self, pixels)

    said = ""
    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "__call__", encode_later)
        jobs = [pool.submit(cache.fill, ALL)]
        assert begun.wait(60)
        jobs.append(pool.submit(feature_cache(tiny_model).fill, ALL))
        while (
            f"({os.getpid()} on {platform.node()}) is encoding into cache/resnet18-" not in said
            and not jobs[1].done()
            and len(by) == 1
        ):
            time.sleep(0.01)
            said += capsys.readouterr().out
        go_on.set()
        rows = [job.result().take(NAMES) for job in jobs]
    said += capsys.readouterr().out
    assert "waiting for its end" in said and said.count("encoding 12 pictures") == said.count(" pictures, once") == 1
    assert sorted(opened) == NAMES and torch.equal(*rows)


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "rows cut short": lambda rows, manifest: os.truncate(rows, 5000),
    "rows empty": lambda rows, manifest: rows.write_bytes(b""),
    "rows lost": lambda rows, manifest: rows.unlink(),
    "rows of fewer pictures": lambda rows, manifest: np.save(rows, np.zeros((11, 512), np.float16)),
    "manifest cut short": lambda rows, manifest: os.truncate(manifest, 100),
    "manifest lost": lambda rows, manifest: manifest.unlink(),
    "manifest not text": lambda rows, manifest: manifest.write_bytes(b"\xff\x00"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_encoded_again_and_never_counted(
    damage: str, cache: FeatureCache, opened: list[str], tiny_model: CaptionModel
) -> None:
    cache.fill(ALL)
    DAMAGES[damage](cache.place / ALL.key / "00000.npy", cache.place / ALL.key / "00000.json")
    assert cache.find(ALL) is None
    stop_after(1, cache)
    assert cache.look_up(ALL)[1] == [list(range(12))]  # nor what is left of it beside the new rows
    opened.clear()
    filled = cache.fill(ALL)
    assert sorted(opened) == NAMES
    assert_direct(filled.take(NAMES), tiny_model)
    assert len(files(cache)) == 2 or os.name != "posix"


def test_another_encoder_transform_precision_view_or_folder_has_rows_of_its_own(
    cache: FeatureCache, tiny_model: CaptionModel
) -> None:
    cache.fill(ALL)
    spatial, other = copy.copy(tiny_model.encoder), copy.copy(tiny_model.encoder)
    spatial.spatial = True
    other.identity = other.identity | {"sha256": "0" * 64}
    for other_cache in (
        replace(cache, extractor=replace(cache.extractor, encoder=spatial)),
        replace(cache, extractor=replace(cache.extractor, encoder=other)),
        replace(cache, extractor=replace(cache.extractor, transform=Transform(32, interpolation="bicubic"))),
        replace(cache, extractor=replace(cache.extractor, precision=torch.bfloat16)),
        replace(cache, view=View(corner=1)),
    ):
        assert other_cache.find(ALL) is None
    shutil.copytree(FOLDER, "copies")
    assert cache.find(Files(NAMES, Path("copies"))) is None
    moved = copy.copy(tiny_model.encoder)
    moved.identity = moved.identity | {"source": "/another/venv/resnet18.pth"}  # where weights lie does not matter
    assert replace(cache, extractor=replace(cache.extractor, encoder=moved), rows_per_file=7).find(ALL)


def test_mirror_images_are_encoded_mirrored(
    archive: Path, tiny_model: CaptionModel, capsys: pytest.CaptureFixture[str]
) -> None:
    mirrored = feature_cache(tiny_model, View(mirrored=True)).fill(ALL, note=", view 2 of 3")
    assert "encoding 12 pictures, view 2 of 3, once, into cache/resnet18-" in capsys.readouterr().out
    for name in NAMES:
        ImageOps.mirror(open_picture(FOLDER / name)).save(FOLDER / name, lossless=True, format="WEBP")
    assert_direct(mirrored.take(NAMES), tiny_model)


def test_a_broken_or_missing_picture_is_named(cache: FeatureCache, tiny_model: CaptionModel, refused: Callable) -> None:
    extractor = Extractor(tiny_model.encoder, tiny_model.transform, torch.float32, torch.device("cpu"), Path("cache"))
    assert_direct(
        encode_files(extractor, NAMES[::-3], ImageFolders({"": FOLDER})).take(NAMES[::-3]), tiny_model, NAMES[::-3]
    )
    assert not Path("cache").exists()  # a backbone that is trained encodes anew each time, into memory
    (FOLDER / "06.jpg").write_bytes((FOLDER / "06.jpg").read_bytes()[:500])
    for fill in (lambda: cache.fill(ALL), lambda: encode_files(extractor, NAMES, ImageFolders({"": FOLDER}))):
        with refused("archive/images/06.jpg", "replace it"):
            fill()
    [*_, last] = [item for batch in extractor.encode(ALL.openers(range(5, 8))) for item in batch]
    assert isinstance(last, torch.Tensor)  # those beside it are encoded all the same
    (FOLDER / "06.jpg").unlink()
    with refused("archive/images/06.jpg", "put it back"):
        cache.fill(ALL)


def test_all_broken_pictures_are_named_at_once_and_the_others_encoded(
    cache: FeatureCache, tiny_model: CaptionModel, refused: Callable
) -> None:
    for number in (3, 6, 7):
        (FOLDER / f"{number:02}.jpg").write_bytes(b"\xff\xd8\xff")
    with refused("3 of 12 pictures cannot be read (03.jpg, 06.jpg, 07.jpg)", "data.broken=skip"):
        cache.fill(ALL)
    left = [name for name in NAMES if name not in ("03.jpg", "06.jpg", "07.jpg")]
    found = cache.fill(ALL, skip_broken=True)
    assert found.names == left
    assert_direct(found.take(left), tiny_model, left)
    before = files(cache)
    cache.fill(ALL, skip_broken=True)
    assert files(cache) == before  # a picture that is still broken leaves nothing behind


def overflowing(model: CaptionModel) -> EncoderCNN:
    """A copy of the model's encoder with larger weights at its end, as random ones are in a deep network."""
    encoder = copy.deepcopy(model.encoder)
    encoder.backbone.get_parameter("layer4.1.bn2.weight").data.fill_(1e6)
    return encoder


def test_infinite_features_are_refused_and_none_is_kept(
    cache: FeatureCache, tiny_model: CaptionModel, refused: Callable
) -> None:
    cache.extractor = replace(cache.extractor, encoder=overflowing(tiny_model))
    for fill in (lambda: cache.fill(ALL), lambda: encode_files(cache.extractor, NAMES, ImageFolders({"": FOLDER}))):
        with refused("resnet18", "encoder.weights=null", "archive/images/00.jpg", "infinite or NaN", "take weights"):
            fill()
    assert not files(cache) and cache.find(ALL) is None


def test_a_picture_whose_features_alone_are_not_finite_is_treated_like_a_broken_one(
    cache: FeatureCache, tiny_model: CaptionModel, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, extractor = Extractor.__call__, cache.extractor
    Image.new("RGB", (64, 64), "white").save(FOLDER / "06.jpg")

    def encode_with_overflow(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        rows = encode(self, pixels).clone()
        rows[(pixels == 255).flatten(1).all(1), 7] = torch.nan
        return rows

    monkeypatch.setattr(Extractor, "__call__", encode_with_overflow)
    cache.rows_per_file = 4
    with refused("archive/images/06.jpg are infinite or NaN", "leave the picture out"):
        cache.fill(ALL)
    assert sum(name.endswith(".npy") for name in files(cache)) == 3  # all others are encoded
    found = [item for batch in extractor.encode(ALL.openers(range(12))) for item in batch]
    assert [number for number, item in enumerate(found) if not isinstance(item, torch.Tensor)] == [6]


def test_a_picture_that_changes_while_it_is_encoded_is_named(
    cache: FeatureCache, tiny_model: CaptionModel, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_and_change(path: Path, least: int) -> Image.Image:
        picture = open_picture(path)
        if path.name == "05.jpg":
            replace_picture(path.name)
        return picture

    monkeypatch.setattr(features, "open_picture", open_and_change)
    with refused("05.jpg changed while it was being encoded", "start again"):
        cache.fill(ALL)
    monkeypatch.setattr(features, "open_picture", open_picture)
    assert_direct(cache.fill(ALL).take(NAMES), tiny_model)


def test_a_full_disk_is_one_sentence_and_encoding_goes_on_later(
    cache: FeatureCache, opened: list[str], full_disk: Callable, refused: Callable
) -> None:
    Path("cache").touch()
    with refused("cannot keep encoded pictures in cache/", "data.cache=FOLDER"):
        cache.fill(ALL)
    Path("cache").unlink()
    cache.rows_per_file = 4
    stop_after(3, cache)
    with full_disk(3000), refused(f"cannot keep encoded pictures in {cache.place}", "File too large", "data.cache="):
        cache.fill(ALL)
    assert cache.find(ALL) is None
    opened.clear()
    assert len(cache.fill(ALL).take(NAMES)) == 12
    assert sorted(opened) == NAMES[4:]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds a file by its handle, as Linux shows it")
def test_rows_are_on_the_disk_before_the_manifest_counts_them(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.rows_per_file, synced = 4, list[str]()
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    cache.fill(ALL)
    kinds = ["manifest" if ".json" in path else Path(path).suffix for path in synced if not Path(path).is_dir()]
    assert kinds == [".npy", "manifest"] * 3
