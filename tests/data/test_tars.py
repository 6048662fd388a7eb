"""WebDataset tars: written from any dataset, read once, trained on like files, and refused by name where they fail."""

import bz2
import gzip
import io
import json
import os
import re
import shlex
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from dataset_files import load, put, run
from PIL import Image

import evaluate
import inference_visualize
import train
from captioning import feature_cache
from cli import UserError
from config import load_config
from data import annotations, features, tars, write_tars
from data.dataset import Flickr8kDataset
from data.features import Extractor, Features
from data.folders import image_folder
from data.tars import Tar
from data.tokens import join
from data.vocab import EnglishTokeniser
from models.model import CaptionModel
from training.monitor import Monitor
from training.runs import Run
from training.setup import Captions, make_datasets, make_model, tar_captions
from utils import load_checkpoint

SHARDS = "data.shards=tars/{00000..00002}.tar"


@pytest.fixture
def written(archive: Path) -> None:
    """The twelve pictures of `archive` in three tars of four."""
    assert run(write_tars.main, "tars", "data.root=archive", "--pictures", 4) == 0


def write_tar(path: str, files: dict[str, bytes | dict | str]) -> None:
    Path(path).parent.mkdir(exist_ok=True)
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


def find(*settings: str) -> list[Tar]:
    return tars.find(load_config(overrides=list(settings or [SHARDS])).data)


def encode(found: list[Tar], model: CaptionModel) -> Features:
    return feature_cache(model).fill(*(tar for tar in found if tar.captions))


def rows(found: list[Tar], model: CaptionModel) -> dict[str, torch.Tensor]:
    """Return the features of every training picture by its key."""
    encoded = encode(found, model)
    return {name.rpartition("/")[2]: encoded.take([name])[0] for name in encoded.names}


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One more item for each picture that is encoded, one at a time."""
    monkeypatch.setattr(features, "BATCH", {"cpu": 1})
    encode_batch, counts = Extractor.__call__, list[int]()

    def count_and_encode(self: Extractor, pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        if len(counts) == 5:  # of eight
            raise KeyboardInterrupt
        return encode_batch(self, pixels)

    monkeypatch.setattr(Extractor, "__call__", count_and_encode)
    return counts


# ---- what tars hold --------------------------------------------------------------------------------------------------


def test_tars_hold_what_the_table_does(written: None) -> None:
    train_captions = load(Path("archive")).query("split == 'train'")["caption"]
    found = find()
    assert sum(len(tar.names) for tar in found) == 8
    words = [EnglishTokeniser()(text) for text in train_captions]
    assert join([tar.tokens() for tar in found]).count() == Counter(word for each in words for word in each)
    config = load_config(overrides=[SHARDS]).data
    assert sorted(tars.train_captions(config)) == sorted(" ".join(each) for each in words)
    before = load(Path("archive")).query("split != 'train'").set_index("image_id")[["caption", "split"]]
    held_out = annotations.load(config).set_index("image_id")
    assert held_out.loc[before.index.unique(), ["caption", "split"]].equals(before)
    for image_id, name in held_out["image"].items():
        unpacked = image_folder(config) / name
        assert unpacked.read_bytes() == Path("archive/images", str(image_id)).read_bytes()


def train_set(config: str) -> Flickr8kDataset:
    opened = Run(load_config(overrides=[*TINY, config, "train.mirror=true"]))
    captions = Captions(opened)
    return make_datasets(make_model(opened, captions), captions)[0]


def test_a_training_reads_the_same_from_tars_as_from_files(written: None) -> None:
    files, streamed = train_set("data.root=archive"), train_set(SHARDS)
    assert streamed.tokens.types == files.tokens.types  # the same vocabulary
    samples = [sample for path in Path("tars").iterdir() for sample in tars.samples(path)]
    file_of = {key: json.loads(sample["json"])["image"] for key, _, sample in samples}
    for number, name in enumerate(streamed.images):
        image = files.images.index(file_of[name.rpartition("/")[2]])
        for view in (0, 1):
            read = []
            for dataset, place in ((streamed, number), (files, image)):
                dataset.view_of[:] = view
                read.append(dataset[(dataset.image_of == place).nonzero()[0]])
            assert len(read[0].tokens) == 5 and torch.equal(read[0].tokens, read[1].tokens)
            torch.testing.assert_close(read[0].features, read[1].features, rtol=2e-3, atol=2e-3)


def test_each_caption_has_its_picture_where_tars_share_keys_and_differ_in_size(
    archive: Path, tiny_model: CaptionModel
) -> None:
    colours = {"a/0.tar": ["red"], "b/0.tar": ["blue", "green", "white"]}
    for path, several in colours.items():
        files: dict[str, bytes | dict | str] = {}
        for number, colour in enumerate(several):
            files |= {f"{number}.jpg": picture(colour), f"{number}.json": {"captions": ["all", colour]}}
        write_tar(path, files)
    found = find("data.shards={a,b}/0.tar")
    images, image_of, tokens = tar_captions(found)
    assert len(set(images)) == 4 and image_of.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for caption in range(1, 8, 2):
        Path("own.jpg").write_bytes(picture(tokens.types[tokens[caption][0]]))
        with Image.open("own.jpg") as own, torch.inference_mode():
            expected = tiny_model.encoder(tiny_model.transform(own)[None])
        taken = encode(found, tiny_model).take([images[image_of[caption]]])
        torch.testing.assert_close(taken.float(), expected, rtol=2e-3, atol=2e-3)


# ---- the caches ------------------------------------------------------------------------------------------------------


def test_a_tar_is_read_once_unless_what_was_kept_is_damaged(written: None, capsys: pytest.CaptureFixture[str]) -> None:
    first = find()
    assert "reading the captions of 3 of 3 tars, once, into cache/tars/" in capsys.readouterr().out
    assert [tar.tokens().ids.tolist() for tar in find()] == [tar.tokens().ids.tolist() for tar in first]
    assert capsys.readouterr().out == ""
    os.truncate(first[1].place / tars.INDEX, 100)
    assert [tar.captions for tar in find()] == [tar.captions for tar in first]
    assert "reading the captions of 1 of 3 tars, once" in capsys.readouterr().out
    tars.find(load_config(overrides=[SHARDS, "data.language=zh-characters"]).data)
    assert "reading the captions of 3 of 3 tars" in capsys.readouterr().out  # other words


def test_encoding_goes_on_in_the_middle_of_a_tar(
    written: None, tiny_model: CaptionModel, encoded: list[int], tiny_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_model, "config", tiny_config("data.shard_rows=1"))
    found = find()
    with pytest.raises(KeyboardInterrupt):
        encode(found, tiny_model)
    encoded[:] = [1] * 5
    interrupted = rows(found, tiny_model)
    assert len(encoded) == 5 + 4
    monkeypatch.setattr(tiny_model, "config", tiny_config("data.cache=afresh"))
    whole = rows(found, tiny_model)
    assert len(encoded) == 5 + 4 + 8
    assert len(whole) == 8 and all(torch.equal(interrupted[key], row) for key, row in whole.items())


def test_a_tar_that_changed_is_read_and_encoded_again_alone(
    written: None, tiny_model: CaptionModel, encoded: list[int]
) -> None:
    encoded[:] = [1] * 5
    before, kept = rows(find(), tiny_model), [len(tar.names) for tar in find()]
    encoded.clear()
    write_tar("tars/00001.tar", {"new.jpg": picture(), "new.json": {"captions": ["a new word"]}})
    found = find()
    assert join([tar.tokens() for tar in found]).count()["new"] == 1
    after = rows(found, tiny_model)
    assert len(encoded) == 1 and len(after) == 1 + kept[0] + kept[2]
    assert all(torch.equal(before[key], row) for key, row in after.items() if key != "new")


def test_a_tar_may_go_once_it_is_encoded(written: None, tiny_model: CaptionModel, refused: Callable) -> None:
    found = find()
    Path("tars/00000.tar").rename("away.tar")
    with refused("tars/00000.tar", "put it back"):
        encode(found, tiny_model)
    Path("away.tar").rename("tars/00000.tar")
    whole = rows(found, tiny_model)
    for path in Path("tars").iterdir():
        path.unlink()
    again = rows(find(), tiny_model)
    assert len(again) == 8 and all(torch.equal(again[key], row) for key, row in whole.items())


def test_the_command_that_is_advised_trains_stops_and_goes_on_digit_for_digit_without_tars(
    archive: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(write_tars.main, "tars", "data.root=archive", "--pictures", 4) == 0
    [command] = re.findall(r"^wrote 3 tars; train on them with: python train.py (.*)$", capsys.readouterr().out, re.M)
    assert shlex.split(command) == [SHARDS]
    settings = ("train.epochs=2", "train.batch_size=6", "train.mirror=true", "decoder.dropout=0.3", "train.lr=1e-2")
    training = partial(run, train.main, *shlex.split(command), *TINY, *settings, "train.warmup_steps=1")
    assert training("run=whole") == 0
    assert f"data: {SHARDS[12:]}: train 8 pictures with 40 captions, val 2 pictures" in capsys.readouterr().out

    step, left = Monitor.after_step, [10]

    def step_and_stop(self: Monitor, *given: torch.Tensor) -> None:
        step(self, *given)
        left[0] -= 1
        if not left[0]:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Monitor, "after_step", step_and_stop)
    assert training("run=stopped") == 130
    for path in Path("tars").iterdir():
        path.unlink()
    assert run(train.main, "--resume", "--run", "stopped") == 0
    assert "encoding" not in capsys.readouterr().out
    logs = [Path(f"runs/{name}/loss_log.txt").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3
    whole, stopped = (load_checkpoint(f"runs/{name}/last.pth")["decoder"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    assert run(evaluate.main, "--run", "whole", "--split", "val", "--tokeniser", "words") == 0
    assert run(inference_visualize.main, "--run", "whole", "--split", "test") == 0
    said = "".join(capsys.readouterr())
    assert "encoding" not in said and "cached features" in said
    assert len(list(Path("runs/whole/outputs").glob("*.jpg"))) == 2
    assert run(evaluate.main, "--run", "whole", "--split", "train") == 2
    assert f"{SHARDS[12:]} has no train pictures" in capsys.readouterr().err


# ---- what may be wrong with them -------------------------------------------------------------------------------------


GOOD = {"captions": ["a dog"], "split": "train"}
FAULTS: dict[str, tuple[dict[str, bytes | dict | str], tuple[str, ...]]] = {
    "no captions": ({"1.jpg": picture()}, ("0.tar/1.json",)),
    "no picture": ({"1.json": GOOD}, ("0.tar", "1 ", "no picture")),
    "two pictures": ({"1.jpg": picture(), "1.png": picture(), "1.json": GOOD}, ("0.tar", "jpg, png")),
    "not JSON": ({"1.jpg": picture(), "1.json": "a dog"}, ("0.tar/1.json",)),
    "JSON without captions": ({"1.jpg": picture(), "1.json": {"text": "a dog"}}, ("0.tar/1.json", "captions")),
    "a wordless caption": ({"1.jpg": picture(), "1.json": {"caption": " . "}}, ("0.tar/1.json",)),
    "an unknown split": ({"1.jpg": picture(), "1.json": GOOD | {"split": "dev2"}}, ("0.tar/1.json", "dev2")),
    "a file twice": ({"1.jpg": picture(), "1.jpg#": picture(), "1.json": GOOD}, ("0.tar", "1.jpg")),
    "a key twice": (
        {"1.jpg": picture(), "1.json": GOOD, "2.jpg": picture(), "2.json": GOOD, "1.json#": GOOD, "1.jpg#": picture()},
        ("1 in tars/0.tar comes twice",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_sample_is_named_with_its_tar(fault: str, archive: Path, refused: Callable) -> None:
    files, named = FAULTS[fault]
    write_tar("tars/0.tar", files)
    with refused(*named):
        find("data.shards=tars/0.tar")


def test_a_broken_picture_or_tar_is_named(archive: Path, tiny_model: CaptionModel, refused: Callable) -> None:
    write_tar("tars/0.tar", {"1.jpg": picture(), "1.json": GOOD, "2.jpg": picture()[:300], "2.json": GOOD})
    found = find("data.shards=tars/0.tar")
    with refused("tars/0.tar/2.jpg"):
        encode(found, tiny_model)
    for size in (2800, 2560, 2100, 1800, 800, 300, 100, 0):  # in a header, between two pictures, in a JSON, ...
        write_tar("tars/0.tar", {"1.jpg": picture(), "1.json": GOOD, "2.jpg": picture(), "2.json": GOOD})
        os.truncate("tars/0.tar", size)
        with refused("tars/0.tar is ", "take a whole copy"):
            find("data.shards=tars/0.tar")


FORMS = {
    "short names": ("w", tarfile.USTAR_FORMAT, ""),
    "long names": ("w", tarfile.GNU_FORMAT, "x" * 150),
    "extended headers": ("w", tarfile.PAX_FORMAT, "x" * 150),
    "gzip": ("w:gz", tarfile.USTAR_FORMAT, ""),
    "bzip2": ("w:bz2", tarfile.USTAR_FORMAT, ""),
    "xz": ("w:xz", tarfile.USTAR_FORMAT, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tar_that_is_cut_anywhere_is_refused_or_whole(form: str, tmp_path: Path) -> None:
    mode, format_, prefix = FORMS[form]
    with tarfile.open(tmp_path / "0.tar", mode, format=format_) as tar:  # type: ignore[call-overload]
        for number in range(3):
            for name, content in (
                (f"{number}.jpg", picture()[:500] + bytes(524)),
                (f"{number}.json", b'{"caption": "a"}'),
            ):
                member = tarfile.TarInfo(prefix + name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        end = tar.offset
    whole, refusals = (tmp_path / "0.tar").read_bytes(), 0
    for size in range(0, len(whole), 64 if mode == "w" else 1):
        (tmp_path / "0.tar").write_bytes(whole[:size])
        try:
            assert len(list(tars.samples(tmp_path / "0.tar"))) == 3, f"cut at {size}"
        except UserError:
            refusals += 1
            assert mode != "w" or size < end + tarfile.BLOCKSIZE  # not in what fills a tar up to 20 blocks
    assert refusals > 30


def member(name: str, content: bytes = b"", size: int | None = None, **about: Any) -> bytes:
    """Return a member of a tar; its header can tell another size than that of its content."""
    header = tarfile.TarInfo(name)
    header.size = len(content) if size is None else size
    for key, value in about.items():
        setattr(header, key, value)
    whole = header.tobuf(tarfile.PAX_FORMAT) if header.pax_headers else header.tobuf(tarfile.GNU_FORMAT)
    return whole + content + bytes(-len(content) % tarfile.BLOCKSIZE)


def negative(name: str) -> bytes:
    header = bytearray(member(name))
    header[124:136], header[148:156] = b"\xff" * 12, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


END, SAMPLE = bytes(2 * tarfile.BLOCKSIZE), member("1.jpg", b"a picture") + member("1.json", b'{"caption": "a dog"}')
LONG = member("x", bytes(1 << 10), type=tarfile.GNUTYPE_LONGNAME)
SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
ODD_TARS: dict[str, tuple[bytes, str]] = {
    "a picture of 8 GB": (member("2.jpg", size=1 << 33), "8,589,934,592 bytes"),
    "a picture of fewer than no bytes": (negative("2.jpg"), "-1 bytes"),
    "captions of 100 MB": (member("2.json", size=100 << 20), "too many for captions"),
    **{
        f"a name of 1 GB, {kind!r}": (member("2.jpg", size=1 << 30, type=kind), "1,073,741,824 bytes")
        for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
    },
    **{
        f"a size of {size[:4]}": (member("2.jpg", b"a", pax_headers={"size": size}), "0.tar is damaged after ")
        for size in (str(1 << 33), "-1", "9" * 5000)
    },
    "names of names": (LONG * 2000, "recursion"),
    "an old sparse file": (member("2.jpg", type=tarfile.GNUTYPE_SPARSE), "sparse"),
    "a sparse file": (member("2.jpg", b"9999999\n" + b"0\n" * 999, pax_headers=SPARSE), "sparse"),
    "a sparse file of 1 TB": (member("2.jpg", pax_headers={"GNU.sparse.size": str(1 << 40)}), "sparse"),
    "a link": (member("2.jpg", type=tarfile.SYMTYPE, linkname="1.jpg"), "2.jpg in tars/0.tar is a link"),
    "a hard link": (member("2.jpg", type=tarfile.LNKTYPE, linkname="1.jpg"), "tar --dereference"),
    "a device": (member("2.jpg", type=tarfile.CHRTYPE), "2.jpg in tars/0.tar is a link or a device"),
    "a pipe": (member("2.jpg", type=tarfile.FIFOTYPE), "2.jpg in tars/0.tar is a link or a device"),
    "of an unknown kind": (member("2.jpg", type=b"Z"), "2.jpg in tars/0.tar is a link or a device"),
    "noise": (b"noise" * 1000, "0.tar is damaged after 1 (invalid header)"),
    "another tar behind it": (END + SAMPLE, "goes on behind its end"),
    "2 MB of zeros behind it": (bytes(2 << 20), "goes on behind its end"),
    "the same again": (SAMPLE, "twice"),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("fault", ODD_TARS)
def test_what_is_odd_in_a_tar_is_one_sentence(
    fault: str, compress: Callable[[bytes], bytes], archive: Path, refused: Callable
) -> None:
    odd, words = ODD_TARS[fault]
    put(Path(), "tars/0.tar", text=compress(SAMPLE + odd + END))
    with refused("tars/0.tar", words):
        find("data.shards=tars/0.tar")


def test_a_tar_without_pictures_is_refused(archive: Path, refused: Callable) -> None:
    for content in (END, bytes(10240), member("folder", type=tarfile.DIRTYPE) + END):
        put(Path(), "tars/0.tar", text=content)
        with refused("tars/0.tar holds no pictures"):
            find("data.shards=tars/0.tar")


def test_a_tar_that_swells_is_refused_before_it_takes_memory(
    archive: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "MOST_BYTES", 1 << 20)
    swelling = b"".join(
        member(f"{number}.jpg", bytes(900_000)) + member(f"{number}.json", b'{"caption": "a dog"}')
        for number in range(3)
    )
    for content in (gzip.compress(swelling + END), bz2.compress(swelling + END)):
        put(Path(), "tars/0.tar", text=content)
        with refused("tars/0.tar is damaged after", "unpacks to more than 100 times its size"):
            find("data.shards=tars/0.tar")


def test_names_of_members_are_nothing_but_names(archive: Path) -> None:
    keys = ["../../1", "/etc/1", "a/../1", "1\n2", "\x1b[2J", "x" * 5000, "1 ", "é", "\udcff", "con", "-x"]
    aside = member("._1.jpg", b"x") + member("a", type=tarfile.DIRTYPE) + member("a/.DS_Store") + member("__meta__/x.y")
    tar = aside
    for key in keys:
        tar += member(f"{key}.jpg", picture()) + member(f"{key}.json", b'{"caption": "a dog", "split": "val"}')
    put(Path(), "tars/0.tar", text=tar + END)
    table = tars.held_out(load_config(overrides=["data.shards=tars/0.tar"]).data)
    assert table["image_id"].tolist() == [f"0/{key}".replace("\udcff", "?") for key in keys]
    assert {path.name for path in Path().iterdir()} == {"archive", "tars", "cache"}


def test_thousands_of_tiny_members_are_read(tmp_path: Path) -> None:
    content = (member(f"{number}.jpg", b"x") + member(f"{number}.json", b"{}") for number in range(2000))
    put(tmp_path, "0.tar", text=b"".join(content) + END)
    assert [key for key, _, _ in tars.samples(tmp_path / "0.tar")] == list(map(str, range(2000)))


@pytest.mark.parametrize(
    "pattern",
    [
        "x{0..99999999999}.tar",
        "x{0..9999}{0..9999}.tar",
        "{a",
        "a}",
        "{" * 1200 + "}" * 1200,
        "{" + "9" * 5000 + "..1}",
    ],
)
def test_a_pattern_of_too_many_tars_is_refused_at_once(pattern: str, refused: Callable) -> None:
    with refused("stands for no tars, or for more than 100,000"):
        find(f"data.shards={pattern}")


def test_a_key_cannot_lead_out_of_the_cache(archive: Path) -> None:
    write_tar("tars/0.tar", {"../../../evil.jpg": picture(), "../../../evil.json": GOOD | {"split": "val"}})
    assert len(tars.held_out(load_config(overrides=["data.shards=tars/0.tar"]).data)) == 1
    assert {path.name for path in Path().iterdir()} == {"archive", "tars", "cache"}
    assert not list(Path().rglob("evil*"))


def test_what_cannot_be_trained_on_is_refused(
    written: None, refused: Callable, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for pattern, missing in (("tars/{00000..00003}.tar", "tars/00003.tar"), ("tars/*.tar", "tars/*.tar")):
        with refused(missing, "whose numbers stand in braces"):
            find(f"data.shards={pattern}")
    with refused("data.shards", "quotes"):  # a shell has taken the braces
        find("data.shards=tars/00000.tar", "data.shards=tars/00001.tar")
    write_tar("tars/9.tar", {"1.jpg": picture(), "1.json": GOOD})
    assert run(train.main, *TINY, "data.shards=tars/9.tar") == 2
    assert "has no val pictures; name val in the JSON of some pictures" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with refused("webdataset", "pip install -r requirements-extras.txt"):
        find()


def test_only_what_can_be_read_again_is_written(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a.JPG", "b.png", "c.webp", "d.gif", "e.bmp", "f.tif"]
    for name in [*names, "g.tga"]:
        Image.new("RGB", (40, 40)).save(archive / "images" / name)
    for path in archive.glob("*.txt"):
        path.unlink()
    captions = "image,caption,split\n" + "".join(f"{name},A dog,train\n" for name in names)
    put(archive, "captions.csv", text=captions)
    assert run(write_tars.main, "tars") == 0
    [tar] = find("data.shards=tars/{00000..00000}.tar")
    assert [opener(least=1000).size for opener in tar.openers(range(6))] == [(40, 40)] * 6
    assert run(write_tars.main, "tars") == 2
    assert "tars has tars already; name another folder" in capsys.readouterr().err
    put(archive, "captions.csv", text=f"{captions}g.tga,A cat,train\n")
    assert run(write_tars.main, "others") == 2
    assert "g.tga ends in none of .jpg," in capsys.readouterr().err


def test_broken_pictures_in_tars_are_not_skipped_unsaid(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(train.main, "data.shards=a.tar", "data.broken=skip", "data.root=.") == 2
    assert "data.broken=skip is for pictures in folders" in capsys.readouterr().err
