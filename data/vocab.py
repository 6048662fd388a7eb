"""Words and their ids. One tokeniser object is used by the vocabulary, the dataset, the metrics and inference."""

import importlib.util
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from cli import UserError

SPECIALS = ("<pad>", "<sos>", "<eos>", "<unk>")
LONGEST_WORD = 200  # characters; what is longer is no word
PAD, SOS, EOS, UNK = range(4)

# What pycocoevalcap's PTBTokenizer drops, and brackets.
PUNCTUATION = frozenset("'' ' `` ` ( ) [ ] { } . ? ! , : - -- ... ;".split())  # noqa: SIM905

# Most captions: words with single blanks or commas between them, and a full stop; but see CONTRACTED.
SIMPLE_WORD = re.compile("[a-z]+(?:-[a-z]+)*")
SIMPLE = re.compile(f" *(?:{SIMPLE_WORD.pattern}(?: ?,)? +)*{SIMPLE_WORD.pattern} *\\.? *")
CONTRACTED = re.compile("cannot|gimme|gonna|gotta|lemme|wanna")

HAN = "\u2e80-\u2fff\u3005-\u3007\u3040-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
OTHER = rf"[^\W{HAN}]"  # a letter or digit that is not Chinese
EMOJI = "[\U0001f1e6-\U0001f1ff]{2}|\\S(?:[\ufe0f\u20e3\U0001f3fb-\U0001f3ff]|\u200d\\S)*"  # flags, and joined ones
NARROWED = {wide: wide - 0xFEE0 for first, last in ("０９", "Ａｚ") for wide in range(ord(first), ord(last) + 1)}
ENDS = frozenset("。．.！!？?…；;，,、：:～~")
SIDE = re.compile(r"\b(?:left|right)\b|左|右")
OTHER_SIDE = {"left": "right", "right": "left", "左": "右", "右": "左"}
PIECE = re.compile(rf"([{HAN}]+)|({OTHER}+(?:['’.-]{OTHER}+)*|{EMOJI})")


class EnglishTokeniser:
    """Lower-case Penn Treebank words without punctuation; needs no NLTK data (no `nltk.download`)."""

    @cached_property
    def _words(self) -> Any:
        from nltk.tokenize import NLTKWordTokenizer  # imported here: half a second, and a captioner only joins words

        return NLTKWordTokenizer()

    def __call__(self, text: str) -> list[str]:
        text = text.lower()
        if SIMPLE.fullmatch(text) and not CONTRACTED.search(text):
            return SIMPLE_WORD.findall(text)  # the same as NLTK's, ten times as fast
        return [word for word in self._words.tokenize(text) if word not in PUNCTUATION]

    def join(self, words: Iterable[str]) -> str:
        """Return words as a sentence: `["a", "dog", "'s", "toy"]` becomes `a dog's toy`."""
        return re.sub(r" (n't|'\w+)\b", r"\1", " ".join(words))


class CharacterTokeniser:
    """Chinese characters one by one; Latin words in lower case, numbers and emoji stay whole.

    Marks inside a caption are kept; those at its end, which say nothing, are dropped.
    """

    def __call__(self, text: str) -> list[str]:
        pieces = PIECE.findall(text.translate(NARROWED).lower())
        words = [word for han, other in pieces for word in (self.split_han(han) if han else [other])]
        while words and words[-1] in ENDS:
            words.pop()
        return words

    def split_han(self, characters: str) -> list[str]:
        return list(characters)

    def join(self, words: Iterable[str]) -> str:
        """Return words as a sentence, with blanks only where neither side is Chinese: `一件red t恤`."""
        return re.sub(f"(?<!{OTHER}) | (?!{OTHER})", "", " ".join(words))


class ChineseTokeniser(CharacterTokeniser):
    """Chinese words, as jieba segments them; all else as in `CharacterTokeniser`."""

    def __init__(self) -> None:
        if not importlib.util.find_spec("rjieba"):
            raise UserError(
                "Chinese words need rjieba; install it: pip install -r requirements-extras.txt, "
                "or take characters: data.language=zh-characters"
            )

    def split_han(self, characters: str) -> list[str]:
        import rjieba

        return rjieba.cut(characters)


class UnicodeTokeniser:
    """Any language: words as runs of letters, marks and digits, in lower case and without punctuation; where a script
    writes no blanks between words (Thai, Lao, Khmer, Burmese, Japanese, Chinese), characters with their marks.
    """

    # Thai and Lao write some vowels before their consonant, as letters of their own.
    UNSPACED = r"[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Hiragana}\p{Katakana}\p{Han}ー々]"
    WORD = rf"(?:(?!{UNSPACED})[\p{{L}}\p{{M}}\p{{N}}\u200c\u200d])+"

    @cached_property
    def _pieces(self) -> Any:
        import regex  # which knows scripts; it comes with NLTK

        return regex.compile(rf"{self.UNSPACED}\p{{M}}*|{self.WORD}(?:['’\-]{self.WORD})*|\p{{Emoji_Presentation}}")

    @cached_property
    def _needless(self) -> Any:
        import regex

        return regex.compile(rf"(?<={self.UNSPACED}\p{{M}}*) (?={self.UNSPACED})")

    def __call__(self, text: str) -> list[str]:
        return self._pieces.findall(unicodedata.normalize("NFC", text).lower())

    def join(self, words: Iterable[str]) -> str:
        """Return words as a sentence, without blanks between the characters of scripts that write none."""
        return self._needless.sub("", " ".join(words))


TOKENISERS: dict[str, Callable[[], EnglishTokeniser | CharacterTokeniser | UnicodeTokeniser]] = {
    "en": EnglishTokeniser,
    "zh": ChineseTokeniser,
    "zh-characters": CharacterTokeniser,
    "unicode": UnicodeTokeniser,
}


class Vocabulary:
    """The words a model can read and write, by id, the four special ones first; `language` picks the tokeniser."""

    def __init__(self, words: list[str], language: str = "en") -> None:
        if tuple(words[:4]) != SPECIALS or len(set(words)) != len(words) or language not in TOKENISERS:
            raise UserError("the vocabulary is damaged: special words missing or a word twice; build it again")
        self.words, self.language = words, language
        self.tokenise = TOKENISERS[language]()
        self._id_of = {word: i for i, word in enumerate(words)}

    def __len__(self) -> int:
        return len(self.words)

    def numericalize(self, text: str) -> list[int]:
        """Return the ids of the words in `text`, each in `range(len(self))`; unknown ones become `<unk>`."""
        return self.look_up(self.tokenise(text))

    def look_up(self, words: Iterable[str]) -> list[int]:
        return [self._id_of.get(word, UNK) for word in words]

    def mirrored(self) -> list[int]:
        """Return, for each id, the id of the word for a mirrored picture: right for left, and most words themselves."""
        swapped = (SIDE.sub(lambda side: OTHER_SIDE[side[0]], word) for word in self.words)
        return [self._id_of.get(word, i) for i, word in enumerate(swapped)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the sentence up to `<eos>`, without special words."""
        said = itertools.takewhile(lambda i: i != EOS, ids)
        return self.tokenise.join(self.words[i] for i in said if i >= len(SPECIALS))


def build_vocab(captions: Iterable[str] | Counter[str], min_count: int = 5, language: str = "en") -> Vocabulary:
    """Return the vocabulary of the words seen at least `min_count` times in captions, or in counts of words."""
    counts = captions
    if not isinstance(counts, Counter):
        tokenise = TOKENISERS[language]()
        counts = Counter(word for caption in captions for word in tokenise(caption))
    often = (word for word, count in counts.items() if count >= min_count and word not in SPECIALS)
    words = sorted(word for word in often if len(word) <= LONGEST_WORD)
    if not words:
        raise UserError(f"no word occurs {min_count} times in the training captions; lower data.min_count")
    return Vocabulary([*SPECIALS, *words], language)
