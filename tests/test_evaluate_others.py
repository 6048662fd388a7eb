"""evaluate.py scores captions of any system, compares runs, and refuses what cannot be scored."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from evaluation import (
    METRICS,
    RUN_PREDICTIONS,
    THEIRS,
    Refusal,
    Run,
    list_pictures,
    read_captions,
    read_references,
    read_scores,
    write_captions,
)

import evaluate
from data import formats

# ---- captions of any system ------------------------------------------------------------------------------------------


def test_a_runs_own_predictions_have_the_scores_of_the_run(run: Run) -> None:
    assert run("--predictions", RUN_PREDICTIONS, "--out", "again") == 0
    once, again = read_scores(), read_scores("again/scores-test.json")
    compared = [*METRICS, "split", "intervals", "captions"]
    assert {name: again[name] for name in compared} == {name: once[name] for name in compared}


def test_scores_are_written_beside_the_predictions(run: Run) -> None:
    assert run("--predictions", write_captions(path="far/theirs.json")) == 0
    assert [path.name for path in sorted(Path("far").iterdir())] == ["scores-test.json", "theirs.json"]


def test_captions_equal_to_raw_references_have_a_bleu_of_100_though_the_model_knows_not_all_words(run: Run) -> None:
    rare = "A labradoodle ( asleep ) beside a triangle of quartz ."
    with open("archive/captions.csv", "a", newline="") as file:
        csv.writer(file).writerow(["10.jpg", rare])
    run("--predictions", write_captions({"10.jpg": rare, "11.jpg": read_references()["11.jpg"][0]}))
    assert read_scores("scores-test.json")["bleu4"] == 100
    run("--predictions", write_captions({"10.jpg": rare.replace("labradoodle", "<unk>"), "11.jpg": "a circle"}))
    assert read_scores("scores-test.json")["bleu4"] < 100
    assert read_scores("scores-test.json")["captions"]["unk"] == 0.5


@pytest.mark.usefixtures("numbered")
def test_pictures_may_have_numbers_as_ids(run: Run) -> None:
    assert run() == 0
    assert list(read_captions()) == [10, 11]
    assert run("--predictions", RUN_PREDICTIONS, "--out", "again") == 0
    assert read_scores("again/scores-test.json")["cider"] == read_scores()["cider"]


@pytest.mark.usefixtures("numbered")
@pytest.mark.parametrize("kind", [int, str])
def test_ids_may_be_numbers_or_texts(kind: type, run: Run) -> None:
    theirs = {kind(name[:2]): text for name, text in THEIRS.items()}
    assert run("--predictions", write_captions(theirs)) == 0
    assert read_scores("scores-test.json")["bleu1"] > 0


def test_captions_of_other_pictures_are_not_scored_and_this_is_said(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--predictions", write_captions())
    expected = read_scores("scores-test.json")
    assert "not scored" not in capsys.readouterr().out
    others = {f"other-{number}.jpg": "a dog" for number in range(3)}
    assert run("--predictions", write_captions(others | THEIRS)) == 0
    assert read_scores("scores-test.json") == expected
    assert "not scored: 3 captions of pictures that are not in test" in capsys.readouterr().out


def test_missing_captions_are_refused_with_their_number_and_names(refuses: Refusal) -> None:
    list_pictures("train", "00.jpg")
    list_pictures("test", *(f"{number:02}.jpg" for number in (*range(1, 8), 10, 11)))
    refuses(
        f"--predictions {write_captions({'10.jpg': 'a dog'})}",
        "8 of 9 test pictures",
        "01.jpg, 02.jpg, 03.jpg, 04.jpg, 05.jpg, …",
        "--split",
    )
    assert not Path("scores-test.json").exists()


def test_captions_of_another_dataset_are_known_as_such(refuses: Refusal) -> None:
    path = write_captions({"elsewhere.jpg": "a dog"})
    refuses(f"--predictions {path}", path, "none of the", "such as", "the same dataset")


def test_two_captions_of_a_picture_are_refused(refuses: Refusal) -> None:
    rows = [{"image_id": name, "caption": "a dog"} for name in ("10.jpg", "11.jpg", "10.jpg")]
    Path("theirs.json").write_text(json.dumps(rows))
    refuses("--predictions theirs.json", "theirs.json", "more than one caption for 10.jpg")


@pytest.mark.usefixtures("numbered")
def test_a_picture_twice_as_number_and_as_text_is_refused(refuses: Refusal) -> None:
    path = write_captions({10: "a dog", 11: "a cat", "10": "a bird"})
    refuses(f"--predictions {path}", "more than one caption for 10")


def test_two_pictures_of_one_id_among_the_references_are_refused(
    refuses: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("10.jpg", 7, "a dog", None), ("11.jpg", 7, "a cat", None)]
    monkeypatch.setitem(formats.READERS, "csv", lambda path: rows)
    refuses(f"--predictions {write_captions({7: 'a dog'})}", "more than one picture with the id 7")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"image,caption\n10.jpg,a dog\n",
        b"\xff\xfe[]",
        b'[{"image_id": "10.jpg"}]',
        b'[{"caption": "a dog"}]',
        b'[{"image_id": "10.jpg", "caption": null}, {"image_id": "11.jpg", "caption": "a dog"}]',
        b'[{"image_id": "10.jpg", "caption": ["a", "dog"]}, {"image_id": "11.jpg", "caption": "a dog"}]',
        b'{"10.jpg": "a dog", "11.jpg": "a cat"}',
        b'{"image_id": "10.jpg", "caption": "a dog"}',
        b'["a dog", "a cat"]',
        b"[[]]",
        b"7",
        b"null",
        b"[" * 100_000,
    ],
    ids=lambda content: content[:30].decode(errors="replace") or "empty",
)
def test_a_file_of_another_form_is_refused(content: bytes, refuses: Refusal) -> None:
    Path("theirs.json").write_bytes(content)
    refuses("--predictions theirs.json", "theirs.json is not in COCO's results form", '"image_id"', '"caption"')


def test_a_byte_order_mark_and_half_an_emoji_do_not_matter(run: Run) -> None:
    Path("theirs.json").write_bytes(
        b'\xef\xbb\xbf[{"image_id": "10.jpg", "caption": "a \\ud83d dog"}, {"image_id": "11.jpg", "caption": "a dog"}]'
    )
    assert run("--predictions", "theirs.json") == 0


def test_empty_captions_score_0(run: Run) -> None:
    assert run("--predictions", write_captions(dict.fromkeys(THEIRS, ""))) == 0
    assert {read_scores("scores-test.json")[name] for name in ("bleu1", "bleu4", "rouge_l", "cider")} == {0}


@pytest.mark.parametrize("how", [["--run", "moved"], []], ids=["named", "beside"])
def test_predictions_are_scored_against_the_references_of_their_run(how: list[str], run: Run) -> None:
    shutil.move("archive", "elsewhere")
    shutil.move("runs/flickr8k", "runs/moved")
    settings = Path("runs/moved/config.yaml")
    settings.write_text(settings.read_text().replace("root: archive", "root: elsewhere"))
    where = "theirs.json" if how else "runs/moved/theirs.json"
    assert run("--predictions", write_captions(path=where), *how, "--out", "there") == 0
    assert read_scores("there/scores-test.json")["split"] == "test"


# ---- comparisons -----------------------------------------------------------------------------------------------------


def test_runs_are_compared_in_one_table_in_markdown_and_csv(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/flickr8k", "runs/same")
    best = {name: texts[0] for name, texts in read_references().items() if name in THEIRS}
    assert run("--compare", "flickr8k", "same", write_captions(best, "best.json")) == 0
    page = Path("runs/comparison-test.md").read_text()
    printed = capsys.readouterr().out
    assert page in printed
    header, _, *lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert header == [
        *("run", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "p (BLEU-4)", "p (CIDEr-D)"),
        "search",
    ]
    scores = read_scores()
    assert lines[0][:2] == ["flickr8k", f"{scores['bleu1']:.1f}"]
    assert lines[0][-3:] == ["–", "–", "beam-5 lp:0.7 max:25"]
    assert lines[1] == ["same", *lines[0][1:-3], "1.000", "1.000", lines[0][-1]]
    assert lines[2][-1] == "unknown"
    assert "of 2 pictures alone p says little" in printed
    assert lines[2][:5] == ["best.json", "100.0", "100.0", "100.0", "100.0"]
    with open("runs/comparison-test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["flickr8k", "same", "best.json"]
    assert float(rows[0]["cider"]) == pytest.approx(scores["cider"], abs=0.005)
    assert [row["p_cider"] for row in rows[:2]] == ["", "1.0"]


def test_no_difference_is_said_to_be_certain() -> None:
    assert [evaluate.as_p(p) for p in (None, 0.0, 0.0009, 0.001, 1)] == ["–", "<0.001", "<0.001", "0.001", "1.000"]


def test_p_values_are_against_the_first_run(run: Run) -> None:
    list_pictures("train", "00.jpg")
    list_pictures("test", *(f"{number:02}.jpg" for number in (1, 2, 3, 4, 5, 6, 7, 10, 11)))
    good = write_captions({name: texts[0] for name, texts in read_references().items()}, "good.json")
    bad = write_captions(dict.fromkeys(read_references(), "nothing to see"), "bad.json")
    shutil.copy(good, "again.json")
    assert run("--compare", good, bad, "again.json", "--out", "there") == 0
    page = Path("there/comparison-test.md").read_text()
    assert "against good.json" in page
    with open("there/comparison-test.csv", newline="") as file:
        chance = {row["run"]: [row["p_bleu4"], row["p_cider"]] for row in csv.DictReader(file)}
    assert chance == {"good.json": ["", ""], "bad.json": ["0.0", "0.0"], "again.json": ["1.0", "1.0"]}


def test_files_of_one_name_are_told_apart(run: Run) -> None:
    assert run("--compare", write_captions(path="a/theirs.json"), write_captions(path="b/theirs.json")) == 0
    page = Path("runs/comparison-test.md").read_text()
    assert "| a/theirs.json |" in page
    assert "| b/theirs.json |" in page


def test_one_run_alone_is_a_table_of_one_line(run: Run) -> None:
    assert run("--compare", "flickr8k") == 0
    assert Path("runs/comparison-test.csv").read_text().count("\n") == 2


def test_the_split_to_compare_can_be_chosen(run: Run) -> None:
    write_captions({"08.jpg": "a star", "09.jpg": "a circle"}, "runs/flickr8k/predictions-val.json")
    assert run("--compare", "flickr8k", "--split", "dev", "--out", "there") == 0
    assert {path.name for path in Path("there").iterdir()} == {"comparison-val.md", "comparison-val.csv"}


def test_a_run_never_scored_is_refused_with_what_to_do(refuses: Refusal) -> None:
    refuses(
        "--compare unscored flickr8k",
        "unscored has no predictions-val.json",
        "python evaluate.py --run unscored --split val",
    )


def test_runs_are_compared_on_val_where_all_were_scored_on_it(run: Run) -> None:
    for name in ("flickr8k", "other"):
        write_captions({"08.jpg": "a star", "09.jpg": "a circle"}, f"runs/{name}/predictions-val.json")
    assert run("--compare", "flickr8k", "other") == 0
    assert Path("runs/comparison-val.md").is_file()


def test_a_run_scored_on_another_split_is_refused_with_what_to_do(refuses: Refusal) -> None:
    write_captions({"08.jpg": "a star", "09.jpg": "a circle"}, "runs/other/predictions-val.json")
    refuses("--compare other flickr8k", "flickr8k has no predictions", "evaluate.py --run flickr8k --split val")


@pytest.mark.parametrize("other", ["theirs.json", "runs/other"])
def test_the_references_of_a_comparison_can_be_another_runs(other: str, run: Run) -> None:
    shutil.move("archive", "elsewhere")
    settings = Path("runs/flickr8k/config.yaml")
    settings.write_text(settings.read_text().replace("root: archive", "root: elsewhere"))
    write_captions(path="theirs.json")
    write_captions(path="runs/other/predictions-test.json")
    assert run("--compare", other) == 2
    assert run("--compare", other, "--run", "flickr8k") == 0


# ---- what cannot be done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--predictions theirs.json --checkpoint runs/flickr8k/checkpoints.pth", ["--checkpoint", "not allowed"]),
        ("--predictions theirs.json --compare flickr8k", ["--compare", "not allowed"]),
        ("--checkpoint runs/flickr8k/checkpoints.pth --compare flickr8k", ["--compare", "not allowed"]),
        ("--checkpoint runs/flickr8k/checkpoints.pth --run flickr8k", ["--checkpoint", "--run"]),
        ("--predictions theirs.json search.beam=3", ["search.beam=3", "leave it out"]),
        ("--compare theirs.json search.beam=3", ["search.beam=3", "leave it out"]),
        ("--compare", ["--compare"]),
        ("--split all", ["--split"]),
        ("--tokeniser spaces", ["--tokeniser"]),
        ("--run nowhere", ["nowhere"]),
        ("--checkpoint nowhere.pth", ["nowhere.pth"]),
        ("--checkpoint theirs.json", ["theirs.json"]),
        ("--predictions nowhere.json", ["nowhere.json"]),
        ("--predictions archive", ["archive"]),
        ("--predictions theirs.json --run nowhere", ["nowhere"]),
        ("--predictions theirs.json data.root=nowhere", ["nowhere"]),
        ("--predictions theirs.json --out printed.txt", ["printed.txt"]),
        ("search.beam=0", ["search.beam"]),
        ("train.lr=1", ["train.lr"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(line: str, words: list[str], refuses: Refusal) -> None:
    write_captions()
    before = set(Path().rglob("*"))
    refuses(line, *words)
    assert set(Path().rglob("*")) == before
