"""What a model card says of limits and biases is counted as it says."""

from collections.abc import Callable

import numpy as np
import pytest

import metrics
from benchmarks import limits
from evaluate import References

MIXED = ["a woman", "a woman", "a man", "a woman", "a woman"]


def references(*pictures: list[str]) -> References:
    captions = {f"{number}.jpg": texts for number, texts in enumerate(pictures)}
    tokeniser = metrics.Tokeniser("split", metrics.batched(str.split))
    return References("val", {}, captions, dict.fromkeys(captions, "archive"), ["a dog"], "en", tokeniser)


def words(*pictures: list[str]) -> limits.Texts:
    return [[text.split() for text in texts] for texts in pictures]


def test_each_reference_is_held_back_and_measured_against_the_others_as_the_caption_is() -> None:
    people = words(["red"] * 4 + ["blue"], ["red"] * 3 + ["blue"] * 2, ["red"] + ["blue"] * 4)
    found = limits.naming("red", words(["red"], ["blue"], ["a red car"]), people)
    # At least three of the other four say red: for all five of the first picture, for two of the second, who say blue.
    assert found["pictures"] == pytest.approx(7 / 5)
    assert found["recall"][0] == pytest.approx(5 / 7, abs=1e-4)
    assert found["person_recall"][0] == pytest.approx(4 / 7, abs=1e-4)
    # Of the third, the only one who says red is confirmed by nobody, nor is the caption where that one is held back.
    assert found["captions"] == 2
    assert found["precision"][0] == pytest.approx(9 / 10)
    assert found["person_precision"][0] == pytest.approx(7 / 8)
    found = limits.naming("red, blue", words(["blue"]), words(["red"] * 5))  # of several things each counts alone
    assert (found["pictures"], found["recall"][0], found["precision"][0]) == (1, 0, 0)


def test_a_gender_is_wrong_where_references_agree_on_the_other_and_the_caption_names_it_alone() -> None:
    captions = words(["a man"], ["a man and a girl"], ["a dog"], ["a lady"], ["a man"])
    found = limits.gender(captions, words(*[["a woman"] * 5] * 4, MIXED))
    women = found["women or girls"]
    assert women["pictures"] == pytest.approx(21 / 5)  # of the mixed one, only where the man is held back
    shares = [women[answer][0] for answer in ("right", "both", "neither", "wrong", "person_wrong")]
    assert shares == pytest.approx([5 / 21, 5 / 21, 5 / 21, 6 / 21, 1 / 21], abs=1e-4)
    assert found["men or boys"]["pictures"] == 0 and found["men or boys"]["wrong"] is None
    assert found["male"]["captions"][0] == pytest.approx(2 / 3, abs=1e-4)
    assert found["male"]["references"][0] == pytest.approx(1 / 25)


def test_groups_of_pictures_have_the_scores_of_these_pictures_alone() -> None:
    texts = (["a man runs"] * 5, ["a dog runs on grass"] * 5, ["a man and a dog sit in a car"] * 5, ["a red car"] * 5)
    given = references(*texts)
    captions = dict(zip(given.captions, ["a man runs", "a dog", "snow", "a red car"], strict=True))
    found = limits.measure(captions, given)
    assert [third["words"] for third in found["by_length"]] == [[3, 3], [5, 5], [9, 9]]
    assert [third["pictures"] for third in found["by_length"]] == [2, 1, 1]
    by_picture = given.score(captions).per_image["cider"]
    kinds = ["people, no animals", "animals, no people", "both", "neither"]
    assert [found["by_content"][kind]["cider"][0] for kind in kinds] == pytest.approx(by_picture, abs=0.01)
    assert found["by_length"][0]["cider"][0] == pytest.approx(by_picture[[0, 3]].mean(), abs=0.01)


def test_words_that_are_never_said_are_counted_by_picture() -> None:
    people = words(["a dog dog", "dog"], ["a cat", "the dog"])
    assert limits.never_said(words(["a cat"], ["a"]), people) == [("dog", 2), ("the", 1)]


def test_a_share_lies_in_its_interval_which_narrows_with_pictures() -> None:
    few, many = (limits.share(np.arange(n) % 4 == 0, np.ones(n, dtype=bool)) for n in (40, 4000))
    assert few and many and few[0] == many[0] == 0.25
    assert few[1] < many[1] < 0.25 < many[2] < few[2]
    assert many[2] - many[1] == pytest.approx(2 * 1.96 * (0.25 * 0.75 / 4000) ** 0.5, rel=0.1)


def test_pictures_with_different_numbers_of_references_are_refused(refused: Callable) -> None:
    with refused("as many references"):
        limits.measure({"0.jpg": "a", "1.jpg": "b"}, references(["a"], ["a", "b"]))
