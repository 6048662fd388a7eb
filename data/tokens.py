"""Captions as one flat array of token ids, tokenised once and kept on disk.

N captions are two arrays: `ids` (all tokens, int32) and `offsets` (N + 1); caption n is
`ids[offsets[n]:offsets[n + 1]]`.
"""

import hashlib
import importlib.metadata
import io
import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import utils
from data.vocab import TOKENISERS, Vocabulary

PACKAGES = {"en": "nltk", "zh": "rjieba"}  # whose version may change how captions are tokenised
DAMAGED = (OSError, zlib.error, *utils.DAMAGED)  # what np.load raises for damaged files
EDITION = 2  # of the tokenisers in data.vocab: raise it when they change


@dataclass(frozen=True)
class Tokens:
    """The tokens of N captions."""

    types: list[str]  # what an id stands for: every word that occurs, once, or the vocabulary's after `numericalize`
    ids: np.ndarray  # (tokens,) int32
    offsets: np.ndarray  # (N + 1,) int64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, caption: int) -> np.ndarray:
        return self.ids[self.offsets[caption] : self.offsets[caption + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)  # (N,)

    def select(self, chosen: np.ndarray) -> "Tokens":
        """Return the captions that the mask `chosen` (N,) marks."""
        lengths = self.lengths
        return Tokens(self.types, self.ids[np.repeat(chosen, lengths)], offsets_of(lengths[chosen]))

    def count(self) -> Counter[str]:
        """Return how often each word occurs."""
        counts = np.bincount(self.ids, minlength=len(self.types))  # (types,)
        return Counter(dict(zip(self.types, counts.tolist(), strict=True)))

    def numericalize(self, vocab: Vocabulary) -> "Tokens":
        """Return the same captions with the vocabulary's ids; words it does not know become `<unk>`."""
        id_of_type = np.array(vocab.look_up(self.types), dtype=np.int32)  # (types,)
        return Tokens(vocab.words, id_of_type[self.ids], self.offsets)


def tokenise(captions: Sequence[str], language: str) -> Tokens:
    """Return the tokens of captions, by the tokeniser of a language."""
    tokeniser, id_of = TOKENISERS[language](), dict[str, int]()
    ids, lengths = list[int](), list[int]()
    for caption in captions:
        words = tokeniser(caption)
        ids += [id_of.setdefault(word, len(id_of)) for word in words]
        lengths.append(len(words))
    return Tokens(list(id_of), np.array(ids, dtype=np.int32), offsets_of(lengths))


def tokenise_once(captions: Sequence[str], language: str, cache: Path) -> Tokens:
    """Return the tokens of captions, from a file in `cache` if the same captions were tokenised before."""
    key = hashlib.sha256(json.dumps([tokeniser_version(language), captions]).encode()).hexdigest()
    path = cache / f"tokens-{key[:12]}.npz"
    try:
        with np.load(path) as saved:
            return unpack(saved)
    except DAMAGED:
        tokens = tokenise(captions, language)
        write(path, tokens)
        return tokens


def tokeniser_version(language: str) -> list[Any]:
    """Return what tokens depend on besides the captions; raises UserError for a package to install."""
    TOKENISERS[language]()
    package = PACKAGES.get(language)
    return [EDITION, language, package and importlib.metadata.version(package)]


def join(parts: Sequence[Tokens]) -> Tokens:
    """Return the captions of all parts, one after the other."""
    id_of: dict[str, int] = {}
    ids = []
    for part in parts:
        renamed = np.array([id_of.setdefault(word, len(id_of)) for word in part.types], dtype=np.int32)  # (types,)
        ids.append(renamed[part.ids])
    return Tokens(list(id_of), np.concatenate(ids), offsets_of(np.concatenate([part.lengths for part in parts])))


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each caption begins, and where the last one ends (N + 1,)."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def unpack(saved: Mapping[str, np.ndarray]) -> Tokens:
    return Tokens(json.loads(saved["types"].item()), saved["ids"], saved["offsets"])


def write(path: Path, tokens: Tokens, **others: Any) -> None:
    """Write tokens, and what else belongs to their captions, to a file for `unpack`."""
    arrays = {"types": json.dumps(tokens.types).encode(), "ids": tokens.ids, "offsets": tokens.offsets, **others}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    utils.write_atomically(path, buffer.getvalue())
