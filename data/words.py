"""Captions cut into words once and kept on disk, so that training on a large dataset starts sooner the next time."""

import hashlib
import importlib.metadata
import io
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.vocab import TOKENISERS
from utils import write_atomically

CUT_BY = {"en": "nltk", "zh": "rjieba"}  # packages whose version may change the words
BREAK = "\n"  # formats.read leaves none in a caption
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


def cut(captions: Sequence[str], language: str, cache: Path) -> Words:
    """Return the words of all `captions`, from `cache` where they were cut before."""
    text = as_bytes(captions)
    TOKENISERS[language]()  # which says what to install
    package = CUT_BY.get(language)
    cut_by = [EDITION, language, package and importlib.metadata.version(package), len(captions)]
    key = hashlib.sha256(json.dumps(cut_by).encode() + text).hexdigest()[:12]
    path = cache / f"words-{key}.npz"
    return read(path) or write(path, cut_afresh(captions, language))


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
            lexicon = saved["lexicon"].tobytes().decode(errors="surrogatepass").split(BREAK)
            return Words(lexicon, saved["ids"], saved["ends"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write(path: Path, words: Words) -> Words:
    buffer = io.BytesIO()
    lexicon = np.frombuffer(as_bytes(words.lexicon), dtype=np.uint8)
    np.savez(buffer, lexicon=lexicon, ids=words.ids, ends=words.ends)
    write_atomically(path, buffer.getvalue())
    return words


def as_bytes(texts: Sequence[str]) -> bytes:
    return BREAK.join(texts).encode(errors="surrogatepass")  # JSON may hold halves of characters
