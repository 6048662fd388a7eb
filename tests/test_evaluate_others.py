"""evaluate.py scores captions of any system, compares runs, and refuses what cannot be scored."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from dataset_files import run as call_script
from evaluation import (
    RUN_PREDICTIONS,
    SIGNED,
    THEIRS,
    Refusal,
    Run,
    list_pictures,
    read_captions,
    read_references,
    read_run_scores,
    read_scores,
    write_captions,
)

import evaluate
from data import formats

VAL = {"08.jpg": "a star", "09.jpg": "a circle"}

# ---- captions of any system ------------------------------------------------------------------------------------------


def test_a_runs_own_predictions_have_the_scores_of_the_run(run: Run) -> None:
    shutil.copy(RUN_PREDICTIONS, write_captions(path="far/theirs.json"))
    assert run("--predictions", "far/theirs.json") == 0
    assert [path.name for path in sorted(Path("far").iterdir())] == ["scores-test.json", "theirs.json"]
    own, again = read_run_scores(), read_scores("far/scores-test.json")
    assert own | {"signature": f"{SIGNED}|search:theirs.json"} == own | again


def test_captions_equal_to_raw_references_have_a_bleu_of_100_though_the_model_knows_not_all_words(run: Run) -> None:
    rare = "A labradoodle ( asleep ) beside a triangle of quartz ."
    with open("archive/captions.csv", "a", newline="") as file:
        csv.writer(file).writerow(["10.jpg", rare])
    run("--predictions", write_captions({"10.jpg": rare, "11.jpg": read_references()["11.jpg"][0]}))
    assert read_scores()["bleu4"] == 100
    run("--predictions", write_captions({"10.jpg": rare.replace("labradoodle", "<unk>"), "11.jpg": "a circle"}))
    assert read_scores()["bleu4"] < 100 and read_scores()["captions"]["unk"] == 0.5


@pytest.mark.usefixtures("numbered")
def test_pictures_may_have_numbers_as_ids_and_files_may_have_them_as_texts(run: Run) -> None:
    assert run() == 0
    assert list(read_captions()) == [10, 11]
    for kind in (int, str):
        assert run("--predictions", write_captions({kind(name): text for name, text in read_captions().items()})) == 0
        assert read_scores()["cider"] == read_run_scores()["cider"]


def test_captions_of_other_pictures_are_not_scored_and_this_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--predictions", write_captions())
    expected = read_scores()
    assert "not scored" not in capsys.readouterr().out
    others = {f"other-{number}.jpg": "a dog" for number in range(3)}
    assert run("--predictions", write_captions(others | THEIRS)) == 0
    assert read_scores() == expected
    assert "not scored: 3 captions of pictures that are not in test" in capsys.readouterr().out


def test_missing_captions_are_refused_with_their_number_and_names(refuses: Refusal) -> None:
    list_pictures("train", "00.jpg")
    list_pictures("test", *(f"{number:02}.jpg" for number in (*range(1, 8), 10, 11)))
    names = "01.jpg, 02.jpg, 03.jpg, 04.jpg, 05.jpg …"
    refuses(f"--predictions {write_captions({'10.jpg': 'a dog'})}", "8 of 9 test pictures", names, "--split")
    refuses(f"--predictions {write_captions({'elsewhere.jpg': 'a dog'})}", "9 of 9 test pictures", "or dataset")
    assert not Path("scores-test.json").exists()


@pytest.mark.usefixtures("numbered")
def test_a_picture_twice_is_refused(refuses: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    for twice in ('10, "caption": "a bird"', '"10", "caption": "a cat"'):
        rows = f'[{{"image_id": 10, "caption": "a dog"}}, {{"image_id": 11, "caption": "a"}}, {{"image_id": {twice}}}]'
        Path("theirs.json").write_text(rows)
        refuses("--predictions theirs.json", "theirs.json has the picture 10 twice")
    table = [("10.jpg", 7, "a dog", None), ("11.jpg", 7, "a cat", None)]
    monkeypatch.setitem(formats.READERS, "csv", lambda path: table)
    refuses(f"--predictions {write_captions({7: 'a dog'})}", "the dataset has the picture 7 twice")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"image,caption\n10.jpg,a dog\n",
        b"\xff\xfe[]",
        b'[{"image_id": "10.jpg"}]',
        b'[{"image_id": "10.jpg", "caption": null}, {"image_id": "11.jpg", "caption": "a dog"}]',
        b'[{"image_id": "10.jpg", "caption": ["a", "dog"]}, {"image_id": "11.jpg", "caption": "a dog"}]',
        b'{"10.jpg": "a dog", "11.jpg": "a cat"}',
        b"null",
    ],
    ids=lambda content: content[:30].decode(errors="replace") or "empty",
)
def test_a_file_of_another_form_is_refused(content: bytes, refuses: Refusal) -> None:
    Path("theirs.json").write_bytes(content)
    refuses("--predictions theirs.json", "theirs.json is not in COCO's results form", '"image_id"', '"caption"')


def test_a_byte_order_mark_half_an_emoji_and_empty_captions_do_not_matter(run: Run) -> None:
    rows = [{"image_id": "10.jpg", "caption": "\ud83d"}, {"image_id": "11.jpg", "caption": ""}]
    Path("theirs.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    assert run("--predictions", "theirs.json") == 0
    assert {read_scores()[name] for name in ("bleu1", "bleu4", "rouge_l", "cider")} == {0}


@pytest.mark.parametrize("how", [["--run", "moved"], []], ids=["named", "beside"])
def test_predictions_are_scored_against_the_references_of_their_run(how: list[str], run: Run) -> None:
    shutil.move("archive", "elsewhere")
    shutil.move("runs/flickr8k", "runs/moved")
    settings = Path("runs/moved/config.yaml")
    settings.write_text(settings.read_text().replace("root: archive", "root: elsewhere"))
    where = "theirs.json" if how else "runs/moved/theirs.json"
    for mode in ("--predictions", "--compare"):
        assert run(mode, write_captions(path=where), *how, "--out", "there") == 0
        assert run(mode, write_captions(path="alone.json"), "--out", "there") == 2
    assert read_scores("there/scores-test.json")["split"] == "test"


# ---- comparisons -----------------------------------------------------------------------------------------------------


def read_table(path: str = "runs/comparison-test.csv") -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_runs_are_compared_in_one_table_in_markdown_and_csv(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/flickr8k", "runs/same")
    best = {name: texts[0] for name, texts in read_references().items() if name in THEIRS}
    assert run("--compare", "flickr8k", "same", write_captions(best, "a/best.json")) == 0
    page, printed, scores = Path("runs/comparison-test.md").read_text(), capsys.readouterr().out, read_run_scores()
    assert page in printed and SIGNED in page
    header, _, *lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    titles = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "p (BLEU-4)", "p (CIDEr-D)"]
    assert header == ["run", *titles, "search"]
    assert lines[0][:2] == ["flickr8k", f"{scores['bleu1']:.1f}"]
    assert lines[0][-3:] == ["–", "–", "beam-5 lp:0.7 max:25"]
    assert lines[1] == ["same", *lines[0][1:-3], "1.000", "1.000", lines[0][-1]]
    assert lines[2][:5] == ["a/best.json", "100.0", "100.0", "100.0", "100.0"] and lines[2][-1] == "unknown"
    assert "METEOR is left out: Java is missing" in printed
    rows = read_table()
    assert [row["run"] for row in rows] == ["flickr8k", "same", "a/best.json"]
    assert float(rows[0]["cider"]) == pytest.approx(scores["cider"], abs=0.005)
    assert [row["p_cider"] for row in rows[:2]] == ["", "1.0"]


def test_p_values_are_against_the_first_run(run: Run) -> None:
    list_pictures("train", "00.jpg")
    list_pictures("test", *(f"{number:02}.jpg" for number in (1, 2, 3, 4, 5, 6, 7, 10, 11)))
    good = write_captions({name: texts[0] for name, texts in read_references().items()}, "good.json")
    bad = write_captions(dict.fromkeys(read_references(), "nothing to see"), "bad.json")
    shutil.copy(good, "again.json")
    assert run("--compare", good, bad, "again.json", "--out", "there") == 0
    page = Path("there/comparison-test.md").read_text()
    assert "against good.json" in page and page.count("| <0.001 | <0.001 |") == 1  # no difference is certain
    chance = {row["run"]: [row["p_bleu4"], row["p_cider"]] for row in read_table("there/comparison-test.csv")}
    assert chance == {"good.json": ["", ""], "bad.json": ["0.0", "0.0"], "again.json": ["1.0", "1.0"]}


def test_runs_are_compared_on_the_split_asked_for_else_on_val_where_all_were_scored_on_it(
    run: Run, refuses: Refusal
) -> None:
    refuses("--compare unscored flickr8k", "unscored has no predictions-val.json", "--run unscored --split val")
    assert run("--compare", "flickr8k") == 0
    assert len(read_table()) == 1
    write_captions(VAL, "runs/other/predictions-val.json")
    refuses("--compare other flickr8k", "flickr8k has no predictions", "evaluate.py --run flickr8k --split val")
    write_captions(VAL, "runs/flickr8k/predictions-val.json")
    assert run("--compare", "flickr8k", "other") == 0
    assert len(read_table("runs/comparison-val.csv")) == 2
    assert run("--compare", "flickr8k", "--split", "dev", "--out", "there") == 0
    assert {path.name for path in Path("there").iterdir()} == {"comparison-val.md", "comparison-val.csv"}


# ---- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--predictions theirs.json --checkpoint runs/flickr8k/checkpoints.pth", ["--checkpoint", "not allowed"]),
        ("--checkpoint runs/flickr8k/checkpoints.pth --run flickr8k", ["--checkpoint", "--run"]),
        ("--predictions theirs.json search.beam=3", ["search.beam=3", "leave it out"]),
        ("--compare theirs.json search.beam=3", ["search.beam=3", "leave it out"]),
        ("--split all", ["--split"]),
        ("--run nowhere", ["nowhere"]),
        ("--checkpoint nowhere.pth", ["nowhere.pth"]),
        ("--checkpoint theirs.json", ["theirs.json"]),
        ("--predictions nowhere.json", ["nowhere.json"]),
        ("--predictions theirs.json --run nowhere", ["nowhere"]),
        ("--predictions theirs.json data.root=nowhere", ["nowhere"]),
        ("--predictions theirs.json --out printed.txt", ["printed.txt"]),
        ("train.lr=1", ["train.lr"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(line: str, words: list[str], refuses: Refusal) -> None:
    write_captions()
    before = set(Path().rglob("*"))
    refuses(line, *words)
    assert set(Path().rglob("*")) == before


def test_cocos_val_file_alone_is_scored_whole_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"COCO_val2014_{number:012}.jpg" for number in range(30)]
    content = {
        "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": str(number), "caption": f"a {word} number {number}"}
            for number in range(30)
            for word in ("dog", "cat")
        ],
    }
    Path("annotations").mkdir()
    Path("annotations/captions_val2014.json").write_text(json.dumps(content))
    results = [{"image_id": number, "caption": f"a dog number {number}"} for number in range(30)]
    Path("results.json").write_text(json.dumps(results))
    words = ("--predictions", "results.json", "--split", "val", "data.root=.", "--tokeniser", "words")
    assert call_script(evaluate.main, *words) == 0
    assert "|split:val|n:30|" in capsys.readouterr().out
