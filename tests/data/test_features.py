"""The feature cache: each picture is encoded once, and rows of doubtful origin are never used."""

from cli import UserError, run_script

import copy
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data import features
from data.features import Extractor, FeatureCache, Shard
from data.transforms import View, open_picture
from data.vocab import build_vocab
from models.model import CaptionModel
from utils import save_checkpoint

ROOT = Path(features.__file__).parents[1]
CPU = torch.device("cpu")
NAMES = [f"{number:02}.jpg" for number in range(12)]


@pytest.fixture
def cache(archive: Path, tiny_model: CaptionModel) -> FeatureCache:
    return FeatureCache(tiny_model, NAMES, archive / "images", CPU)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of pictures encoded since, two at a time; the manifest is written after every four."""
    monkeypatch.setattr(features, "BATCH", {"cpu": 2})
    monkeypatch.setattr(features, "SAVE_EVERY", 4)
    encode, counts = Extractor.__call__, []

    def count_and_encode(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", count_and_encode)
    return counts


def direct(model: CaptionModel, folder: Path, names: list[str]) -> torch.Tensor:
    with torch.inference_mode():
        return model.encoder(torch.stack([model.transform(open_picture(folder / name)) for name in names]))


def test_rows_equal_direct_encoding(cache: FeatureCache, tiny_model: CaptionModel) -> None:
    rows = cache.fill().take(NAMES)
    assert (rows.shape, rows.dtype) == ((12, 512), torch.float16)
    torch.testing.assert_close(rows.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


def test_rows_are_taken_by_name(cache: FeatureCache) -> None:
    filled = cache.fill()
    assert torch.equal(filled.take(["07.jpg", "02.jpg"]), filled.take(NAMES)[[7, 2]])
    assert len(filled.take(NAMES).unique(dim=0)) == 12


def test_a_second_use_encodes_nothing(cache: FeatureCache, encoded: list[int]) -> None:
    first = cache.fill().take(NAMES)
    assert sum(encoded) == 12
    again = FeatureCache(cache.model, NAMES, cache.folder, CPU).fill().take(NAMES)
    assert sum(encoded) == 12
    assert torch.equal(first, again)


def test_nothing_is_found_until_every_row_is_there(cache: FeatureCache, encoded: list[int]) -> None:
    assert cache.find() is None
    interrupt_after(3, cache)
    assert cache.find() is None
    cache.fill()
    found = cache.find()
    assert found is not None
    assert len(found.take(NAMES)) == 12


def interrupt_after(batches: int, cache: FeatureCache) -> None:
    encode, calls = Extractor.__call__, []

    def encode_or_stop(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(pixels)
        if len(calls) > batches:
            raise KeyboardInterrupt
        return encode(self, pixels)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="goes on with encoding"):
        patch.setattr(Extractor, "__call__", encode_or_stop)
        cache.fill()


@pytest.mark.parametrize(("batches", "rows_kept"), [(0, 0), (1, 0), (3, 4), (5, 8)])
def test_encoding_goes_on_where_it_was_interrupted(
    batches: int, rows_kept: int, cache: FeatureCache, encoded: list[int], tiny_model: CaptionModel
) -> None:
    interrupt_after(batches, cache)
    encoded.clear()
    rows = cache.fill().take(NAMES)
    assert sum(encoded) == 12 - rows_kept
    torch.testing.assert_close(rows.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


KILLED = """
import os, signal, torch
from pathlib import Path
from data import features
from models.model import CaptionModel

features.BATCH, features.SAVE_EVERY = {"cpu": 2}, 4
encode, calls = features.Extractor.__call__, []

def encode_or_die(self, pixels):
    calls.append(pixels)
    if len(calls) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, pixels)

features.Extractor.__call__ = encode_or_die
folder = Path("archive", "images")
names = sorted(path.name for path in folder.iterdir())
model = CaptionModel.from_checkpoint("model.pth")
features.FeatureCache(model, names, folder, torch.device("cpu")).fill()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL does not exist here")
def test_encoding_goes_on_after_a_kill(cache: FeatureCache, encoded: list[int], tiny_model: CaptionModel) -> None:
    save_checkpoint(Path("model.pth"), tiny_model.state())
    killed = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    rows = cache.fill().take(NAMES)
    assert sum(encoded) == 12 - 4
    torch.testing.assert_close(rows.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


def replace_picture(cache: FeatureCache) -> None:
    Image.new("RGB", (64, 64), "red").save(cache.folder / "05.jpg")


def touch_picture(cache: FeatureCache) -> None:
    os.utime(cache.folder / "05.jpg", (1000, 1000))


@pytest.mark.parametrize("change", [replace_picture, touch_picture])
def test_a_changed_picture_is_encoded_again(
    change: Callable, cache: FeatureCache, encoded: list[int], tiny_model: CaptionModel
) -> None:
    cache.fill()
    encoded.clear()
    change(cache)
    assert cache.find() is None
    rows = cache.fill().take(NAMES)
    assert 0 < sum(encoded) <= 12 - 5
    torch.testing.assert_close(rows.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


def test_another_encoder_has_its_own_rows(cache: FeatureCache, encoded: list[int], tiny_config: Callable) -> None:
    cache.fill()
    other = CaptionModel.build(tiny_config("train.seed=1"), build_vocab(["a"], 1))
    assert FeatureCache(other, NAMES, cache.folder, CPU).find() is None


def test_where_the_weights_lie_does_not_matter(
    cache: FeatureCache, encoded: list[int], tiny_model: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.fill()
    moved = tiny_model.encoder.identity | {"source": "/another/venv/resnet18.pth"}
    monkeypatch.setattr(tiny_model.encoder, "identity", moved)
    assert FeatureCache(tiny_model, NAMES, cache.folder, CPU).find() is not None


def test_mirror_images_have_their_own_rows(
    cache: FeatureCache,
    tiny_config: Callable,
    tiny_model: CaptionModel,
    encoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache.fill()
    monkeypatch.setattr(tiny_model, "config", tiny_config("train.mirror=true", "train.corners=1"))
    mirrored = FeatureCache(tiny_model, NAMES, cache.folder, CPU, View(mirrored=True)).fill().take(NAMES)
    assert sum(encoded) == 24
    assert "encoding 12 pictures, view 2 of 3, once" in capsys.readouterr().out
    for name in NAMES:
        ImageOps.mirror(open_picture(cache.folder / name)).save(cache.folder / name, lossless=True, format="WEBP")
    torch.testing.assert_close(mirrored.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


def test_other_pictures_have_their_own_rows(cache: FeatureCache) -> None:
    cache.fill()
    assert FeatureCache(cache.model, NAMES[:5], cache.folder, CPU).find() is None
    assert FeatureCache(cache.model, NAMES[::-1], cache.folder, CPU).find() is None


def edit_manifest(shard: Shard, key: str, value: object) -> None:
    path = shard.place / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


DAMAGES: dict[str, Callable[[Shard], object]] = {
    "rows cut short": lambda shard: os.truncate(shard.place / "features.npy", 5000),
    "rows empty": lambda shard: (shard.place / "features.npy").write_bytes(b""),
    "rows lost": lambda shard: (shard.place / "features.npy").unlink(),
    "rows of another shape": lambda shard: np.save(shard.place / "features.npy", np.zeros((12, 5), np.float16)),
    "rows of another type": lambda shard: np.save(shard.place / "features.npy", np.zeros((12, 512), np.float32)),
    "manifest cut short": lambda shard: os.truncate(shard.place / "manifest.json", 100),
    "manifest empty": lambda shard: (shard.place / "manifest.json").write_text(""),
    "manifest lost": lambda shard: (shard.place / "manifest.json").unlink(),
    "manifest a list": lambda shard: (shard.place / "manifest.json").write_text("[1]"),
    "manifest not text": lambda shard: (shard.place / "manifest.json").write_bytes(b"\xff\x00"),
    "another identity": lambda shard: edit_manifest(shard, "identity", {}),
    "pictures lost": lambda shard: edit_manifest(shard, "pictures", []),
    "rows_done a word": lambda shard: edit_manifest(shard, "rows_done", "all"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_encoded_again(
    damage: str, cache: FeatureCache, encoded: list[int], tiny_model: CaptionModel
) -> None:
    cache.fill()
    encoded.clear()
    DAMAGES[damage](cache.shards[0])
    assert cache.find() is None
    rows = cache.fill().take(NAMES)
    assert sum(encoded) == 12
    torch.testing.assert_close(rows.float(), direct(tiny_model, cache.folder, NAMES), rtol=2e-3, atol=2e-3)


@pytest.fixture
def in_shards(archive: Path, tiny_model: CaptionModel, tiny_config: Callable) -> FeatureCache:
    """The same pictures in shards of five."""
    model = copy.copy(tiny_model)
    model.config = tiny_config("data.shard_rows=5")
    return FeatureCache(model, NAMES, archive / "images", CPU)


def test_shards_hold_what_one_file_does(in_shards: FeatureCache, tiny_model: CaptionModel) -> None:
    rows = in_shards.fill()
    assert [len(shard.open()) for shard in in_shards.shards] == [5, 5, 2]
    mixed = NAMES[::-3] + NAMES[:3]
    torch.testing.assert_close(
        rows.take(mixed).float(), direct(tiny_model, in_shards.folder, mixed), rtol=2e-3, atol=2e-3
    )


def test_a_change_costs_its_own_shard_alone(in_shards: FeatureCache, encoded: list[int]) -> None:
    in_shards.fill()
    encoded.clear()
    DAMAGES["rows lost"](in_shards.shards[1])
    assert in_shards.find() is None
    in_shards.fill()
    assert sum(encoded) == 5


def test_a_broken_picture_is_named(cache: FeatureCache, encoded: list[int], refused: Callable) -> None:
    (cache.folder / "06.jpg").write_bytes((cache.folder / "06.jpg").read_bytes()[:500])
    with refused("06.jpg"):
        cache.fill()


def test_a_picture_that_is_gone_is_named(cache: FeatureCache, refused: Callable) -> None:
    (cache.folder / "06.jpg").unlink()
    with refused("06.jpg"):
        cache.fill()


@pytest.mark.parametrize("already_begun", [False, True])
def test_a_full_disk_is_one_sentence_and_encoding_goes_on_later(
    already_begun: bool, cache: FeatureCache, encoded: list[int], full_disk: Callable, refused: Callable
) -> None:
    if already_begun:
        interrupt_after(3, cache)
    with full_disk(7000), refused(str(cache.place), "data.cache"):
        cache.fill()
    assert cache.find() is None
    assert len(cache.fill().take(NAMES)) == 12


def test_a_full_disk_ends_a_script_with_code_2(cache: FeatureCache, full_disk: Callable) -> None:
    with full_disk(7000):
        assert run_script(cache.fill) == 2  # type: ignore[arg-type]


def test_a_cache_that_cannot_be_made_is_one_sentence(archive: Path, tiny_model: CaptionModel) -> None:
    Path("cache").touch()
    with pytest.raises(UserError, match=r"data\.cache"):
        FeatureCache(tiny_model, NAMES, archive / "images", CPU).fill()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="finds a file by its handle, as Linux shows it")
def test_rows_are_on_the_disk_before_the_manifest_counts_them(
    cache: FeatureCache, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    cache.fill()
    kinds = [
        Path(path).name.partition(".json")[0].strip(".") for path in synced if Path(path).is_file() or "json" in path
    ]
    assert kinds == ["features.npy", "manifest"] * 3
