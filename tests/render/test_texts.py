"""Captions as text: tables, a .txt beside each picture, metadata; nothing of a person's is lost or captioned again."""

import csv
import json
import shutil
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from dataset_files import load, put
from PIL import Image

import inference_visualize
from data.transforms import open_picture
from models.model import Caption
from render import texts

Run = Callable[..., int]


@pytest.fixture
def run(archive: Path, scored: Path, call: Callable[..., int]) -> Run:
    """Run the script with a tiny captioner, in a folder with three pictures of one's own in mine/."""
    shutil.copytree("archive/images", "mine", ignore=lambda _, names: [name for name in names if name > "02.jpg"])
    shutil.rmtree("archive")
    return partial(call, inference_visualize.main, "--checkpoint", scored / "runs/flickr8k/checkpoints.pth")


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("captions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_pipe_gets_a_line_with_tabs_for_each_picture_and_nothing_else(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("mine", "--num-captions", "3") == 0
    printed = capsys.readouterr()
    lines = [line.split("\t") for line in printed.out.splitlines()]
    assert [line[0] for line in lines] == ["mine/00.jpg", "mine/01.jpg", "mine/02.jpg"]
    assert [line[1:] for line in lines] == [row["captions"] for row in rows()] and len(lines[0]) == 4
    assert "wrote captions of 3 pictures" in printed.err


def test_a_terminal_gets_all_captions_of_any_number_of_pictures(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        shutil.copy("mine/00.jpg", f"mine/x{number}.jpg")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert run("mine", "--num-captions", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("    x") for line in lines) == 12 and sum("    or: " in line for line in lines) == 15


def test_tables_can_be_read_back_as_a_dataset(run: Run) -> None:
    run("mine", "--num-captions", "2", "--out", "mine")
    with open("mine/captions.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 and table[0].keys() == {"image", "caption", "log_prob"}
    read = load(Path("mine"), "data.language=en", "data.captions=captions.csv", "data.images=mine")
    assert read["caption"].tolist() == [row["caption"] for row in table]


def test_tables_that_a_person_wrote_are_never_written_over(run: Run) -> None:
    own = {"captions.csv": "image,caption\n00.jpg,My own words\n", "captions.jsonl": '{"image": "a", "caption": "b"}\n'}
    for name, text in own.items():
        put(Path("."), name, text=text)
    for _ in range(2):
        assert run("mine") == 0
        assert {name: Path(name).read_text() for name in own} == own
        assert len(Path("captions-2.csv").read_text().splitlines()) == 4
    assert not Path("captions-3.csv").exists()


@pytest.mark.parametrize(
    ("existing", "expected"), [(None, "mine\n"), ("skip", "mine\n"), ("overwrite", "{}\n"), ("append", "mine\n{}\n")]
)
def test_a_text_lies_beside_each_picture(
    existing: str | None, expected: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    put(Path("mine"), "01.txt", text="mine\n")
    assert run("mine", "--sidecars", *(("--existing", existing) if existing else ())) == 0
    captions = [row["captions"][0] for row in rows()]
    assert Path("mine/00.txt").read_text() == f"{captions[0]}\n"
    assert Path("mine/01.txt").read_text() == expected.format(captions[1])
    said = "left 1 text as they were, such as mine/01.txt" in capsys.readouterr().err
    assert said == (existing in (None, "skip"))


def test_several_texts_are_written_at_a_time_for_a_disk_takes_long_to_flush_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    monkeypatch.setattr(texts, "write_atomically", lambda *_: both.wait(timeout=30))
    caption = Caption("A dog", ("A", "dog"), -1.0, -1.0)
    captioned = [(tmp_path / name, name, [caption]) for name in ("a.jpg", "b.jpg")]
    assert list(texts.write_sidecars(captioned, "overwrite")) == ["wrote 2 texts beside the pictures"]


def test_two_pictures_of_one_name_do_not_share_a_text(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Image.open("mine/00.jpg").save("mine/00.png")
    assert run("mine", "--sidecars", "--existing", "overwrite") == 0
    assert Path("mine/00.txt").read_text() == f"{rows()[0]['captions'][0]}\n"
    assert "no text for 1 picture called as another one, such as mine/00.png" in capsys.readouterr().err


def test_a_text_that_cannot_be_written_costs_no_other(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    put(Path("mine"), "01.txt/in the way")  # where not even root can write
    assert run("mine", "--sidecars", "--existing", "overwrite") == 0
    assert Path("mine/02.txt").is_file()
    printed = capsys.readouterr().err
    assert "wrote 2 texts" in printed and "could not write 1 text: cannot write mine/01.txt" in printed


@pytest.mark.parametrize(("existing", "text"), [((), "Grandma"), (("--existing", "append"), "Grandma {}")])
def test_a_description_that_a_person_wrote_is_kept(
    existing: tuple[str, ...], text: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="--embed needs requirements-extras.txt")
    with pyexiv2.Image("mine/00.jpg") as picture:
        picture.modify_xmp({"Xmp.dc.description": {'lang="x-default"': "Grandma"}})
    Path("linked.jpg").symlink_to("mine/00.jpg")
    assert run("linked.jpg", "--embed", "originals", *existing) == 0
    assert Path("linked.jpg").is_symlink()
    with pyexiv2.Image("mine/00.jpg") as picture:
        [found] = picture.read_xmp()["Xmp.dc.description"].values()
    assert found == text.format(rows()[0]["captions"][0])
    assert ("left the descriptions of 1 picture as they were" in capsys.readouterr().err) == (not existing)


def test_a_page_and_predictions_of_somebody_else_are_not_written_over(run: Run) -> None:
    put(Path("."), "predictions.json", "captions_result.html", text='{"a": 1}')
    for _ in range(2):
        assert run("mine") == 0
        assert Path("predictions.json").read_text() == Path("captions_result.html").read_text() == '{"a": 1}'
    assert len(rows_of(".", "predictions-2.json")) == 3 and not Path("predictions-3.json").exists()


@pytest.mark.parametrize("where", ["copies", "originals"])
def test_a_caption_is_embedded_and_all_else_stays(where: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pyexiv2 = pytest.importorskip("pyexiv2", reason="--embed needs requirements-extras.txt")
    for ending in ("png", "webp", "tif", "gif"):
        Image.open("mine/02.jpg").save(f"mine/02.{ending}")
    with pyexiv2.Image("mine/00.jpg") as picture:
        picture.modify_exif({"Exif.Image.Artist": "me"})
        picture.modify_iptc({"Iptc.Application2.City": "Köln"})
    before = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    pixels = open_picture("mine/00.jpg").tobytes()
    assert run("mine", "--embed", where) == 0
    folder = Path("captioned" if where == "copies" else "mine")
    with pyexiv2.Image(str(folder / "00.jpg")) as picture:
        text = {'lang="x-default"': rows()[0]["captions"][0]}
        assert picture.read_xmp() == {"Xmp.dc.description": text, "Xmp.iptc.AltTextAccessibility": text}
        assert picture.read_iptc()["Iptc.Application2.Caption"] == rows()[0]["captions"][0]
        assert picture.read_iptc()["Iptc.Application2.City"] == "Köln"
        assert picture.read_exif()["Exif.Image.Artist"] == "me"
    assert open_picture(folder / "00.jpg").tobytes() == pixels
    after = {path.name: path.read_bytes() for path in Path("mine").iterdir()}
    assert (after == before) == (where == "copies") and after.keys() == before.keys()
    printed = capsys.readouterr().err
    assert "into the metadata of 6 pictures" in printed and "no caption into 1 picture, such as 02.gif" in printed


def test_what_was_drawn_is_never_captioned_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert run("mine", "--out", "mine") == 0
        assert len(rows_of("mine")) == 3
    assert "left out: outputs/, which holds what this project has drawn" in capsys.readouterr().err
    for words in (("mine/outputs",), ("mine/outputs/00.jpg",)):
        assert run(*words) == 2
        assert "which holds what this project has drawn" in capsys.readouterr().err


def test_a_folder_called_outputs_may_hold_a_persons_own_pictures(run: Run) -> None:
    shutil.move("mine", "outputs")
    before = {path.name: path.read_bytes() for path in Path("outputs").iterdir()}
    for _ in range(2):
        assert run("outputs") == 0
        assert {path.name: path.read_bytes() for path in Path("outputs").iterdir()} == before
        assert len(list(Path("outputs-2").glob("*.jpg"))) == 3
    assert "outputs-2/00.jpg" in Path("captions_result.html").read_text(encoding="utf-8")
    assert not Path("outputs-3").exists()


def rows_of(folder: str, name: str = "predictions.json") -> list[dict]:
    return json.loads(Path(folder, name).read_text())


def test_texts_need_pictures_of_ones_own(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--sidecars") == 2
    assert "name them, too" in capsys.readouterr().err
