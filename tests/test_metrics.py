"""The scorer is checked: it is pycocoevalcap's, on raw references, and what is added to it is right."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.meteor.meteor import Meteor

import metrics
from data import annotations
from data.vocab import EnglishTokeniser

GOLDEN = json.loads((Path(__file__).parent / "golden/captions.json").read_text(encoding="utf-8"))
PICTURES = GOLDEN["pictures"]
FROZEN = {name: 100 * value for name, value in GOLDEN["scores"].items()}
CAPTIONS = {image: picture["caption"][0] for image, picture in PICTURES.items()}
REFERENCES = {image: [text for text, _ in picture["references"]] for image, picture in PICTURES.items()}
TOKENS = dict(pair for picture in PICTURES.values() for pair in [picture["caption"], *picture["references"]])
WORDS = EnglishTokeniser()

# Where the vocabulary's tokeniser is not Java's, on purpose: brackets are dropped, a last abbreviation loses its dot,
# and a mixed number is two words.
DIFFERENT = {
    "A cat (grey and white) looks out of a window .": "a cat grey and white looks out of a window",
    "The lighthouse [ built long ago ] is still lit .": "the lighthouse built long ago is still lit",
    "A street performer juggles { or tries to } .": "a street performer juggles or tries to",
    "Two men play chess in a park in D.C.": "two men play chess in a park in d.c",
    "A man is cutting 1 1/2 pizzas with a knife": "a man is cutting 1 1/2 pizzas with a knife",
    "A cook cuts 1 1/2 pizzas into slices .": "a cook cuts 1 1/2 pizzas into slices",
}

Corpus = list[tuple[str, list[str]]]

needs_java = pytest.mark.skipif(not metrics.has_java(), reason="needs Java")
few_examples = settings(deadline=None, derandomize=True, max_examples=25)


def sentences(least: int = 0) -> st.SearchStrategy[str]:
    words = st.sampled_from(["a", "dog", "cat", "runs", "sits", "on", "red", "grass"])
    return st.lists(words, min_size=least, max_size=9).map(" ".join)


references = st.lists(sentences(1), min_size=1, max_size=3)
corpora = st.lists(st.tuples(sentences(), references), min_size=1, max_size=5)


def frozen_tokens(texts: list[str]) -> list[str]:
    return [TOKENS[text] for text in texts]


def score_all(corpus: Corpus) -> metrics.Scores:
    captions = {str(place): caption for place, (caption, _) in enumerate(corpus)}
    return metrics.score(captions, {str(place): texts for place, (_, texts) in enumerate(corpus)}, list, rouge=True)


def bleus(corpus: Corpus) -> np.ndarray:
    scores = score_all(corpus).corpus
    return np.array([scores[f"bleu{n}"] for n in (1, 2, 3, 4)])


def score_golden(captions: dict[str, str] = CAPTIONS) -> metrics.Scores:
    return metrics.score(captions, REFERENCES, frozen_tokens)


@pytest.fixture(scope="module")
def one_meteor() -> Meteor:
    """METEOR reads its paraphrases for seconds: once is enough."""
    return Meteor()


@pytest.fixture
def meteor(one_meteor: Meteor, monkeypatch: pytest.MonkeyPatch) -> Callable[..., float]:
    monkeypatch.setattr(metrics, "Meteor", lambda: one_meteor)
    return metrics.meteor


@pytest.fixture
def no_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def install_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Put a shell script where Java should be."""
    if os.name != "posix":
        pytest.skip("needs a shell")

    def install(script: str) -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))

    yield install


# ---- equal to pycocoevalcap's own chain ------------------------------------------------------------------------------


def test_the_golden_captions_are_many_and_varied() -> None:
    assert len(CAPTIONS) >= 40
    assert {len(texts) for texts in REFERENCES.values()} == {2, 3, 4, 5}


@pytest.mark.parametrize("name", ["bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"])
def test_the_scores_of_javas_tokens_are_those_frozen(name: str) -> None:
    scores = metrics.score(CAPTIONS, REFERENCES, frozen_tokens, rouge=True)
    assert scores.corpus[name] == pytest.approx(FROZEN[name], rel=1e-12)


@needs_java
def test_javas_tokens_are_those_frozen() -> None:
    assert metrics.by_java(list(TOKENS)) == list(TOKENS.values())


@needs_java
def test_meteor_of_javas_tokens_is_that_frozen(meteor: Callable[..., float]) -> None:
    assert meteor(*metrics.tokenise_all(CAPTIONS, REFERENCES, frozen_tokens)) == pytest.approx(FROZEN["meteor"])


def test_the_words_tokeniser_is_javas_but_for_brackets_last_abbreviations_and_mixed_numbers() -> None:
    ours = dict(zip(TOKENS, metrics.by_words(WORDS, list(TOKENS)), strict=True))
    assert {text: tokens for text, tokens in ours.items() if tokens != TOKENS[text]} == DIFFERENT


# ---- properties ------------------------------------------------------------------------------------------------------


@given(corpora, st.randoms(use_true_random=False))
@few_examples
def test_the_order_of_pictures_does_not_matter(corpus: Corpus, chance: Any) -> None:
    order = chance.sample(range(len(corpus)), len(corpus))
    expected, scores = score_all(corpus), score_all([corpus[place] for place in order])
    assert scores.corpus == pytest.approx(expected.corpus)
    assert scores.cider == pytest.approx(expected.cider[order])


@given(corpora)
@few_examples
def test_the_order_of_references_does_not_matter(corpus: Corpus) -> None:
    backwards = [(caption, texts[::-1]) for caption, texts in corpus]
    assert score_all(backwards).corpus == pytest.approx(score_all(corpus).corpus)


def test_captions_and_references_may_come_in_different_orders() -> None:
    backwards = dict(reversed(REFERENCES.items()))
    scores = metrics.score(CAPTIONS, backwards, frozen_tokens)
    assert scores.corpus == metrics.score(CAPTIONS, REFERENCES, frozen_tokens).corpus


@given(corpora, st.data())
@few_examples
def test_no_bleu_falls_when_a_caption_becomes_a_reference_of_its_length(corpus: Corpus, data: st.DataObject) -> None:
    caption, texts = corpus[0]
    words = data.draw(st.permutations(caption.split()))
    before = [(caption, [*texts, " ".join(words)]), *corpus[1:]]
    after = [(" ".join(words), before[0][1]), *corpus[1:]]
    assert (bleus(after) >= bleus(before) - 1e-9).all()


@given(sentences(), st.lists(sentences(4), min_size=1, max_size=3))
@few_examples
def test_no_bleu_of_one_picture_falls_when_its_caption_becomes_a_reference(caption: str, texts: list[str]) -> None:
    assert (bleus([(texts[0], texts)]) >= bleus([(caption, texts)]) - 1e-6).all()


def test_a_shorter_reference_as_caption_can_lower_bleu_since_other_captions_lose_its_length() -> None:
    short: tuple[str, list[str]] = ("red", ["a red dog runs on the grass"])
    long = "a cat sits on a red mat"
    texts = ["a cat sits", "a cat sits on a red mat today"]
    assert bleus([(texts[0], texts), short])[0] < bleus([(long, texts), short])[0]


@given(st.lists(references.flatmap(lambda texts: st.tuples(st.sampled_from(texts), st.just(texts))), min_size=2))
@few_examples
def test_captions_that_are_references_have_a_bleu_of_100(corpus: Corpus) -> None:
    longest = max(len(caption.split()) for caption, _ in corpus)
    assert bleus(corpus)[:longest] == pytest.approx([100] * min(longest, 4))


@given(st.lists(st.tuples(sentences(), sentences(1)), min_size=2, max_size=5))
@few_examples
def test_no_caption_has_more_cider_than_the_only_reference_has(pairs: list[tuple[str, str]]) -> None:
    best = score_all([(text, [text]) for _, text in pairs])
    other = score_all([(caption, [text]) for caption, text in pairs])
    assert (best.cider >= other.cider - 1e-9).all()


@given(corpora)
@few_examples
def test_an_empty_caption_scores_0(corpus: Corpus) -> None:
    assert score_all([("", corpus[0][1]), *corpus[1:]]).cider[0] == 0
    assert all(value == pytest.approx(0, abs=1e-6) for value in score_all([("", corpus[0][1])]).corpus.values())


@given(sentences(), references)
@few_examples
def test_one_picture_alone_has_a_cider_of_0(caption: str, texts: list[str]) -> None:
    assert score_all([(caption, texts)]).corpus["cider"] == 0


@given(corpora)
@few_examples
def test_bleu4_of_the_summed_counts_is_the_scorers(corpus: Corpus) -> None:
    scores = score_all(corpus)
    assert metrics.bleu4(scores.bleu_counts.sum(0)) == pytest.approx(scores.corpus["bleu4"], abs=1e-9)


# ---- what is scored --------------------------------------------------------------------------------------------------


def test_case_and_punctuation_are_not_scored() -> None:
    def tokenise(texts: list[str]) -> list[str]:
        return metrics.by_words(WORDS, texts)

    shouted = {image: f"{caption.rstrip(' .!').upper()} !" for image, caption in CAPTIONS.items()}
    expected = metrics.score(CAPTIONS, REFERENCES, tokenise, rouge=True).corpus
    assert metrics.score(shouted, REFERENCES, tokenise, rouge=True).corpus == pytest.approx(expected)


def test_the_tokeniser_is_given_the_raw_texts_all_at_once() -> None:
    given_texts: list[list[str]] = []

    def tokenise(texts: list[str]) -> list[str]:
        given_texts.append(texts)
        return texts

    metrics.score({"b": "One .", "a": "two"}, {"a": ["A Labradoodle ."], "b": ["<rare>", "x  y"]}, tokenise)
    assert given_texts == [["One .", "two", "<rare>", "x  y", "A Labradoodle ."]]


def test_a_picture_is_one_item_with_all_its_raw_captions() -> None:
    table = pd.DataFrame(
        {"image": ["b.jpg", "a.jpg", "b.jpg"], "caption": ["A Labradoodle .", "one", "two ,  words"], "split": "val"}
    )
    assert annotations.references(table) == {"b.jpg": ["A Labradoodle .", "two ,  words"], "a.jpg": ["one"]}


def test_cider_and_counts_have_one_row_a_picture() -> None:
    scores = score_golden()
    assert scores.cider.shape == (len(CAPTIONS),)
    assert scores.bleu_counts.shape == (len(CAPTIONS), 10)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object, **options: object) -> None:
        raise AssertionError("NLTK was asked for data")

    for module, name in ((nltk, "download"), (nltk.data, "find"), (nltk.data, "load")):
        monkeypatch.setattr(module, name, refuse)
    tokenise = EnglishTokeniser()
    metrics.score(CAPTIONS, REFERENCES, lambda texts: metrics.by_words(tokenise, texts), rouge=True)


# ---- Java ------------------------------------------------------------------------------------------------------------

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
    assert metrics.by_java(list(ODD)) == list(ODD.values())


@needs_java
@pytest.mark.parametrize("odd", ["", "|||", "a ||| b", "||| |||", "café 😀", "a dog ||| runs"])
def test_meteor_survives_odd_captions(odd: str, meteor: Callable[..., float]) -> None:
    raw = {"1": ["a dog runs on the beach"], "2": ["two cats sit", odd]}
    good = {"1": ["a dog runs on the beach"]}
    assert 0 <= meteor(good | {"2": [odd]}, raw) <= 100
    assert meteor(good | {"2": ["two cats sit"]}, raw) == pytest.approx(100)


@needs_java
def test_bars_do_not_make_two_references_of_one(meteor: Callable[..., float]) -> None:
    assert meteor({"1": ["a dog runs"]}, {"1": ["a dog ||| runs"]}) == pytest.approx(100)


@needs_java
def test_an_empty_caption_has_a_meteor_of_0(meteor: Callable[..., float]) -> None:
    assert meteor({"1": [""]}, {"1": ["a dog runs"]}) == 0


@pytest.mark.usefixtures("no_java")
def test_without_java_meteor_and_spice_are_left_out_and_what_to_install_is_said() -> None:
    scores, [note] = metrics.score_by_java(CAPTIONS, REFERENCES, frozen_tokens, "en")
    assert scores == {"meteor": None, "spice": None}
    assert "apt install default-jre-headless" in note
    assert "\n" not in note


def test_meteor_and_spice_are_for_english() -> None:
    scores, [note] = metrics.score_by_java(CAPTIONS, REFERENCES, frozen_tokens, "de")
    assert scores == {"meteor": None, "spice": None}
    assert "English" in note


def test_a_java_that_does_not_run_is_none(install_java: Callable[[str], None]) -> None:
    install_java("exit 1")
    assert not metrics.has_java()


def test_a_java_that_fails_costs_meteor_and_says_why(
    install_java: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_java('test "$1" = -version || { echo "no memory" >&2; exit 1; }')
    monkeypatch.setattr(metrics, "has_spice_jars", lambda: False)
    scores, notes = metrics.score_by_java(CAPTIONS, REFERENCES, frozen_tokens, "en")
    assert scores == {"meteor": None, "spice": None}
    assert [note.split(" is left out: ")[0] for note in notes] == ["SPICE", "METEOR"]
    assert "no memory" in notes[1]


def test_a_tokeniser_whose_java_fails_is_refused(
    install_java: Callable[[str], None], refused: Callable[..., Any]
) -> None:
    install_java('echo "no memory" >&2; exit 1')
    with refused("no memory", "--tokeniser words"):
        metrics.by_java(["a dog"])


def test_a_tokeniser_that_loses_a_line_is_refused(
    install_java: Callable[[str], None], refused: Callable[..., Any]
) -> None:
    install_java("read -r first; echo only one line")
    with refused("another number of lines"):
        metrics.by_java(["a dog", "a cat"])


@needs_java
def test_with_java_the_tokeniser_is_ptb() -> None:
    assert metrics.pick_tokeniser("auto", "en") == ("ptb-java-3.4.1", metrics.by_java)
    assert metrics.pick_tokeniser("ptb", "en") == ("ptb-java-3.4.1", metrics.by_java)


@pytest.mark.usefixtures("no_java")
def test_without_java_the_tokeniser_is_words() -> None:
    name, tokenise = metrics.pick_tokeniser("auto", "en")
    assert name == f"nltk-words-{nltk.__version__}"
    assert tokenise(["The dog's ball .", ""]) == ["the dog 's ball", ""]


def test_the_words_tokeniser_needs_no_java(install_java: Callable[[str], None]) -> None:
    install_java("exit 0")
    assert metrics.pick_tokeniser("words", "en")[0].startswith("nltk-words")


@pytest.mark.usefixtures("no_java")
def test_ptb_without_java_is_refused(refused: Callable[..., Any]) -> None:
    with refused("needs Java", "apt install default-jre-headless"):
        metrics.pick_tokeniser("ptb", "en")


def test_chinese_is_scored_by_characters_or_by_words() -> None:
    for chosen, named, tokens in (
        ("auto", "characters", "一 只 狗"),
        ("characters", "characters", "一 只 狗"),
        ("words", "rjieba-words-", "一只 狗"),
    ):
        for language in ("zh", "zh-characters"):
            name, tokenise = metrics.pick_tokeniser(chosen, language)
            assert name.startswith(named) and tokenise(["一只狗。"]) == [tokens]


@pytest.mark.parametrize(("name", "language"), [("ptb", "zh"), ("characters", "en")])
def test_a_tokeniser_of_another_language_is_refused(name: str, language: str, refused: Callable[..., Any]) -> None:
    with refused(f"the {name} tokeniser", f"data.language={language}"):
        metrics.pick_tokeniser(name, language)


# ---- intervals and comparisons ---------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_pictures_for_two_systems() -> None:
    first = score_golden()
    second = metrics.Scores(first.corpus, first.cider + 7, first.bleu_counts)
    assert metrics.resample(second)["cider"] - metrics.resample(first)["cider"] == pytest.approx(7)
    assert (metrics.resample(second)["bleu4"] == metrics.resample(first)["bleu4"]).all()


def test_another_seed_draws_other_pictures() -> None:
    scores = score_golden()
    assert (metrics.resample(scores, seed=1)["cider"] != metrics.resample(scores)["cider"]).any()


def test_a_sample_has_as_many_pictures_as_there_are() -> None:
    scores = score_golden()
    right_4_grams = scores.bleu_counts[:, 3]
    row = scores.bleu_counts[right_4_grams.argmax()]
    equal = metrics.Scores(scores.corpus, np.full(len(CAPTIONS), 50.0), np.tile(row, (len(CAPTIONS), 1)))
    samples = metrics.resample(equal)
    assert samples["cider"] == pytest.approx(50)
    assert samples["bleu4"] == pytest.approx(metrics.bleu4(row))
    assert len(samples["bleu4"]) == metrics.RESAMPLES == 1000


def test_the_intervals_hold_the_score_and_19_of_20_samples() -> None:
    scores = score_golden()
    for name, (low, high) in metrics.intervals(scores).items():
        assert low < scores.corpus[name] < high
        assert np.mean((metrics.resample(scores)[name] >= low) & (metrics.resample(scores)[name] <= high)) == (
            pytest.approx(0.95, abs=0.01)
        )


def test_a_system_does_not_differ_from_itself() -> None:
    assert metrics.p_values(score_golden(), score_golden()) == {"bleu4": 1, "cider": 1}


def test_two_systems_without_a_right_4_gram_do_not_differ_in_bleu4() -> None:
    poor, poorer = (score_all([(caption, ["red cats sit on grass"])] * 9) for caption in ("red", "red on"))
    assert 0 < poorer.corpus["bleu4"] < poor.corpus["bleu4"] < 0.05
    assert metrics.p_values(poor, poorer)["bleu4"] == 1


def test_one_better_caption_may_be_chance() -> None:
    better = score_golden(CAPTIONS | {"16.jpg": REFERENCES["16.jpg"][0]})
    assert all(p > 0.2 for p in metrics.p_values(score_golden(), better).values())


def test_much_better_captions_are_no_chance_whichever_system_comes_first() -> None:
    best = score_golden({image: texts[0] for image, texts in REFERENCES.items()})
    assert all(p < 0.01 for p in metrics.p_values(score_golden(), best).values())
    assert metrics.p_values(score_golden(), best) == metrics.p_values(best, score_golden())
