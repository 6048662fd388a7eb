"""Captions are cut into words once, and found again."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import words
from data.dataset import encode
from data.vocab import EOS, SOS, UNK, build_vocab
from data.words import cut, cut_afresh

CAPTIONS = ["A dog runs .", "", "Two dogs .", "a dog's dog"]


def as_lists(found: words.Words) -> list[list[str]]:
    return [[found.lexicon[i] for i in each] for each in np.split(found.ids, found.ends)[:-1]]


def test_the_words_are_those_of_the_tokeniser() -> None:
    expected = [["a", "dog", "runs"], [], ["two", "dogs"], ["a", "dog", "'s", "dog"]]
    assert as_lists(cut_afresh(CAPTIONS, "en")) == expected


def test_they_are_counted_and_chosen_by_caption() -> None:
    chosen = cut_afresh(CAPTIONS, "en").of(np.array([True, True, False, True]))
    assert as_lists(chosen) == [["a", "dog", "runs"], [], ["a", "dog", "'s", "dog"]]
    assert +chosen.count() == {"dog": 3, "a": 2, "runs": 1, "'s": 1}


def test_what_was_cut_is_read_not_cut_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cut(CAPTIONS, "en", tmp_path)
    monkeypatch.setattr(words, "cut_afresh", None)
    assert as_lists(cut(CAPTIONS, "en", tmp_path)) == as_lists(first)


def test_other_captions_languages_and_editions_are_cut_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(CAPTIONS, "en", tmp_path)
    assert as_lists(cut([*CAPTIONS[:3], "a cat"], "en", tmp_path))[3] == ["a", "cat"]
    assert as_lists(cut(["一只狗"], "zh-characters", tmp_path)) == [["一", "只", "狗"]]
    assert as_lists(cut(["一只狗"], "zh", tmp_path)) == [["一只", "狗"]]
    monkeypatch.setattr(words, "EDITION", words.EDITION + 1)
    cut(CAPTIONS, "en", tmp_path)
    assert len(list(tmp_path.glob("words-*.npz"))) == 5


def test_any_character_of_a_caption_is_kept(tmp_path: Path) -> None:
    odd = ["a\0b dog", "half a \ud83d dog", "a\u2028dog"]
    expected = as_lists(cut_afresh(odd, "en"))
    assert as_lists(cut(odd, "en", tmp_path)) == expected == as_lists(cut(odd, "en", tmp_path))


def test_a_missing_tokeniser_is_named_before_anything_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with refused("rjieba", "pip install"):
        cut(["一只狗"], "zh", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_made_again(damage: bytes | None, tmp_path: Path) -> None:
    expected = as_lists(cut(CAPTIONS, "en", tmp_path))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    assert as_lists(cut(CAPTIONS, "en", tmp_path)) == expected
    assert words.read(path) is not None


def test_ids_are_those_of_encoding_each_caption() -> None:
    vocab = build_vocab(CAPTIONS, min_count=2)
    found = encode(cut_afresh([*CAPTIONS, "a zebra"], "en"), vocab)
    assert [ids.tolist() for ids in found] == [vocab.encode(caption) for caption in [*CAPTIONS, "a zebra"]]
    assert found[1].tolist() == [SOS, EOS] and found[4].tolist()[2] == UNK


def test_a_vocabulary_is_the_same_from_captions_and_from_counts() -> None:
    assert build_vocab(cut_afresh(CAPTIONS, "en").count(), 1).words == build_vocab(CAPTIONS, 1).words
