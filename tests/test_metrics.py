"""Scores are those of raw references, one item per picture."""

from pathlib import Path

import pandas as pd
import pytest
import torch

import metrics
from data import annotations
from data.dataset import Flickr8kDataset
from data.features import FeatureCache
from data.vocab import EnglishTokeniser, build_vocab
from models.model import CaptionModel
from train import caption_all, references

TOKENISE = EnglishTokeniser()
CAPTIONS = {
    "1.jpg": "A black dog runs through the tall grass .",
    "2.jpg": "Two children play with a red ball on the beach",
    "3.jpg": "A man in a blue shirt rides an old bicycle",
}
REFERENCES = {
    "1.jpg": ["A black labradoodle runs through the tall grass .", "The dog is running in a meadow ."],
    "2.jpg": ["Two kids play with a red ball on the sand", "Children on a beach"],
    "3.jpg": ["A man in a blue shirt rides an old penny-farthing", "A cyclist in blue ."],
}


def test_captions_equal_to_their_references_have_bleu_100() -> None:
    scores = metrics.score(CAPTIONS, {image: [caption] for image, caption in CAPTIONS.items()}, TOKENISE)
    assert [scores[f"bleu{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)
    assert scores["cider"] > 900


def test_case_and_punctuation_are_not_scored() -> None:
    shouted = {image: f"{caption.upper()} !" for image, caption in CAPTIONS.items()}
    assert metrics.score(shouted, REFERENCES, TOKENISE) == metrics.score(CAPTIONS, REFERENCES, TOKENISE)


def test_rare_words_in_references_are_scored_as_they_are() -> None:
    vocab = build_vocab(
        ["black dog runs through the tall grass in a blue shirt two with a red ball on an old a man"], 1
    )

    def known(text: str) -> str:
        return " ".join(word if word in vocab.words else "unk" for word in TOKENISE(text))

    flattered = metrics.score(
        {image: known(caption) for image, caption in CAPTIONS.items()},
        {image: [known(text) for text in texts] for image, texts in REFERENCES.items()},
        TOKENISE,
    )
    assert metrics.score(CAPTIONS, REFERENCES, TOKENISE)["bleu4"] < flattered["bleu4"] - 5


def test_training_scores_the_raw_references_of_each_picture_once() -> None:
    table = pd.DataFrame(
        {"image": ["b.jpg", "a.jpg", "b.jpg"], "caption": ["A Labradoodle .", "one", "two ,  words"], "split": "val"}
    )
    assert references(table) == {"b.jpg": ["A Labradoodle .", "two ,  words"], "a.jpg": ["one"]}


def test_a_picture_with_five_captions_is_captioned_once(archive: Path, tiny_model: CaptionModel) -> None:
    table = annotations.load(tiny_model.config.data)
    val = table[table["split"] == "val"]
    names = sorted(val["image"].unique())
    features = FeatureCache(tiny_model, names, archive / "images", torch.device("cpu")).fill()
    dataset = Flickr8kDataset(val, tiny_model.vocab, archive / "images", tiny_model.transform, features)
    assert len(dataset) == 10
    assert list(caption_all(tiny_model, dataset)) == list(references(val)) == ["08.jpg", "09.jpg"]


def test_the_order_of_pictures_does_not_matter() -> None:
    backwards = dict(reversed(CAPTIONS.items()))
    expected = metrics.score(CAPTIONS, REFERENCES, TOKENISE)
    assert metrics.score(backwards, dict(reversed(REFERENCES.items())), TOKENISE) == pytest.approx(expected)
    assert metrics.score(CAPTIONS, dict(reversed(REFERENCES.items())), TOKENISE) == pytest.approx(expected)


@pytest.mark.parametrize("caption", ["", " . ", "dog"])
def test_an_empty_caption_scores_little_and_does_not_crash(caption: str) -> None:
    scores = metrics.score(CAPTIONS | {"1.jpg": caption}, REFERENCES, TOKENISE)
    assert 0 <= scores["bleu4"] < metrics.score(CAPTIONS, REFERENCES, TOKENISE)["bleu4"]


def test_captions_that_are_all_empty_score_nothing() -> None:
    scores = metrics.score(dict.fromkeys(CAPTIONS, ""), REFERENCES, TOKENISE)
    assert scores["bleu1"] == pytest.approx(0, abs=1e-6)
    assert scores["cider"] == pytest.approx(0, abs=1e-6)
