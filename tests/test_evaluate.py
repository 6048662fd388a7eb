"""evaluate.py scores a run: what it writes, says and signs."""

from cli import UserError

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SCENES
from evaluation import (
    METRICS,
    RUN_PREDICTIONS,
    SCORED,
    SEARCH,
    THEIRS,
    Refusal,
    Run,
    list_pictures,
    needs_java,
    read_captions,
    read_references,
    read_scores,
    write_captions,
)

import evaluate
import metrics
import utils
from config import Config
from data import sample
from data.vocab import EnglishTokeniser, build_vocab
from models.model import CaptionModel

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
        name: round(value, 4) for name, value in expected.corpus.items()
    }
    assert scores["intervals"] == metrics.intervals(expected)


@pytest.mark.usefixtures("folder")
def test_captions_are_described_beside_the_training_captions_of_the_run() -> None:
    texts = read_references()
    training = [text for image in texts if image < "08.jpg" for text in texts[image]]
    assert read_scores()["captions"] == metrics.describe(list(read_captions().values()), training, EnglishTokeniser())


def test_captions_of_the_training_set_are_not_novel(run: Run) -> None:
    texts = read_references()
    run("--predictions", write_captions({"10.jpg": texts["00.jpg"][0], "11.jpg": texts["01.jpg"][2]}))
    assert read_scores("scores-test.json")["captions"]["novelty"] == 0
    run("--predictions", write_captions({"10.jpg": texts["10.jpg"][0], "11.jpg": texts["11.jpg"][2]}))
    assert read_scores("scores-test.json")["captions"]["novelty"] == 1


def test_each_picture_gets_its_own_caption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def caption_all(self: CaptionModel, features: object, names: list[str]) -> dict[str, str]:
        return {name: f"picture {name}" for name in names}

    monkeypatch.setattr(CaptionModel, "caption_all", caption_all)
    run()
    assert read_captions() == {"10.jpg": "picture 10.jpg", "11.jpg": "picture 11.jpg"}


def test_greedy_captions_of_val_have_the_scores_that_training_logged_for_its_best_epoch(run: Run) -> None:
    with open("runs/flickr8k/loss_log.txt", newline="") as file:
        best = max(csv.DictReader(file, delimiter="\t"), key=lambda row: float(row["val_cider"]))
    assert float(best["val_cider"]) > 0
    assert run("--split", "val", "--tokeniser", "words", "search.beam=1") == 0
    scores = read_scores("runs/flickr8k/scores-val.json")
    assert [round(scores["cider"], 2), round(scores["bleu4"], 2)] == [
        float(best["val_cider"]),
        float(best["val_bleu4"]),
    ]


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


def test_captions_without_words_are_warned_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--predictions", write_captions(THEIRS | {"11.jpg": " "})) == 0
    assert "warning: 1 of 2 captions have no words\n" in capsys.readouterr().out


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
    assert read_scores("scores-test.json")["meteor"] == 12.344
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
        ("consensus=5", "search:beam-5|lp:0.7|max:25|consensus:5"),
        ("consensus=5 beam=1", "search:greedy|lp:0.7|max:25"),
        ("temperature=0.5 top_k=4 top_p=0.9", "search:draw|temperature:0.5|top_k:4|top_p:0.9|seed:0|max:25"),
    ],
)
def test_a_search_is_described_by(settings: str, search: str, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*(f"search.{setting}" for setting in (*SEARCH, *settings.split())))
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


def test_several_checkpoints_write_together(run: Run, refuses: Refusal) -> None:
    twice = "--checkpoint runs/flickr8k/checkpoints.pth --checkpoint runs/flickr8k/checkpoints.pth"
    refuses(twice, "2 checkpoints", "--out")
    assert run(*twice.split(), "--out", "together") == 0
    alone, together = read_scores(), read_scores("together/scores-test.json")
    assert together["signature"] == alone["signature"] + "|ensemble:2"
    assert together["cider"] == alone["cider"]
