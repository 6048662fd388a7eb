import contextlib
import csv
import json
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk
import pandas as pd
import pytest
from conftest import SCENES, TINY

import evaluate
import metrics
import train
import utils
from config import Config, UserError
from data import annotations, sample
from data.vocab import EnglishTokeniser, build_vocab
from models.model import CaptionModel

Run = Callable[..., int]
Refusal = Callable[..., None]
Captions = dict[Any, str]

METRICS = ["bleu1", "bleu2", "bleu3", "bleu4", "meteor", "rouge_l", "cider", "spice"]
SCORED = f"scorer:pycocoevalcap-1.2|tok:nltk-words-{nltk.__version__}|refs:raw-5|split:test|n:2"
THEIRS = {"10.jpg": "A small blue triangle on grey .", "11.jpg": "A large red circle at the bottom of the picture"}
RUN_PREDICTIONS = "runs/flickr8k/predictions-test.json"

needs_java = pytest.mark.skipif(not metrics.has_java(), reason="needs Java")


@pytest.fixture(scope="module")
def scored(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the tiny dataset and a run, trained until its captions are right in part, then scored.

    Scored without Java, which would take its time; what this printed is in printed.txt.
    """
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(drawn, folder / "archive")
    learning = ("train.epochs=11", "train.lr=3e-2", "train.warmup_steps=1", "train.seed=1", "decoder.dropout=0")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PATH", str(folder / "nothing"))
        patch.setattr(sys, "argv", ["train.py", *TINY, *learning])
        assert utils.cli(train.main) == 0
        patch.setattr(sys, "argv", ["evaluate.py"])
        with open("printed.txt", "w") as file, contextlib.redirect_stdout(file):
            assert utils.cli(evaluate.main) == 0
    return folder


@pytest.fixture
def folder(scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the working folder, as the working folder; models are large, and only read."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pth") else shutil.copy2)(source, target)

    shutil.copytree(scored, tmp_path, dirs_exist_ok=True, copy_function=copy)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_with_java(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the script and return its exit code."""

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
        try:
            return utils.cli(evaluate.main)
        except SystemExit as exit_:  # argparse's own way
            assert isinstance(exit_.code, int)
            return exit_.code

    return command


@pytest.fixture
def run(run_with_java: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the script where there is no Java, which would take its time."""
    monkeypatch.setenv("PATH", str(folder / "nothing"))
    return run_with_java


@pytest.fixture
def refuses(run: Run, capsys: pytest.CaptureFixture[str]) -> Refusal:
    """`refuses("--split test", "no test")` runs the script and expects one sentence with these words, and code 2."""

    def command(line: str, *words: str) -> None:
        capsys.readouterr()
        assert run(*line.split()) == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"(evaluate\.py: )?error: ", message), message
        assert all(word in message for word in words), message
        assert not re.search(r"[.!?] [A-Z]", message), message

    return command


@pytest.fixture
def numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pictures numbers as ids, as COCO does: 10.jpg is 10."""

    def read(path: Path) -> pd.DataFrame:
        return annotations.read_csv(path).assign(image_id=lambda table: table["image"].str[:2].astype(int))

    monkeypatch.setitem(annotations.FORMATS, "auto", read)


def read_scores(path: str = "runs/flickr8k/scores-test.json") -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def read_captions(path: str = RUN_PREDICTIONS) -> Captions:
    return {row["image_id"]: row["caption"] for row in json.loads(Path(path).read_text())}


def write_captions(captions: Captions = THEIRS, path: str = "theirs.json") -> str:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(json.dumps([{"image_id": name, "caption": text} for name, text in captions.items()]))
    return path


def read_references() -> dict[str, list[str]]:
    texts = defaultdict(list)
    with open("archive/captions.csv", newline="") as file:
        for row in csv.DictReader(file):
            texts[row["image"]].append(row["caption"])
    return texts


def list_pictures(split: str, *names: str) -> None:
    Path(f"archive/Flickr_8k.{split}Images.txt").write_text("".join(f"{name}\n" for name in names))


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_alone_it_scores_the_test_pictures_of_the_newest_run() -> None:
    scores = read_scores()
    assert [name for name in scores if name in METRICS] == METRICS
    assert scores.keys() >= {"split", "signature", "intervals", "captions"}
    assert scores["split"] == "test"
    assert scores["intervals"].keys() == {"bleu4", "cider"}
    assert "runs/flickr8k/checkpoints.pth" in Path("printed.txt").read_text()


@pytest.mark.usefixtures("folder")
def test_captions_are_written_in_cocos_results_form_one_a_picture() -> None:
    rows = json.loads(Path(RUN_PREDICTIONS).read_text())
    assert [row["image_id"] for row in rows] == ["10.jpg", "11.jpg"]
    assert all(list(row) == ["image_id", "caption"] and isinstance(row["caption"], str) for row in rows)


@pytest.mark.usefixtures("folder")
def test_the_scores_are_those_of_the_raw_references() -> None:
    captions, texts = read_captions(), read_references()
    expected = metrics.score(
        captions,
        {image: texts[image] for image in captions},
        lambda texts: metrics.by_words(EnglishTokeniser(), texts),
        rouge=True,
    )
    scores = read_scores()
    assert {name: scores[name] for name in expected.corpus} == {
        name: round(value, 2) for name, value in expected.corpus.items()
    }
    assert scores["intervals"] == metrics.intervals(expected)


@pytest.mark.usefixtures("folder")
def test_captions_are_described_beside_the_training_captions_of_the_run() -> None:
    texts = read_references()
    training = [text for image in texts if image < "08.jpg" for text in texts[image]]
    assert read_scores()["captions"] == metrics.describe(list(read_captions().values()), training, EnglishTokeniser())


def test_greedy_captions_of_val_have_the_scores_that_training_logged_for_its_best_epoch(run: Run) -> None:
    with open("runs/flickr8k/loss_log.txt", newline="") as file:
        best = max(csv.DictReader(file, delimiter="\t"), key=lambda row: float(row["val_cider"]))
    assert float(best["val_cider"]) > 0
    assert run("--split", "val", "--tokeniser", "words", "search.beam=1") == 0
    scores = read_scores("runs/flickr8k/scores-val.json")
    assert [scores["cider"], scores["bleu4"]] == [float(best["val_cider"]), float(best["val_bleu4"])]


def test_out_says_where_to_write(run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("runs/flickr8k").iterdir()}
    assert run("--out", "there") == 0
    assert {path.name for path in Path("there").iterdir()} == {"scores-test.json", "predictions-test.json"}
    assert {path: path.stat().st_mtime_ns for path in Path("runs/flickr8k").iterdir()} == before


def test_dev_is_val(run: Run) -> None:
    assert run("--split", "dev") == 0
    assert read_scores("runs/flickr8k/scores-val.json")["split"] == "val"
    assert read_captions("runs/flickr8k/predictions-val.json").keys() == {"08.jpg", "09.jpg"}


def test_without_test_pictures_val_is_scored(run: Run) -> None:
    Path("archive/Flickr_8k.testImages.txt").unlink()
    assert run() == 0
    assert read_scores("runs/flickr8k/scores-val.json")["split"] == "val"


def test_a_split_without_pictures_is_refused(refuses: Refusal) -> None:
    Path("archive/Flickr_8k.testImages.txt").unlink()
    refuses("--split test", "no test pictures", "--split")


def test_a_run_is_found_by_name(run: Run) -> None:
    shutil.copytree("runs/flickr8k", "runs/older")
    os.utime("runs/older/checkpoints.pth", (0, 0))
    for name in ("older", "flickr8k"):
        Path(f"runs/{name}/scores-test.json").unlink()
    assert run("--run", "older") == 0
    assert Path("runs/older/scores-test.json").is_file()
    assert not Path("runs/flickr8k/scores-test.json").exists()


def test_a_checkpoint_elsewhere_is_scored_beside_itself(run: Run) -> None:
    Path("far").mkdir()
    shutil.copy("runs/flickr8k/checkpoints.pth", "far/model.pth")
    assert run("--checkpoint", "far/model.pth") == 0
    assert read_captions("far/predictions-test.json") == read_captions()
    assert read_scores("far/scores-test.json")["cider"] == read_scores()["cider"]


def test_a_model_with_a_trained_backbone_encodes_pictures_itself(run: Run, tiny_config: Callable[..., Config]) -> None:
    vocab = build_vocab([text for scene in SCENES for text in sample.describe(scene)], min_count=1)
    model = CaptionModel.build(tiny_config("encoder.frozen=false", "data.cache=unused"), vocab)
    utils.save_checkpoint(Path("tuned.pth"), model.state())
    assert run("--checkpoint", "tuned.pth", "search.max_length=5") == 0
    assert len(read_captions("predictions-test.json")) == 2
    assert not Path("unused").exists()


def test_drawn_captions_come_again(run: Run) -> None:
    for out in ("once", "twice"):
        assert run("--out", out, "search.temperature=1") == 0
    assert read_captions("once/predictions-test.json") == read_captions("twice/predictions-test.json")


def test_captions_are_kept_when_they_cannot_be_scored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **options: object) -> metrics.Scores:
        raise UserError("Java failed; mend it")

    monkeypatch.setattr(metrics, "score", fail)
    assert run("--out", "there") == 2
    assert read_captions("there/predictions-test.json") == read_captions()


@pytest.mark.usefixtures("folder")
def test_what_is_printed_is_what_is_written() -> None:
    out, scores = Path("printed.txt").read_text(), read_scores()
    names = {"BLEU-1": "bleu1", "BLEU-4": "bleu4", "ROUGE-L": "rouge_l", "CIDEr-D": "cider"}
    assert all(f"{name} {scores[key]:.1f}" in out for name, key in names.items())
    low, high = scores["intervals"]["cider"]
    assert f"95 % intervals by bootstrap: BLEU-4 {scores['intervals']['bleu4'][0]:.1f} to " in out
    assert f"CIDEr-D {low:.1f} to {high:.1f}" in out
    assert f"{scores['captions']['length']:.1f} words on average" in out


def test_one_picture_alone_is_warned_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    list_pictures("test", "10.jpg")
    assert run("--predictions", write_captions({"10.jpg": THEIRS["10.jpg"]})) == 0
    assert "warning: one picture alone has a CIDEr of 0" in capsys.readouterr().out
    assert read_scores("scores-test.json")["cider"] == 0


@pytest.mark.usefixtures("folder")
def test_two_pictures_are_not_warned_of() -> None:
    assert "warning" not in Path("printed.txt").read_text()


# ---- Java ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_without_java_meteor_and_spice_are_null_and_it_is_said() -> None:
    assert read_scores()["meteor"] is None
    assert read_scores()["spice"] is None
    out = Path("printed.txt").read_text()
    assert "METEOR and SPICE are left out: they need Java" in out
    assert not re.search(r"(METEOR|SPICE) \d", out)


def test_javas_tokeniser_without_java_is_refused(refuses: Refusal) -> None:
    refuses("--tokeniser ptb", "needs Java", "apt install")


@needs_java
def test_with_java_its_tokens_are_scored_and_meteor_is(
    run_with_java: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "has_spice_jars", lambda: False)
    monkeypatch.setattr(metrics, "meteor", lambda candidates, raw: 12.344)
    assert run_with_java("--predictions", write_captions()) == 0
    assert read_scores("scores-test.json")["meteor"] == 12.34
    assert "|tok:ptb-java-3.4.1|" in read_scores("scores-test.json")["signature"]
    assert "METEOR 12.3" in capsys.readouterr().out


# ---- the signature ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_a_runs_signature_says_what_the_scores_depend_on() -> None:
    signature = f"{SCORED}|search:beam-5|lp:0.7|max:25"
    assert read_scores()["signature"] == signature
    assert signature in Path("printed.txt").read_text().splitlines()


def test_the_search_in_the_signature_is_the_one_asked_for(run: Run) -> None:
    assert run("search.beam=1", "search.min_length=3") == 0
    assert read_scores()["signature"] == f"{SCORED}|search:greedy|lp:0.7|max:25|min_length:3"


@pytest.mark.parametrize(
    ("settings", "search"),
    [
        ("beam=3 length_penalty=0 max_length=9", "search:beam-3|lp:0|max:9"),
        ("no_repeat_ngram=3 forbidden=[red,blue]", "search:beam-5|lp:0.7|max:25|no_repeat_ngram:3|forbidden:red,blue"),
        ("temperature=0.5 top_k=4 top_p=0.9", "search:draw|temperature:0.5|top_k:4|top_p:0.9|seed:0|max:25"),
    ],
)
def test_a_search_is_described_by(settings: str, search: str, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*(f"search.{setting}" for setting in settings.split()))
    assert evaluate.describe_search(config) == search


def test_another_systems_signature_names_its_file(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--predictions", write_captions()) == 0
    assert read_scores("scores-test.json")["signature"] == f"{SCORED}|search:theirs.json"
    assert f"{SCORED}|search:theirs.json" in capsys.readouterr().out.splitlines()


def test_a_comparisons_signature_stands_below_its_table(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--compare", write_captions()) == 0
    assert SCORED in capsys.readouterr().out
    assert SCORED in Path("runs/comparison-test.md").read_text()


def test_the_signature_counts_the_references(run: Run) -> None:
    rows = Path("archive/captions.csv").read_text().splitlines(keepends=True)
    Path("archive/captions.csv").write_text("".join(rows[:-1]))
    assert run("--predictions", write_captions()) == 0
    assert "|refs:raw-4-5|split:test|n:2|" in read_scores("scores-test.json")["signature"]


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
    monkeypatch.setitem(annotations.FORMATS, "auto", lambda path: annotations.read_csv(path).assign(image_id=7))
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
    assert page in capsys.readouterr().out
    header, _, *lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    assert header == [
        *("run", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D", "p (BLEU-4)", "p (CIDEr-D)")
    ]
    scores = read_scores()
    assert lines[0][:2] == ["flickr8k", f"{scores['bleu1']:.1f}"]
    assert lines[0][-2:] == ["–", "–"]
    assert lines[1] == ["same", *lines[0][1:-2], "1.000", "1.000"]
    assert lines[2][:5] == ["best.json", "100.0", "100.0", "100.0", "100.0"]
    with open("runs/comparison-test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["flickr8k", "same", "best.json"]
    assert float(rows[0]["cider"]) == pytest.approx(scores["cider"], abs=0.005)
    assert [row["p_cider"] for row in rows[:2]] == ["", "1.0"]


def test_p_values_are_against_the_first_run(run: Run) -> None:
    list_pictures("train", "00.jpg")
    list_pictures("test", *(f"{number:02}.jpg" for number in (1, 2, 3, 4, 5, 6, 7, 10, 11)))
    good = write_captions({name: texts[0] for name, texts in read_references().items()}, "good.json")
    bad = write_captions(dict.fromkeys(read_references(), "nothing to see"), "bad.json")
    assert run("--compare", good, bad, "good.json", "--out", "there") == 0
    page = Path("there/comparison-test.md").read_text()
    assert "against good.json" in page
    with open("there/comparison-test.csv", newline="") as file:
        [row] = [row for row in csv.DictReader(file) if row["run"] == "bad.json"]
    assert float(row["p_bleu4"]) == float(row["p_cider"]) == 0


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
    refuses("--compare flickr8k unscored", "unscored has no predictions", "python evaluate.py --run unscored")


def test_a_run_scored_on_another_split_is_refused_with_what_to_do(refuses: Refusal) -> None:
    shutil.move(RUN_PREDICTIONS, "runs/flickr8k/predictions-val.json")
    refuses("--compare flickr8k", "flickr8k has no predictions", "python evaluate.py --run flickr8k --split test")


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
