"""WebDataset tars: written from any table, taken apart once, encoded tar by tar; and what may be wrong with them."""

from cli import UserError

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from config import DataConfig, load_config
from data import annotations, features, tars
from data.features import Extractor
from data.stream import StreamedDataset
from data.tars import Tar
from data.transforms import open_picture
from data.vocab import EnglishTokeniser
from models.model import CaptionModel

CPU = torch.device("cpu")
SHARDS = "tars/{00000..00002}.tar"


@pytest.fixture
def exported(archive: Path) -> DataConfig:
    """The twelve pictures of `archive` in three tars of four."""
    assert tars.export(load_config().data, Path("tars"), 4) == 3
    return load_config(overrides=[f"data.shards={SHARDS}"]).data


def write_tar(path: Path, files: dict[str, bytes | dict | str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            content = json.dumps(content).encode() if isinstance(content, dict) else content
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name.removesuffix("#"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(buffer, "JPEG")
    return buffer.getvalue()


def found(shards: str) -> list[Tar]:
    return tars.find(load_config(overrides=[f"data.shards={shards}"]).data)


def stream(shards: list[Tar], model: CaptionModel) -> StreamedDataset:
    return StreamedDataset(shards, model, [], CPU)


def rows(dataset: StreamedDataset) -> dict[str, torch.Tensor]:
    """Return the features of every train picture by its key."""
    opened = [window.open() for window in dataset.windows([0])]
    return {
        name.rpartition("/")[2]: each.features.take([name])[0]
        for each in opened
        for name in each.images
        if each.features
    }


def test_tars_hold_what_the_table_does(archive: Path, exported: DataConfig) -> None:
    table = annotations.load(load_config().data)
    shards = tars.find(exported)
    train = table[table["split"] == "train"]
    assert [sum(getattr(tar, name) for tar in shards) for name in ("pictures", "captions", "held_out")] == [8, 40, 4]
    assert tars.count_words(shards) == Counter(w for text in train["caption"] for w in EnglishTokeniser()(text))
    assert sorted(tars.train_captions(exported)) == sorted(" ".join(EnglishTokeniser()(t)) for t in train["caption"])


def test_what_is_held_out_is_a_dataset_like_any_other(archive: Path, exported: DataConfig) -> None:
    before = annotations.load(load_config().data).query("split != 'train'").set_index("image_id")
    held_out = annotations.load(exported).set_index("image_id")
    columns = ["caption", "split"]
    assert held_out.loc[before.index.unique(), columns].equals(before[columns])
    for image_id, name in held_out["image"].items():
        unpacked = annotations.image_folder(exported) / name
        assert unpacked.read_bytes() == (archive / "images" / str(image_id)).read_bytes()


def test_a_train_picture_has_the_features_of_its_file(
    archive: Path, exported: DataConfig, tiny_model: CaptionModel
) -> None:
    dataset = stream(tars.find(exported), tiny_model)
    names = annotations.load(load_config().data).query("split == 'train'")["image"].unique()
    with torch.inference_mode():
        pixels = torch.stack([tiny_model.transform(open_picture(archive / "images" / name)) for name in names])
        expected = tiny_model.encoder(pixels)  # (P, D)
    own = torch.stack(list(rows(dataset).values())).float()  # (P, D), in another order
    assert (
        torch.cdist(own, expected).min(1).values.max() < 0.1 * torch.cdist(expected, expected).fill_diagonal_(9).min()
    )


def test_encoding_goes_on_in_the_middle_of_a_tar(
    exported: DataConfig, tiny_model: CaptionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH", {"cpu": 1})
    monkeypatch.setattr(features, "SAVE_EVERY", 1)
    encode, left = Extractor.__call__, [4]

    def encode_or_stop(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", encode_or_stop)
    shards = tars.find(exported)
    with pytest.raises(KeyboardInterrupt):
        stream(shards, tiny_model)
    left[0] = 4  # of eight
    interrupted = rows(stream(shards, tiny_model))
    assert left == [0]
    left[0] = 8
    other = DataConfig(**exported.model_dump() | {"cache": "afresh"})
    model = CaptionModel(
        tiny_model.config.model_copy(update={"data": other}),
        *(tiny_model.vocab, tiny_model.transform, tiny_model.encoder, tiny_model.decoder),
    )
    whole = rows(stream(shards, model))
    assert left == [0] and all(torch.equal(interrupted[key], row) for key, row in whole.items())


def test_a_tar_that_changed_is_read_and_encoded_again(exported: DataConfig, tiny_model: CaptionModel) -> None:
    before = rows(stream(tars.find(exported), tiny_model))
    write_tar(Path("tars/00001.tar"), {"new.jpg": picture(), "new.json": {"captions": ["a new word"]}})
    shards = tars.find(exported)
    assert tars.count_words(shards)["new"] == 1
    after = rows(stream(shards, tiny_model))
    assert "new" in after
    kept = after.keys() & before.keys()
    assert len(kept) + 1 == len(after) and all(torch.equal(before[key], after[key]) for key in kept)


def test_a_tar_may_go_once_it_is_encoded(exported: DataConfig, tiny_model: CaptionModel, refused: Callable) -> None:
    shards = tars.find(exported)
    Path("tars/00000.tar").rename("away.tar")
    with refused("tars/00000.tar", "put it back"):
        stream(shards, tiny_model)
    Path("away.tar").rename("tars/00000.tar")
    whole = rows(stream(shards, tiny_model))
    for path in Path("tars").iterdir():
        path.unlink()
    assert rows(stream(tars.find(exported), tiny_model)).keys() == whole.keys()


def test_each_caption_has_its_picture_where_tars_share_keys_and_differ_in_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: CaptionModel
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, colours in (("a", ["red"]), ("b", ["blue", "green", "white"])):
        write_tar(
            Path(folder, "0.tar"),
            {
                f"{number}.{ending}": content
                for number, colour in enumerate(colours)
                for ending, content in (("jpg", picture(colour)), ("json", {"captions": [f"all {colour}"]}))
            },
        )
    [window] = stream(found("{a,b}/0.tar"), tiny_model).windows([0])
    opened = window.open()
    assert len(opened) == 4
    for index in range(4):
        colour = tiny_model.vocab.decode(opened[index].tokens[0, 1:].tolist()).split()[-1]
        Path("own.jpg").write_bytes(picture(colour))
        with torch.inference_mode():
            own = tiny_model.encoder(tiny_model.transform(open_picture("own.jpg"))[None])
        torch.testing.assert_close(opened[index].pictures.float(), own, rtol=2e-3, atol=2e-3)


def test_a_key_cannot_lead_out_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = {"captions": ["a dog"], "split": "val"}
    write_tar(Path("tars/0.tar"), {"../../../evil.jpg": picture(), "../../../evil.json": entry})
    [tar] = found("tars/0.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"tars", "cache"} and tar.held_out == 1
    assert not list(tmp_path.rglob("evil*"))


GOOD = {"captions": ["a dog"], "split": "train"}
FAULTS: dict[str, tuple[dict[str, bytes | dict | str], tuple[str, ...]]] = {
    "no captions": ({"1.jpg": picture()}, ("0.tar/1.json",)),
    "no picture": ({"1.json": GOOD}, ("0.tar", "1 ", "no picture")),
    "two pictures": ({"1.jpg": picture(), "1.png": picture(), "1.json": GOOD}, ("0.tar", "jpg, png")),
    "not JSON": ({"1.jpg": picture(), "1.json": "a dog"}, ("0.tar/1.json",)),
    "JSON without captions": ({"1.jpg": picture(), "1.json": {"text": "a dog"}}, ("0.tar/1.json", "captions")),
    "captions that are numbers": ({"1.jpg": picture(), "1.json": {"captions": [1]}}, ("0.tar/1.json",)),
    "a wordless caption": ({"1.jpg": picture(), "1.json": {"caption": " . "}}, ("0.tar/1.json",)),
    "an unknown split": ({"1.jpg": picture(), "1.json": GOOD | {"split": "dev2"}}, ("0.tar/1.json", "dev2")),
    "a file twice": ({"1.jpg": picture(), "1.jpg#": picture(), "1.json": GOOD}, ("0.tar", "1.jpg")),
    "a key twice": (
        {"1.jpg": picture(), "1.json": GOOD, "2.jpg": picture(), "2.json": GOOD, "1.json#": GOOD, "1.jpg#": picture()},
        ("0.tar", "1 twice"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sample_is_named_with_its_tar(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    files, named = FAULTS[fault]
    write_tar(Path("tars/0.tar"), files)
    with refused(*named):
        found("tars/0.tar")


def test_a_broken_picture_is_named_with_its_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: CaptionModel, refused: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(Path("tars/0.tar"), {"1.jpg": picture(), "1.json": GOOD, "2.jpg": picture()[:300], "2.json": GOOD})
    shards = found("tars/0.tar")
    with refused("tars/0.tar/2.jpg"):
        stream(shards, tiny_model)


def test_a_tar_cut_short_is_named(exported: DataConfig, refused: Callable) -> None:
    os.truncate("tars/00002.tar", 3000)
    with refused("tars/00002.tar"):
        tars.find(exported)


def test_a_pattern_that_matches_nothing_is_refused(exported: DataConfig, refused: Callable) -> None:
    with refused("tar/00000.tar", "data.shards"):
        found("tar/{00000..00002}.tar")
    with refused("tars/00003.tar", "data.shards"):
        found("tars/{00000..00003}.tar")


@pytest.mark.parametrize("pattern", ["tars/*.tar", "tars/?????.tar", "tars/[0-9]*.tar"])
def test_a_pattern_for_shells_is_refused_with_the_one_to_write(
    pattern: str, exported: DataConfig, refused: Callable
) -> None:
    with refused(f"data.shards = {pattern}", '"data.shards=tars/{000..127}.tar"'):
        found(pattern)


def test_what_is_exported_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a.JPG", "b.png", "c.webp", "d.gif", "e.bmp", "f.tif"]
    Path("archive/images").mkdir(parents=True)
    for name in [*names, "g.ppm"]:
        Image.new("RGB", (40, 40)).save(Path("archive/images", name))
    captions = "image,caption,split\n" + "".join(f"{name},A dog,train\n" for name in names)
    Path("archive/captions.csv").write_text(captions)
    tars.export(load_config().data, Path("tars"), 20)
    [tar] = found("tars/00000.tar")
    assert sum(opener().size == (40, 40) for opener in tar.openers()) == len(names)
    Path("archive/captions.csv").write_text(f"{captions}g.ppm,A cat,train\n")
    with refused("g.ppm", ".jpg", "rename"):
        tars.export(load_config().data, Path("others"), 20)


def test_tars_are_not_written_over(exported: DataConfig, refused: Callable) -> None:
    with refused("tars"):
        tars.export(load_config().data, Path("tars"), 4)


def test_braces_that_the_shell_has_taken_are_refused(refused: Callable) -> None:
    with refused("data.shards", "quotes"):
        load_config(overrides=["data.shards=tars/00000.tar", "data.shards=tars/00001.tar"])


def test_what_training_on_tars_cannot_do_is_refused() -> None:
    for word in ("encoder.frozen=false", "train.self_critical_epochs=1"):
        with pytest.raises(UserError, match=r"data\.shards"):
            load_config(overrides=[f"data.shards={SHARDS}", word])
