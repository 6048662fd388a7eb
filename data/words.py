"""Captions cut into words once and kept on disk, so that training on a large dataset starts sooner the next time."""

import hashlib
import importlib.metadata
import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.vocab import TOKENISERS
from utils import write_atomically

CUT_BY = {"en": "nltk", "zh": "rjieba"}  # packages whose version may change the words
BREAK = "\n"  # formats.read leaves none in a caption
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # what np.load raises of such files
EDITION = 1  # of the tokenisers in data.vocab: raise it when they cut differently


@dataclass(frozen=True)
class Words:
    """The words of N captions: those of caption n are `lexicon[i]` for i in `ids[ends[n - 1]:ends[n]]`.

    Attributes:
        lexicon: every word there is, once; ids: (words,); ends: (N,).
    """

    lexicon: list[str]
    ids: np.ndarray
    ends: np.ndarray

    def of(self, chosen: np.ndarray) -> "Words":
        """Return the words of the captions that `chosen` (N,) marks."""
        lengths = np.diff(self.ends, prepend=0)  # (N,)
        return Words(self.lexicon, self.ids[np.repeat(chosen, lengths)], np.cumsum(lengths[chosen]))

    def count(self) -> Counter[str]:
        counts = np.bincount(self.ids, minlength=len(self.lexicon))  # (lexicon,)
        return Counter(dict(zip(self.lexicon, counts.tolist(), strict=True)))

    def __iter__(self) -> Iterator[list[str]]:
        """Yield the words of each caption."""
        for part in np.split(self.ids, self.ends[:-1]):
            yield [self.lexicon[i] for i in part]


def join(parts: Sequence[Words]) -> Words:
    """Return the words of all parts' captions."""
    id_of: dict[str, int] = {}
    ids, ends, words = [], [], 0
    for part in parts:
        renamed = np.array([id_of.setdefault(word, len(id_of)) for word in part.lexicon], dtype=np.int32)
        ids.append(renamed[part.ids])
        ends.append(part.ends + words)
        words += len(part.ids)
    return Words(list(id_of), np.concatenate(ids), np.concatenate(ends))


def cut(captions: Sequence[str], language: str, cache: Path) -> Words:
    """Return the words of all `captions`, from `cache` where they were cut before."""
    text = as_bytes(captions)
    key = hashlib.sha256(json.dumps([*cut_by(language), len(captions)]).encode() + text).hexdigest()[:12]
    path = cache / f"words-{key}.npz"
    return read(path) or write(path, cut_afresh(captions, language))


def cut_by(language: str) -> list[Any]:
    """Return what the words depend on besides the captions; raises UserError, saying what to install."""
    TOKENISERS[language]()
    package = CUT_BY.get(language)
    return [EDITION, language, package and importlib.metadata.version(package)]


def cut_afresh(captions: Sequence[str], language: str) -> Words:
    tokenise, id_of = TOKENISERS[language](), dict[str, int]()
    ids, ends = [], []
    for caption in captions:
        ids += [id_of.setdefault(word, len(id_of)) for word in tokenise(caption)]
        ends.append(len(ids))
    return Words(list(id_of), np.array(ids, dtype=np.int32), np.array(ends, dtype=np.int64))


def read(path: Path) -> Words | None:
    """Return the words in a file, or None where there is none that can be read."""
    try:
        with np.load(path) as saved:
            return unpack(saved)
    except DAMAGED:
        return None


def unpack(saved: Mapping[str, np.ndarray]) -> Words:
    return Words(as_texts(saved["lexicon"]), saved["ids"], saved["ends"])


def write(path: Path, words: Words, **others: np.ndarray) -> Words:
    """Write the words, and other arrays that belong to their captions."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"lexicon": as_array(words.lexicon), "ids": words.ids, "ends": words.ends, **others}
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())
    return words


def as_array(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(as_bytes(texts), dtype=np.uint8)


def as_texts(array: np.ndarray) -> list[str]:
    return array.tobytes().decode(errors="surrogatepass").split(BREAK)


def as_bytes(texts: Sequence[str]) -> bytes:
    return BREAK.join(texts).encode(errors="surrogatepass")  # JSON may hold halves of characters
