"""Captions are tokenised once, into one flat array, and found again."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data import tokens
from data.tokens import Tokens, join, tokenise, tokenise_once
from data.vocab import UNK, build_vocab

CAPTIONS = ["A dog runs .", "", "Two dogs .", "a dog's dog"]
WORDS = [["a", "dog", "runs"], [], ["two", "dogs"], ["a", "dog", "'s", "dog"]]


def words_of(found: Tokens) -> list[list[str]]:
    return [[found.types[i] for i in found[caption]] for caption in range(len(found))]


def test_the_words_are_those_of_the_tokeniser_in_one_array() -> None:
    found = tokenise(CAPTIONS, "en")
    assert words_of(found) == WORDS
    assert found.lengths.tolist() == [3, 0, 2, 4]
    assert (found.ids.dtype, found.ids.shape, found.offsets.tolist()) == (np.int32, (9,), [0, 3, 3, 5, 9])


def test_captions_can_be_selected_counted_and_joined() -> None:
    found = tokenise(CAPTIONS, "en")
    chosen = found.select(np.array([True, True, False, True]))
    assert words_of(chosen) == WORDS[:2] + WORDS[3:]
    assert +chosen.count() == {"dog": 3, "a": 2, "runs": 1, "'s": 1}
    both = join([tokenise(CAPTIONS[2:], "en"), chosen, tokenise([], "en")])
    assert words_of(both) == WORDS[2:] + WORDS[:2] + WORDS[3:]
    assert both.count() == chosen.count() + tokenise(CAPTIONS[2:], "en").count()


def test_ids_are_those_of_each_caption_in_the_vocabulary() -> None:
    vocab = build_vocab(CAPTIONS, min_count=2)
    found = tokenise([*CAPTIONS, "a zebra"], "en").numericalize(vocab)
    assert [found[n].tolist() for n in range(5)] == [vocab.numericalize(text) for text in [*CAPTIONS, "a zebra"]]
    assert found[4].tolist()[1] == UNK
    assert build_vocab(tokenise(CAPTIONS, "en").count(), 1).words == build_vocab(CAPTIONS, 1).words


def test_the_same_captions_are_not_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise_once(CAPTIONS, "en", tmp_path)
    monkeypatch.setattr(tokens, "tokenise", None)
    assert words_of(tokenise_once(CAPTIONS, "en", tmp_path)) == WORDS


def test_other_captions_languages_and_editions_are_tokenised_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenise_once(CAPTIONS, "en", tmp_path)
    assert words_of(tokenise_once([*CAPTIONS[:3], "a cat"], "en", tmp_path))[3] == ["a", "cat"]
    assert words_of(tokenise_once(["一只狗"], "zh-characters", tmp_path)) == [["一", "只", "狗"]]
    assert words_of(tokenise_once(["一只狗"], "zh", tmp_path)) == [["一只", "狗"]]
    monkeypatch.setattr(tokens, "EDITION", tokens.EDITION + 1)
    tokenise_once(CAPTIONS, "en", tmp_path)
    assert len(list(tmp_path.glob("tokens-*.npz"))) == 5


def test_any_character_of_a_caption_is_kept(tmp_path: Path) -> None:
    odd = ["a\0b dog", "half a \ud83d dog", "a\u2028dog"]
    expected = words_of(tokenise(odd, "en"))
    assert words_of(tokenise_once(odd, "en", tmp_path)) == expected == words_of(tokenise_once(odd, "en", tmp_path))


def test_a_missing_tokeniser_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with refused("rjieba", "pip install", "data.language=zh-characters"):
        tokenise_once(["一只狗"], "zh", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_file_is_made_again(damage: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenise_once(CAPTIONS, "en", tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:200] if damage is None else damage)
    assert words_of(tokenise_once(CAPTIONS, "en", tmp_path)) == WORDS
    monkeypatch.setattr(tokens, "tokenise", None)
    assert words_of(tokenise_once(CAPTIONS, "en", tmp_path)) == WORDS


def test_whichever_byte_of_the_file_is_wrong_the_words_are_right(tmp_path: Path) -> None:
    tokenise_once(CAPTIONS, "en", tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(0, len(whole), 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert words_of(tokenise_once(CAPTIONS, "en", tmp_path)) == WORDS, place
