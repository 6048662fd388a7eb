"""evaluate.py scores a run: what it writes, prints and signs."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from captioners import save_captioner
from evaluation import (
    SEARCH,
    SIGNED,
    THEIRS,
    Refusal,
    Run,
    read_captions,
    read_references,
    read_run_scores,
    read_scores,
    write_captions,
)

import evaluate
import metrics
from cli import UserError
from config import Config
from data.vocab import EnglishTokeniser
from metrics import METRICS

# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
def test_alone_it_scores_the_test_pictures_of_the_newest_run_against_their_raw_references() -> None:
    captions, texts, tokenise = read_captions(), read_references(), EnglishTokeniser()
    training = [text for image in texts if image < "08.jpg" for text in texts[image]]
    names = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
    assert list(captions) == ["10.jpg", "11.jpg"]
    expected = metrics.evaluate(captions, texts, metrics.batched(tokenise), "en", names)
    scores = read_run_scores()
    keys = [*names[:4], "meteor", "rouge_l", "cider", "split", "signature", "intervals", "captions"]
    assert list(scores) == [*keys, "datasets", "images_per_second", "checkpoint"]
    assert [scores[name] for name in names] == [round(expected.corpus[name], 4) for name in names]
    assert scores["split"] == "test"
    assert scores["intervals"] == metrics.intervals(expected.per_image) and len(scores["intervals"]) == 2
    assert scores["captions"] == metrics.describe(list(captions.values()), training, tokenise)
    assert scores["signature"] == f"{SIGNED}|search:beam-5|lp:0.7|max:25"


@pytest.mark.usefixtures("folder")
def test_what_is_printed_is_what_is_written() -> None:
    printed, scores = Path("printed.txt").read_text(), read_run_scores()
    titles = {"BLEU-1": "bleu1", "BLEU-4": "bleu4", "ROUGE-L": "rouge_l", "CIDEr-D": "cider"}
    assert all(f"{title} {scores[name]:.1f}" in printed for title, name in titles.items())
    (low4, high4), (low, high) = scores["intervals"].values()
    bounds = f"BLEU-4 {low4:.1f} to {high4:.1f}, CIDEr-D {low:.1f} to {high:.1f}"
    assert f"95 % intervals by bootstrap: {bounds}\n" in printed
    assert f"{scores['captions']['length']:.1f} words on average" in printed
    assert "captioning 2 test pictures with runs/flickr8k/checkpoints.pth\n" in printed
    assert f"\n{scores['signature']}\n" in printed
    assert "wrote runs/flickr8k/predictions-test.json (" in printed
    assert "wrote runs/flickr8k/scores-test.json\n" in printed
    assert "warning" not in printed


def test_greedy_captions_of_val_have_the_scores_that_training_logged_for_its_best_epoch(run: Run) -> None:
    with open("runs/flickr8k/loss_log.txt", newline="") as file:
        best = max(csv.DictReader(file, delimiter="\t"), key=lambda row: float(row["val_cider"]))
    assert float(best["val_cider"]) > 0
    assert run("--split", "dev", "--tokeniser", "words", "search.beam=1", "search.min_length=0") == 0
    scores = read_scores("runs/flickr8k/scores-val.json")
    logged = [float(best["val_cider"]), float(best["val_bleu4"])]
    assert [round(scores["cider"], 2), round(scores["bleu4"], 2)] == logged
    assert scores["split"] == "val" and scores["signature"].endswith("|split:val|n:2|search:greedy|lp:0.7|max:25")
    assert read_captions("runs/flickr8k/predictions-val.json").keys() == {"08.jpg", "09.jpg"}


def test_out_says_where_to_write_and_drawn_captions_come_again(run: Run) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path("runs/flickr8k").iterdir()}
    for out in ("once", "twice"):
        assert run("--out", out, "search.temperature=1") == 0
        assert {path.name for path in Path(out).iterdir()} == {"scores-test.json", "predictions-test.json"}
    assert read_captions("once/predictions-test.json") == read_captions("twice/predictions-test.json")
    assert {path: path.stat().st_mtime_ns for path in Path("runs/flickr8k").iterdir()} == before


def test_without_test_pictures_val_is_scored(run: Run, refuses: Refusal) -> None:
    Path("archive/Flickr_8k.testImages.txt").unlink()
    refuses("--split test", "no test pictures", "--split")
    assert run() == 0
    assert read_scores("runs/flickr8k/scores-val.json")["split"] == "val"


def test_a_run_is_found_by_name_and_a_checkpoint_elsewhere_is_scored_beside_itself(run: Run) -> None:
    expected = read_run_scores()
    shutil.copytree("runs/flickr8k", "runs/older")
    os.utime("runs/older/checkpoints.pth", (0, 0))
    for name in ("older", "flickr8k"):
        Path(f"runs/{name}/scores-test.json").unlink()
    assert run("--run", "older") == 0
    assert read_scores("runs/older/scores-test.json")["cider"] == expected["cider"]
    Path("far").mkdir()
    shutil.copy("runs/flickr8k/checkpoints.pth", "far/model.pth")
    assert run("--checkpoint", "far/model.pth") == 0
    assert read_captions("far/predictions-test.json") == read_captions()
    assert read_scores("far/scores-test.json")["cider"] == expected["cider"]
    assert not Path("runs/flickr8k/scores-test.json").exists()


def test_several_checkpoints_write_together(run: Run, refuses: Refusal) -> None:
    twice = "--checkpoint runs/flickr8k/checkpoints.pth --checkpoint runs/flickr8k/checkpoints.pth"
    refuses(twice, "2 checkpoints", "--out")
    assert run(*twice.split(), "--out", "together") == 0
    alone, together = read_run_scores(), read_scores("together/scores-test.json")
    assert together["signature"] == alone["signature"] + "|ensemble:2"
    assert together["cider"] == alone["cider"]


def test_a_model_with_a_trained_backbone_encodes_pictures_itself(run: Run, tiny_config: Callable[..., Config]) -> None:
    save_captioner(Path("tuned.pth"), tiny_config("encoder.frozen=false", "data.cache=unused"), Path("archive/images"))
    assert run("--checkpoint", "tuned.pth", "search.max_length=5") == 0
    assert len(read_captions("predictions-test.json")) == 2
    assert not Path("unused").exists()


def test_captions_are_kept_when_they_cannot_be_scored(refuses: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "evaluate", Mock(side_effect=UserError("Java failed; fix it")))
    refuses("--out there", "Java failed")
    assert read_captions("there/predictions-test.json") == read_captions()


def test_captions_without_words_are_warned_of(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--predictions", write_captions(THEIRS | {"11.jpg": " "})) == 0
    assert "warning: 1 of 2 captions have no words\n" in capsys.readouterr().out


# ---- metrics and tokenisers ------------------------------------------------------------------------------------------


def test_without_java_meteor_is_null_and_it_is_said(refuses: Refusal) -> None:
    assert read_run_scores()["meteor"] is None
    printed = Path("printed.txt").read_text()
    assert "METEOR is left out: Java is missing (apt install default-jre-headless)\n" in printed
    assert printed.count("METEOR ") == 1
    refuses("--tokeniser ptb", "needs Java", "apt install")


@pytest.mark.usefixtures("java")
def test_with_java_its_tokens_are_scored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "meteor", METRICS["rouge_l"])  # which takes seconds
    assert run("--predictions", write_captions(THEIRS | {"11.jpg": "half an emoji \ud83d"})) == 0
    assert "|tok:ptb-java-3.4.1|" in read_scores()["signature"]


def test_one_more_metric_is_written_printed_and_compared(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METRICS, "meteor", metrics.Metric("METEOR", lambda corpus: (12.34567, None)))
    monkeypatch.setitem(METRICS, "clip", metrics.Metric("CLIP-S", lambda corpus: (70.0, np.array([60.0, 80.0]))))
    assert run("--predictions", write_captions()) == 0
    printed, scores = capsys.readouterr().out, read_scores()
    assert scores["meteor"] == 12.3457 and scores["clip"] == 70 and scores["intervals"].keys() >= {"clip"}
    assert "  METEOR 12.3  " in printed and "  CLIP-S 70.0\n" in printed and ", CLIP-S 60.0 to 80.0\n" in printed
    assert run("--compare", "flickr8k", "theirs.json", "--split", "test") == 0
    header, _, own, _ = Path("runs/comparison-test.md").read_text().splitlines()[:4]
    assert "| BLEU-4 | METEOR | ROUGE-L | CIDEr-D | CLIP-S | p (BLEU-4) | p (CIDEr-D) | p (CLIP-S) |" in header
    assert "| 12.3 |" in own and "| 70.0 |" in own


# ---- the signature ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "search"),
    [
        ("beam=3 length_penalty=0 max_length=9", "search:beam-3|lp:0|max:9"),
        ("beam=1 min_length=3", "search:greedy|lp:0.7|max:25|min_length:3"),
        ("no_repeat_ngram=3 forbidden=[red,blue]", "search:beam-5|lp:0.7|max:25|no_repeat_ngram:3|forbidden:red,blue"),
        ("consensus=5", "search:beam-5|lp:0.7|max:25|consensus:5"),
        ("consensus=5 beam=1", "search:greedy|lp:0.7|max:25"),
        ("temperature=0.5 top_k=4 top_p=0.9", "search:draw|temperature:0.5|top_k:4|top_p:0.9|seed:0|max:25"),
    ],
)
def test_a_search_is_signed_as(settings: str, search: str, tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*(f"search.{setting}" for setting in (*SEARCH, *settings.split())))
    assert evaluate.describe_search(config) == search


def test_another_systems_signature_names_its_file_and_counts_the_references(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--predictions", write_captions()) == 0
    assert read_scores()["signature"] == f"{SIGNED}|search:theirs.json"
    assert f"{SIGNED}|search:theirs.json" in capsys.readouterr().out.splitlines()
    rows = Path("archive/captions.csv").read_text().splitlines(keepends=True)
    Path("archive/captions.csv").write_text("".join(rows[:-1]))
    assert run("--predictions", "theirs.json") == 0
    assert "|refs:raw-4-5|split:test|n:2|" in read_scores()["signature"]
