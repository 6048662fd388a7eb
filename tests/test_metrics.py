"""Scores are pycocoevalcap's on raw references, bit for bit; what is added to them is right."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nltk
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.meteor.meteor import Meteor

import metrics
from data.vocab import EnglishTokeniser
from metrics import METRICS

GOLDEN = json.loads((Path(__file__).parent / "golden/captions.json").read_text(encoding="utf-8"))
IMAGES = GOLDEN["pictures"]
FROZEN = {name: 100 * value for name, value in GOLDEN["scores"].items()}
CAPTIONS = {image: texts["caption"][0] for image, texts in IMAGES.items()}
REFERENCES = {image: [text for text, _ in texts["references"]] for image, texts in IMAGES.items()}
TOKENS = dict(pair for texts in IMAGES.values() for pair in [texts["caption"], *texts["references"]])
BEST = {image: texts[0] for image, texts in REFERENCES.items()}
QUICK = ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"]
WORDS = metrics.batched(EnglishTokeniser())

# Where the vocabulary's tokeniser differs from Java's on purpose: brackets are dropped, a last abbreviation loses its
# dot, and a mixed number is two words.
DIFFERENT = {
    "A cat (grey and white) looks out of a window .": "a cat grey and white looks out of a window",
    "The lighthouse [ built long ago ] is still lit .": "the lighthouse built long ago is still lit",
    "A street performer juggles { or tries to } .": "a street performer juggles or tries to",
    "Two men play chess in a park in D.C.": "two men play chess in a park in d.c",
    "A man is cutting 1 1/2 pizzas with a knife": "a man is cutting 1 1/2 pizzas with a knife",
    "A cook cuts 1 1/2 pizzas into slices .": "a cook cuts 1 1/2 pizzas into slices",
}

Pairs = list[tuple[str, list[str]]]

needs_java = pytest.mark.usefixtures("java")
few_examples = settings(deadline=None, derandomize=True, max_examples=25)


def sentences(least: int = 0) -> st.SearchStrategy[str]:
    words = st.sampled_from(["a", "dog", "cat", "runs", "sits", "on", "red", "grass"])
    return st.lists(words, min_size=least, max_size=9).map(" ".join)


references = st.lists(sentences(1), min_size=1, max_size=3)
corpora = st.lists(st.tuples(sentences(), references), min_size=1, max_size=5)


def frozen_tokens(texts: list[str]) -> list[str]:
    return [TOKENS[text] for text in texts]


def score_golden(captions: dict[str, str] = CAPTIONS, tokenise: metrics.Tokenise = frozen_tokens) -> metrics.Scores:
    return metrics.evaluate(captions, REFERENCES, tokenise, "en", QUICK)


def score_pairs(pairs: Pairs) -> metrics.Scores:
    captions = {str(number): caption for number, (caption, _) in enumerate(pairs)}
    return metrics.evaluate(
        captions, {str(number): texts for number, (_, texts) in enumerate(pairs)}, list, "en", QUICK
    )


@pytest.fixture(scope="module")
def one_meteor(no_java: str) -> Meteor:
    """METEOR reads its paraphrases for seconds: once is enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", no_java)  # as it was
        if not metrics.has_java():
            pytest.skip("needs Java")
        return Meteor()


@pytest.fixture
def install_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a shell script where Java should be."""
    if os.name != "posix":
        pytest.skip("needs a shell")

    def install(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    return install


# ---- equal to pycocoevalcap's own chain ------------------------------------------------------------------------------


def test_the_scores_of_javas_tokens_are_those_frozen() -> None:
    assert len(CAPTIONS) >= 40 and {len(texts) for texts in REFERENCES.values()} == {2, 3, 4, 5}
    assert score_golden().corpus == pytest.approx({name: FROZEN[name] for name in QUICK}, rel=1e-12)


@needs_java
def test_javas_tokens_are_those_frozen() -> None:
    assert metrics.tokenise_by_java(list(TOKENS)) == list(TOKENS.values())


@needs_java
def test_meteor_of_javas_tokens_is_that_frozen(one_meteor: Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Meteor", lambda: one_meteor)
    scores = metrics.evaluate(CAPTIONS, REFERENCES, frozen_tokens, "en", ["meteor"])
    assert scores.corpus == pytest.approx({"meteor": FROZEN["meteor"]}) and not scores.notes


def test_the_words_tokeniser_is_javas_but_for_brackets_last_abbreviations_and_mixed_numbers() -> None:
    ours = dict(zip(TOKENS, WORDS(list(TOKENS)), strict=True))
    assert {text: tokens for text, tokens in ours.items() if tokens != TOKENS[text]} == DIFFERENT


# ---- properties ------------------------------------------------------------------------------------------------------


@given(corpora, st.randoms(use_true_random=False))
@few_examples
def test_the_order_of_images_and_of_references_does_not_matter(pairs: Pairs, chance: Any) -> None:
    order = chance.sample(range(len(pairs)), len(pairs))
    expected, scores = score_pairs(pairs), score_pairs([(pairs[n][0], pairs[n][1][::-1]) for n in order])
    assert scores.corpus == pytest.approx(expected.corpus)
    assert scores.per_image["cider"] == pytest.approx(expected.per_image["cider"][order])


@given(corpora)
@few_examples
def test_an_empty_caption_and_an_image_alone_score_0(pairs: Pairs) -> None:
    alone = ("", pairs[0][1])
    assert score_pairs([alone, *pairs[1:]]).per_image["cider"][0] == 0
    assert score_pairs([alone]).corpus == pytest.approx(dict.fromkeys(QUICK, 0), abs=1e-6)
    assert score_pairs(pairs[:1]).corpus["cider"] == 0


@given(corpora)
@few_examples
def test_scores_follow_from_what_each_image_contributes(pairs: Pairs) -> None:
    scores = score_pairs(pairs)
    for name, values in scores.per_image.items():
        assert len(values) == len(pairs)
        assert METRICS[name].resample(np.ones(len(pairs)), values) == pytest.approx(scores.corpus[name], abs=1e-9)


# ---- what is scored --------------------------------------------------------------------------------------------------


def test_case_and_punctuation_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((nltk, "download"), (nltk.data, "find"), (nltk.data, "load")):
        monkeypatch.delattr(module, name)  # NLTK's data is not downloaded
    words = metrics.batched(EnglishTokeniser())
    shouted = {image: f"{caption.rstrip(' .!').upper()} !" for image, caption in CAPTIONS.items()}
    assert score_golden(shouted, words).corpus == pytest.approx(score_golden(tokenise=words).corpus)


def test_the_tokeniser_gets_the_raw_texts_all_at_once() -> None:
    tokenise = Mock(side_effect=list)
    raw = {"a": ["A Labradoodle ."], "b": ["<rare>", "x  y"]}
    metrics.evaluate({"b": "One .", "a": "two"}, raw | {"c": ["not asked"]}, tokenise, "en", ["bleu1"])
    tokenise.assert_called_once_with(["One .", "two", "<rare>", "x  y", "A Labradoodle ."])


def test_what_cannot_be_had_is_left_out_with_the_reason() -> None:
    scores = metrics.evaluate(CAPTIONS, REFERENCES, frozen_tokens, "en")
    assert list(scores.corpus) == QUICK
    assert scores.notes == ["METEOR is left out: Java is missing (apt install default-jre-headless)"]
    scores = metrics.evaluate(CAPTIONS, REFERENCES, frozen_tokens, "zh", ["meteor"])
    assert scores.notes == ["METEOR is left out: available for English only"] and not scores.corpus


def test_a_java_that_fails_costs_meteor_and_says_why(install_java: Callable[[str], None]) -> None:
    install_java('test "$1" = -version || { echo "no memory" >&2; exit 1; }')
    scores = metrics.evaluate(CAPTIONS, REFERENCES, frozen_tokens, "en")
    assert list(scores.corpus) == QUICK
    assert scores.notes == ["METEOR is left out: Java failed (no memory); fix it and score again"]


# ---- Java and the tokenisers -----------------------------------------------------------------------------------------

ODD = {
    "a dog\nruns": "a dog runs",
    "": "",
    "a cat\u2028sleeps": "a cat sleeps",
    "a\r\nbird": "a bird",
    "two\u0085lines\x0bor three": "two lines or three",
    "café naïve": "café naïve",
    "a 😀 smile": "a smile",
    "日本 語": "日本 語",
    " ": "",
    ". . .": "",
    "a ||| b": "a | | | b",
    "the last": "the last",
    "\n": "",
}


@needs_java
def test_java_gives_one_line_a_text_whatever_is_in_it() -> None:
    assert metrics.tokenise_by_java(list(ODD)) == list(ODD.values())


@needs_java
def test_meteor_survives_odd_captions(one_meteor: Meteor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "Meteor", lambda: one_meteor)

    def meteor(captions: list[str], references: list[list[str]]) -> float:
        ours, theirs = (
            {str(n): each for n, each in enumerate(group)} for group in ([[c] for c in captions], references)
        )
        return metrics.meteor(metrics.Corpus(ours, theirs, "en"))[0]

    for odd in ("", "|||", "a ||| b", "||| |||", "café 😀", "a dog ||| runs"):
        raw = [["a dog runs on the beach"], ["two cats sit", odd]]
        assert 0 <= meteor(["a dog runs on the beach", odd], raw) <= 100
    assert meteor(["a dog runs"], [["a dog ||| runs"]]) == pytest.approx(100), "bars make two references of one"
    assert meteor([""], [["a dog runs"]]) == 0


def test_a_java_that_fails_to_tokenise_is_refused(
    install_java: Callable[[str], None], refused: Callable[..., Any]
) -> None:
    for script, why in (('echo "no memory" >&2; exit 1', "no memory"), ("read -r first; echo only one", "too few")):
        install_java(script)
        with refused(why, "--tokeniser words"):
            metrics.tokenise_by_java(["a dog", "a cat"])


def test_english_is_tokenised_by_java_where_it_runs_and_else_by_nltk(install_java: Callable[[str], None]) -> None:
    install_java("exit 0")
    for name in ("auto", "ptb"):
        assert metrics.pick_tokeniser(name, "en") == metrics.Tokeniser("ptb-java-3.4.1", metrics.tokenise_by_java)
    words = metrics.pick_tokeniser("words", "en")
    assert words.name == f"nltk-words-{nltk.__version__}"
    assert words.tokenise(["The dog's ball .", ""]) == ["the dog 's ball", ""]
    install_java("exit 1")
    assert not metrics.has_java() and metrics.pick_tokeniser("auto", "en").name == words.name


def test_chinese_is_scored_by_characters_or_by_words() -> None:
    for chosen, named, tokens in (
        ("auto", "characters", "一 只 狗"),
        ("characters", "characters", "一 只 狗"),
        ("words", "rjieba-words-", "一只 狗"),
    ):
        for language in ("zh", "zh-characters"):
            tokeniser = metrics.pick_tokeniser(chosen, language)
            assert tokeniser.name.startswith(named) and tokeniser.tokenise(["一只狗。"]) == [tokens]


def test_a_tokeniser_that_cannot_be_had_or_is_of_another_language_is_refused(refused: Callable[..., Any]) -> None:
    with refused("the ptb tokeniser needs Java", "apt install default-jre-headless"):
        metrics.pick_tokeniser("ptb", "en")
    for name, language in (("ptb", "zh"), ("characters", "en")):
        with refused(f"the {name} tokeniser", f"data.language={language}"):
            metrics.pick_tokeniser(name, language)


# ---- intervals and comparisons ---------------------------------------------------------------------------------------


def test_the_same_images_are_drawn_for_two_systems() -> None:
    first = score_golden().per_image
    better = metrics.resample(first | {"cider": first["cider"] + 7})
    assert better["cider"] - metrics.resample(first)["cider"] == pytest.approx(7)
    assert (better["bleu4"] == metrics.resample(first)["bleu4"]).all()


def test_the_intervals_hold_the_score_and_19_of_20_samples() -> None:
    scores = score_golden()
    for name, (low, high) in metrics.intervals(scores.per_image).items():
        samples = metrics.resample(scores.per_image)[name]
        assert low < scores.corpus[name] < high
        assert np.mean((samples >= low) & (samples <= high)) == pytest.approx(0.95, abs=0.01)


def test_a_system_does_not_differ_from_itself_nor_by_what_is_nearly_0() -> None:
    assert metrics.p_values(score_golden(), score_golden()) == {"bleu4": 1, "cider": 1}
    poor, poorer = (score_pairs([(caption, ["red cats sit on grass"])] * 9) for caption in ("red", "red on"))
    assert 0 < poorer.corpus["bleu4"] < poor.corpus["bleu4"] < 0.05
    assert metrics.p_values(poor, poorer)["bleu4"] == 1


def test_one_better_caption_may_be_chance_but_not_many_whichever_system_comes_first() -> None:
    own, best = score_golden(), score_golden(BEST)
    one = score_golden(CAPTIONS | {"16.jpg": BEST["16.jpg"]})
    assert all(p > 0.2 for p in metrics.p_values(own, one).values())
    assert all(p < 0.01 for p in metrics.p_values(own, best).values())
    assert metrics.p_values(own, best) == metrics.p_values(best, own)


# ---- statistics of captions ------------------------------------------------------------------------------------------


def test_captions_are_described_by() -> None:
    captions = ["a dog runs", "a dog runs", "two cats sit with a", "the the <UNK> plays"]
    about = metrics.describe(captions, ["A dog runs !", "two cats"], lambda text: text.lower().split())
    expected = {
        "length": 15 / 4,
        "vocabulary": 10,
        "distinct_captions": 3 / 4,
        "novelty": 2 / 4,
        "distinct_1": 10 / 15,
        "distinct_2": 9 / 11,
        "unk": 1 / 4,
        "bad_endings": 1 / 4,
        "repetition": 1 / 4,
    }
    assert about == pytest.approx(expected, abs=5e-5)
    empty = metrics.describe(["", ""], [], str.split)
    assert {empty[name] for name in empty if name != "distinct_captions"} == {0}


def test_a_repetition_is_a_word_after_itself_or_three_words_twice() -> None:
    def share(*captions: str) -> float:
        return metrics.describe(captions, [], str.split)["repetition"]

    assert share("a dog dog runs", "on a hill a dog on a hill") == 1
    assert share("a dog and a dog", "the cat and the dog and the bird", "") == 0
