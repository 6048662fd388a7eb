"""Captions and references → scores, by pycocoevalcap, the scorer that papers use; intervals, and what else to look at.

Everything is given and returned by picture: `captions` one each, `references` the raw ones, in the same order.
"""

from cli import UserError

import importlib.metadata
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pycocoevalcap.spice.spice
import pycocoevalcap.tokenizer.ptbtokenizer as ptb
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.spice.spice import Spice

from data.vocab import TOKENISERS

SCORER = f"pycocoevalcap-{importlib.metadata.version('pycocoevalcap')}"
RESAMPLES = 1000
LEVEL = 95  # per cent, of the intervals
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's BLEU adds these, not to divide by 0

# Words that a caption cannot end with, after self-critical.pytorch (Luo et al. 2018).
BAD_ENDINGS = frozenset(
    "a an the in for at of with before after on upon near to is are am and or by from".split()  # noqa: SIM905
)

Tokenised = list[str]  # captions as space-separated tokens


@dataclass
class Scores:
    """What is scored, by picture and over all pictures.

    Attributes:
        corpus: bleu1 … bleu4 and cider, and what else was asked for, x100 as in papers.
        cider: CIDEr-D of each picture, x100 (P,).
        bleu_counts: of each picture, for n-grams of 1 to 4 words, how many are right and how many there are, then the
            length of its caption and of the reference closest in length (P, 10).
    """

    corpus: dict[str, float]
    cider: np.ndarray
    bleu_counts: np.ndarray


def score(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenise: Callable[[list[str]], Tokenised],
    rouge: bool = False,
) -> Scores:
    """Return BLEU-1 to 4 and CIDEr-D of one caption per picture against its raw references.

    Document frequencies of CIDEr-D are those of these pictures' references: a single picture scores 0. An empty caption
    scores 0.
    """
    candidates, raw = tokenise_all(captions, references, tokenise)
    bleu = BleuScorer(n=4)
    for image, [candidate] in candidates.items():
        bleu += (candidate, raw[image])
    means, _ = bleu.compute_score(option="closest", verbose=0)
    cider, by_picture = Cider().compute_score(raw, candidates)
    corpus = {f"bleu{n}": 100 * mean for n, mean in enumerate(means, 1)} | {"cider": 100 * float(cider)}
    if rouge:
        corpus["rouge_l"] = 100 * float(Rouge().compute_score(raw, candidates)[0])
    counts = [[*test["correct"], *test["guess"], test["testlen"], closest(test)] for test in bleu.ctest]
    return Scores(corpus, 100 * np.asarray(by_picture), np.array(counts, dtype=np.float64))


def tokenise_all(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenise: Callable[[list[str]], Tokenised]
) -> tuple[dict[str, Tokenised], dict[str, Tokenised]]:
    """Return both as pycocoevalcap takes them; the tokeniser is called once, with all texts."""
    texts = list(captions.values()) + [text for image in captions for text in references[image]]
    tokens = iter(tokenise(texts))
    candidates = {image: [next(tokens)] for image in captions}
    return candidates, {image: [next(tokens) for _ in references[image]] for image in captions}


def closest(test: dict) -> int:
    """Return the reference length that BLEU's brevity penalty compares a caption's length with."""
    return min((abs(length - test["testlen"]), length) for length in test["reflen"])[1]


# ---- tokenisers ------------------------------------------------------------------------------------------------------


def by_words(tokenise: Callable[[str], list[str]], texts: list[str]) -> Tokenised:
    """Tokenise with the vocabulary's own tokeniser, which agrees with `by_java` on all but a few English captions."""
    return [" ".join(tokenise(text)) for text in texts]


def by_java(texts: list[str]) -> Tokenised:
    """Tokenise with Stanford's PTBTokenizer, in lower case, punctuation dropped, as pycocoevalcap does.

    Through a pipe: pycocoevalcap's own call writes a file into its package, which may be read-only, and a line break
    inside a caption shifts all captions behind it. Raises UserError when Java fails.
    """
    jar = Path(ptb.__file__).with_name(ptb.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    ran = subprocess.run([*command, *options], input=lines.encode(), capture_output=True, check=False)
    tokenised = ran.stdout.decode().split("\n")[:-1]
    if ran.returncode or len(tokenised) != len(texts):
        reason = (ran.stderr.decode(errors="replace").strip().splitlines() or ["it gave another number of lines"])[0]
        raise UserError(f"Java's tokeniser failed ({reason}); mend Java, or score without it: --tokeniser words")
    dropped = frozenset(ptb.PUNCTUATIONS)
    # Split at blanks alone, as pycocoevalcap does: "1 1/2" comes back as one word, with a no-break space in it.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in tokenised]


def has_java() -> bool:
    """Say whether a Java that runs is installed; macOS has a `java` that only says where to get one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def pick_tokeniser(name: str, language: str) -> tuple[str, Callable[[list[str]], Tokenised]]:
    """Return the tokeniser called ptb, words or characters, and the name it has in signatures.

    `auto` is characters for Chinese, whose words are a matter of opinion, and else ptb where Java is.
    Raises UserError for one that does not go with the language or cannot be had here.
    """
    chinese = language != "en"
    if name == ("ptb" if chinese else "characters"):
        raise UserError(f"the {name} tokeniser is not for data.language={language}; take --tokeniser auto or words")
    if chinese:
        if name == "words":
            tokenise = TOKENISERS["zh"]()  # which says what to install
            return f"rjieba-words-{importlib.metadata.version('rjieba')}", partial(by_words, tokenise)
        return "characters", partial(by_words, TOKENISERS["zh-characters"]())
    if name == "ptb" and not has_java():
        raise UserError("the ptb tokeniser needs Java; install it (apt install default-jre-headless) or take another")
    if name == "ptb" or (name == "auto" and has_java()):
        return "ptb-java-3.4.1", by_java
    return f"nltk-words-{importlib.metadata.version('nltk')}", partial(by_words, TOKENISERS["en"]())


# ---- metrics that need Java ------------------------------------------------------------------------------------------


def meteor(candidates: dict[str, Tokenised], raw: dict[str, Tokenised]) -> float:
    """Return METEOR 1.5 (Denkowski and Lavie 2014) x100; raises UserError when Java fails."""

    def separate(tokens: dict[str, Tokenised]) -> dict[str, Tokenised]:
        return {image: [text.replace("|||", "") for text in texts] for image, texts in tokens.items()}

    scorer = Meteor()
    try:
        return 100 * scorer.compute_score(separate(raw), separate(candidates))[0]
    except (OSError, ValueError):
        scorer.meteor_p.kill()
        reason = scorer.meteor_p.communicate()[1].decode(errors="replace").strip().splitlines() or ["it gave no score"]
        raise UserError(f"Java failed ({reason[0]}); mend it and score again") from None
    finally:
        if scorer.lock.locked():  # by an error or Ctrl-C; its destructor would wait for the lock for ever
            scorer.lock.release()


def spice(candidates: dict[str, Tokenised], raw: dict[str, Tokenised]) -> float:
    """Return SPICE (Anderson et al. 2016) x100."""
    return 100 * float(Spice().compute_score(raw, candidates)[0])


def has_spice_jars() -> bool:
    """Say whether the jars are here that pycocoevalcap would otherwise download."""
    library = Path(pycocoevalcap.spice.spice.__file__).parent / "lib"
    return len(list(library.glob("stanford-corenlp-3.6.0*.jar"))) == 2


def score_by_java(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenise: Callable[[list[str]], Tokenised],
    language: str,
) -> tuple[dict[str, float | None], list[str]]:
    """Return METEOR and SPICE, None where they cannot be had, and lines that say what to install for those."""
    scores: dict[str, float | None] = {"meteor": None, "spice": None}
    if language != "en":
        return scores, ["METEOR and SPICE are left out: they are made for English"]
    if not has_java():
        return scores, ["METEOR and SPICE are left out: they need Java (apt install default-jre-headless)"]
    tokens = tokenise_all(captions, references, tokenise)
    measures, notes = {"meteor": meteor}, []
    if has_spice_jars():
        measures["spice"] = spice
    else:
        notes.append("SPICE is left out: put stanford-corenlp-3.6.0.jar and its models beside pycocoevalcap's jars")
    for name, measure in measures.items():
        try:
            scores[name] = measure(*tokens)
        except (UserError, OSError, ValueError, subprocess.SubprocessError) as error:
            notes.append(f"{name.upper()} is left out: {error}")
    return scores, notes


# ---- intervals and comparisons ---------------------------------------------------------------------------------------


def resample(scores: Scores, seed: int = 0) -> dict[str, np.ndarray]:
    """Return BLEU-4 and CIDEr-D of RESAMPLES bootstrap samples of the pictures (Koehn 2004; Efron 1979).

    The same seed draws the same pictures, so that two systems' samples are paired. CIDEr's document frequencies stay
    those of all pictures.
    """
    pictures = len(scores.cider)
    drawn = draw(pictures, seed)
    return {"bleu4": bleu4(drawn @ scores.bleu_counts), "cider": drawn @ scores.cider / pictures}


def draw(pictures: int, seed: int = 0) -> np.ndarray:
    """Return how often each of RESAMPLES bootstrap samples has each picture (RESAMPLES, pictures)."""
    return np.random.default_rng(seed).multinomial(pictures, np.full(pictures, 1 / pictures), size=RESAMPLES)


def bleu4(counts: np.ndarray) -> np.ndarray:
    """Return BLEU-4 x100 of summed `Scores.bleu_counts` (…, 10), as pycocoevalcap computes it."""
    right, guessed = counts[..., :4] + TINY, counts[..., 4:8] + SMALL
    ratio = (counts[..., 8] + TINY) / (counts[..., 9] + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return 100 * brevity * np.exp(np.log(right / guessed).mean(-1))


def intervals(scores: Scores) -> dict[str, list[float]]:
    """Return the bootstrap interval of BLEU-4 and CIDEr-D: [low, high]."""
    return {name: interval(samples).round(2).tolist() for name, samples in resample(scores).items()}


def interval(samples: np.ndarray) -> np.ndarray:
    """Return between which two values LEVEL % of the samples lie."""
    outside = (100 - LEVEL) / 2
    return np.percentile(samples, [outside, 100 - outside])


def p_values(first: Scores, second: Scores) -> dict[str, float]:
    """Return how probable it is, by paired bootstrap, that the difference between two systems is chance (two-sided).

    A sample in which both are equal, to a hundredth, counts half for each: the same captions give 1, and so do two
    systems without a right n-gram of four words, whose BLEU-4 is not quite 0.
    """
    ours, theirs = resample(first), resample(second)
    better = {name: float(np.mean((np.sign((ours[name] - theirs[name]).round(2)) + 1) / 2)) for name in ours}
    return {name: min(1.0, 2 * min(share, 1 - share)) for name, share in better.items()}


# ---- what a researcher looks at next ---------------------------------------------------------------------------------


def describe(
    captions: Sequence[str], training: Iterable[str], tokenise: Callable[[str], list[str]]
) -> dict[str, float]:
    """Return what the scores do not say of captions; shares are between 0 and 1.

    length: mean number of words. vocabulary: different words used. distinct_captions: different captions / captions.
    novelty: share of captions that have words and are no training caption, letters and digits compared.
    distinct_1, distinct_2: different n-grams / n-grams (Li et al. 2016). unk, bad_endings: share of captions with
    `<unk>`, and of those that end like "with a". repetition: share in which a word follows itself or three words in a
    row come twice.
    """
    texts = [tokenise(caption) for caption in captions]
    known = set(map(letters, captions)).intersection(map(letters, training))  # which may be more than memory holds
    words, pairs = ([gram for text in texts for gram in ngrams(text, n)] for n in (1, 2))

    def share(flags: Iterable[bool]) -> float:
        return sum(flags) / len(captions)

    values = {
        "length": len(words) / len(captions),
        "vocabulary": len(set(words)),
        "distinct_captions": len(set(captions)) / len(captions),
        "novelty": share(letters(caption) not in known | {""} for caption in captions),
        "distinct_1": len(set(words)) / max(1, len(words)),
        "distinct_2": len(set(pairs)) / max(1, len(pairs)),
        "unk": share("<unk>" in caption.lower() for caption in captions),
        "bad_endings": share(bool(text) and text[-1] in BAD_ENDINGS for text in texts),
        "repetition": share(map(repeats, texts)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def repeats(words: list[str]) -> bool:
    twice = any(first == second for first, second in ngrams(words, 2))
    return twice or max(Counter(ngrams(words, 3)).values(), default=0) > 1
