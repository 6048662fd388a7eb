"""What is said of captions beside their scores."""

import pytest

import metrics


@pytest.mark.parametrize(
    ("figure", "expected"),
    {
        "length": 15 / 4,
        "vocabulary": 10,
        "distinct_captions": 3 / 4,
        "novelty": 2 / 4,
        "distinct_1": 10 / 15,
        "distinct_2": 9 / 11,
        "unk": 1 / 4,
        "bad_endings": 1 / 4,
        "repetition": 1 / 4,
    }.items(),
)
def test_captions_are_described_by(figure: str, expected: float) -> None:
    captions = ["a dog runs", "a dog runs", "two cats sit with a", "the the <UNK> plays"]
    about = metrics.describe(captions, ["A dog runs !", "two cats"], lambda text: text.lower().split())
    assert about[figure] == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a dog dog runs", 1),
        ("on a hill a dog on a hill", 1),
        ("a dog and a dog", 0),
        ("the cat and the dog and the bird", 0),
        ("", 0),
    ],
)
def test_a_repetition_is_a_word_behind_itself_or_three_words_twice(caption: str, expected: float) -> None:
    assert metrics.describe([caption], [], str.split)["repetition"] == expected


def test_empty_captions_can_be_described() -> None:
    about = metrics.describe(["", ""], [], str.split)
    assert {about[name] for name in about if name != "distinct_captions"} == {0}
