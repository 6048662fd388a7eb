"""The built-in scenes: the same every time, and nothing held out is ever trained on."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from dataset_files import load
from PIL import Image

from data import sample


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "COUNTS", {"train": 6, "dev": 2, "test": 3})


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_scenes_drawn_twice_are_the_same_bytes_and_are_drawn_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample.draw(tmp_path / "a")
    sample.draw(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(set(contents(tmp_path / "a").values())) == 11 + 4
    monkeypatch.delattr(sample, "draw_scene")
    sample.draw(tmp_path / "a")


def test_of_two_processes_one_draws_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, drawings = Thread(target=sample.draw, args=[tmp_path / "a"]), []
    scenes = sample.choose_scenes()

    def begin() -> list:
        drawings.append(1)
        if len(drawings) == 1:  # the other one finds a folder that is half drawn
            other.start()
            other.join(timeout=0.5)
        return scenes

    monkeypatch.setattr(sample, "choose_scenes", begin)
    sample.draw(tmp_path / "a")
    other.join()
    assert len(drawings) == 1 and len(contents(tmp_path / "a")) == 11 + 4


def test_the_dataset_has_flickr8ks_form(tmp_path: Path) -> None:
    table = load(tmp_path / "new" / "sample", "data.format=sample", "data.language=en")
    assert table.groupby("split")["image"].nunique().to_dict() == {"train": 6, "val": 2, "test": 3}
    assert (table.groupby("image").size() == 5).all()
    lists = {path.name for path in (tmp_path / "new" / "sample").glob("*.txt")}
    assert lists == {f"Flickr_8k.{split}Images.txt" for split in ("dev", "test", "train")}


def test_held_out_scenes_never_occur_in_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    chosen = sample.choose_scenes()
    of_split = {split: [scene for name, scene in chosen if name == split] for split in sample.COUNTS}
    assert {split: len(scenes) for split, scenes in of_split.items()} == sample.COUNTS
    train, dev, test = (set(of_split[split]) for split in ("train", "dev", "test"))
    assert not train & (dev | test)
    assert len(dev | test) == sample.COUNTS["dev"] + sample.COUNTS["test"]


def test_every_caption_of_a_scene_tells_all_of_it() -> None:
    for _, scene in sample.choose_scenes():
        captions = sample.describe(scene)
        assert len(set(captions)) == 5
        assert all(word in caption.lower() for caption in captions for word in scene)


def test_an_interrupted_drawing_leaves_no_half_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[sample.Scene] = []
    draw_scene = sample.draw_scene

    def draw_or_stop(scene: sample.Scene, rng: np.random.Generator) -> Image.Image:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(scene)
        return draw_scene(scene, rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "draw_scene", draw_or_stop)
        sample.draw(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    sample.draw(tmp_path / "a")
    sample.draw(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} - {".a-lock", ".b-lock"} == {"a", "b"}


def test_a_folder_with_other_things_in_it_is_never_deleted(tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    with refused("photos"):
        sample.draw(tmp_path / "photos")
    assert (tmp_path / "photos" / "holiday.jpg").exists()
