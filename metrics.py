"""Scores of captions against references, by pycocoevalcap, the scorer that papers use, and their bootstrap intervals.

A new metric is one entry of METRICS, a new tokeniser one of TOKENISERS: evaluate.py and benchmarks.report read these
tables. All scores are x100, as in papers.
"""

import importlib.metadata
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np
import pycocoevalcap.tokenizer.ptbtokenizer as ptbtokenizer
from nltk.util import ngrams
from pycocoevalcap.bleu.bleu_scorer import BleuScorer
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge

from cli import UserError
from data import vocab

SCORER = f"pycocoevalcap-{importlib.metadata.version('pycocoevalcap')}"
RESAMPLES = 1000
LEVEL, ENDS = 95, (2.5, 97.5)  # per cent, of the intervals
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's BLEU adds these to avoid a division by 0

# Words that a caption cannot end with, after self-critical.pytorch (Luo et al. 2018).
BAD_ENDINGS = frozenset(
    "a an the in for at of with before after on upon near to is are am and or by from".split()  # noqa: SIM905
)

Tokenise = Callable[[list[str]], list[str]]  # all texts at once; returns each one's tokens with spaces between
Result = tuple[float, np.ndarray | None]  # the score of all P images; what each contributes (P, …), or None


@dataclass
class Corpus:
    """What a metric is computed from: texts of each image as pycocoevalcap takes them, tokens with spaces between."""

    captions: dict[str, list[str]]  # one for each image
    references: dict[str, list[str]]
    language: str

    @cached_property
    def bleu(self) -> tuple[list[float], np.ndarray]:
        """BLEU-1 to 4 (Papineni et al. 2002), and each image's counts (P, 10).

        The counts are, for n-grams of 1 to 4 words, how many of the caption's are right and how many it has, then its
        length and that of the reference closest in length.
        """
        scorer = BleuScorer(n=4)
        for image, [caption] in self.captions.items():
            scorer += (caption, self.references[image])
        scores, _ = scorer.compute_score(option="closest", verbose=0)
        counts = []
        for test in scorer.ctest:
            closest = min((abs(length - test["testlen"]), length) for length in test["reflen"])[1]
            counts.append([*test["correct"], *test["guess"], test["testlen"], closest])
        return [100 * score for score in scores], np.array(counts, dtype=np.float64)


@dataclass
class Scores:
    """What `evaluate` returns: the scores of P images, by the names of METRICS."""

    corpus: dict[str, float] = field(default_factory=dict)  # over all images
    per_image: dict[str, np.ndarray] = field(default_factory=dict)  # each one's CIDEr-D (P,), counts for BLEU-4 (P, 10)
    notes: list[str] = field(default_factory=list)  # which metrics are left out, and why


def cider(corpus: Corpus) -> Result:
    """CIDEr-D (Vedantam et al. 2015), and that of each image (P,).

    The document frequencies are those of these images' references, so that a single image scores 0.
    """
    score, per_image = Cider().compute_score(corpus.references, corpus.captions)
    return 100 * float(score), 100 * np.asarray(per_image)


def meteor(corpus: Corpus) -> Result:
    """METEOR 1.5 (Denkowski and Lavie 2014), for English; raises UserError without Java and when it fails."""
    if corpus.language != "en":
        raise UserError("available for English only")
    if not has_java():
        raise UserError("Java is missing (apt install default-jre-headless)")
    references, captions = (  # METEOR's own protocol has ||| between texts
        {image: [text.replace("|||", "") for text in texts] for image, texts in each.items()}
        for each in (corpus.references, corpus.captions)
    )
    scorer = Meteor()
    try:
        return 100 * scorer.compute_score(references, captions)[0], None
    except (OSError, ValueError):
        scorer.meteor_p.kill()
        said = scorer.meteor_p.communicate()[1].decode(errors="replace").strip().splitlines()
        raise UserError(f"Java failed ({said[0] if said else 'it gave no score'}); fix it and score again") from None
    finally:
        if scorer.lock.locked():  # after an error or Ctrl-C; its destructor would wait for the lock for ever
            scorer.lock.release()


def has_java() -> bool:
    """Whether a Java is installed that runs; macOS has a `java` that only says where to get one."""
    java = shutil.which("java")
    return java is not None and subprocess.run([java, "-version"], capture_output=True, check=False).returncode == 0


def mean(drawn: np.ndarray, per_image: np.ndarray) -> np.ndarray:
    """Return the mean of each bootstrap sample: drawn (S, P), per_image (P,) → (S,)."""
    return drawn @ per_image / len(per_image)


def bleu4(drawn: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the BLEU-4 of samples that have each image as often as `drawn` says: (S, P), counts (P, 10) → (S,)."""
    summed = drawn @ counts
    right, guessed = summed[..., :4] + TINY, summed[..., 4:8] + SMALL
    ratio = (summed[..., 8] + TINY) / (summed[..., 9] + SMALL)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    return 100 * brevity * np.exp(np.log(right / guessed).mean(-1))


@dataclass(frozen=True)
class Metric:
    """An entry of METRICS; one that returns what each image contributes has intervals and p-values."""

    title: str
    compute: Callable[[Corpus], Result]  # raises UserError, with the reason, where the metric is to be left out
    # How often each bootstrap sample has each image (S, P), what each contributes (P, …) → scores of the samples (S,).
    resample: Callable[[np.ndarray, np.ndarray], np.ndarray] = mean


METRICS = {  # in the order of tables
    "bleu1": Metric("BLEU-1", lambda corpus: (corpus.bleu[0][0], None)),
    "bleu2": Metric("BLEU-2", lambda corpus: (corpus.bleu[0][1], None)),
    "bleu3": Metric("BLEU-3", lambda corpus: (corpus.bleu[0][2], None)),
    "bleu4": Metric("BLEU-4", lambda corpus: (corpus.bleu[0][3], corpus.bleu[1]), resample=bleu4),
    "meteor": Metric("METEOR", meteor),
    "rouge_l": Metric(  # Lin 2004
        "ROUGE-L", lambda corpus: (100 * float(Rouge().compute_score(corpus.references, corpus.captions)[0]), None)
    ),
    "cider": Metric("CIDEr-D", cider),
}


def evaluate(
    captions: Mapping[str, str],
    references: Mapping[str, Sequence[str]],
    tokenise: Tokenise,
    language: str,
    names: Collection[str] = METRICS.keys(),
) -> Scores:
    """Score one raw caption for each image against the image's raw references.

    `references` may be in another order and may have more images than `captions`. An empty caption scores 0.
    Raises UserError when the tokeniser fails.
    """
    texts = [*captions.values(), *(text for image in captions for text in references[image])]
    tokens = iter(tokenise(texts))
    candidates = {image: [next(tokens)] for image in captions}
    corpus = Corpus(candidates, {image: [next(tokens) for _ in references[image]] for image in captions}, language)
    scores = Scores()
    for name in names:
        try:
            scores.corpus[name], per_image = METRICS[name].compute(corpus)
        except (UserError, OSError) as error:
            scores.notes.append(f"{METRICS[name].title} is left out: {error}")
            continue
        if per_image is not None:
            scores.per_image[name] = per_image
    return scores


@dataclass(frozen=True)
class Tokeniser:
    """How captions and references are tokenised before they are scored, and its name in signatures."""

    name: str
    tokenise: Tokenise


def batched(tokenise: Callable[[str], list[str]]) -> Tokenise:
    """Make a tokeniser for `evaluate` from one of a single text, such as a vocabulary's."""
    return lambda texts: [" ".join(tokenise(text)) for text in texts]


def tokenise_by_java(texts: list[str]) -> list[str]:
    """Tokenise with Stanford's PTBTokenizer, in lower case, without punctuation, as pycocoevalcap does.

    Through a pipe: pycocoevalcap's own call writes a file into its package, which may be read-only, and a line break
    in a caption shifts all captions after it. Raises UserError when Java fails.
    """
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    ran = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    tokenised = ran.stdout.decode().split("\n")[:-1]
    if ran.returncode or len(tokenised) != len(texts):
        reason = (ran.stderr.decode(errors="replace").strip().splitlines() or ["it returned too few or many lines"])[0]
        raise UserError(f"Java's tokeniser failed ({reason}); fix Java, or score without it: --tokeniser words")
    dropped = frozenset(ptbtokenizer.PUNCTUATIONS)
    # Split at spaces alone, as pycocoevalcap does: "1 1/2" comes back as one word, with a no-break space in it.
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in tokenised]


def ptb(language: str) -> Tokeniser:
    if not has_java():
        raise UserError("the ptb tokeniser needs Java; install it (apt install default-jre-headless) or take another")
    return Tokeniser("ptb-java-3.4.1", tokenise_by_java)


def words(language: str) -> Tokeniser:
    """The vocabulary's own words; in English they are those of ptb in all but a few captions."""
    package, key = ("nltk", "en") if language == "en" else ("rjieba", "zh")
    tokenise = vocab.TOKENISERS[key]()  # raises UserError where rjieba is not installed
    return Tokeniser(f"{package}-words-{importlib.metadata.version(package)}", batched(tokenise))


def characters(language: str) -> Tokeniser:
    return Tokeniser("characters", batched(vocab.TOKENISERS["zh-characters"]()))


TOKENISERS: dict[str, Callable[[str], Tokeniser]] = {"ptb": ptb, "words": words, "characters": characters}


def pick_tokeniser(name: str, language: str) -> Tokeniser:
    """Return the tokeniser of that name in TOKENISERS.

    `auto` is ptb for English where Java is installed, else words; for Chinese it is characters, since where a Chinese
    word ends is a matter of opinion. Raises UserError for one that is not for the language or is not installed.
    """
    chinese = language.startswith("zh")
    if (name == "ptb" and language != "en") or (name == "characters" and not chinese):
        raise UserError(f"the {name} tokeniser is not for data.language={language}; take --tokeniser auto or words")
    if name == "auto":
        name = "characters" if chinese else "ptb" if language == "en" and has_java() else "words"
    return TOKENISERS[name](language)


def draw(images: int) -> np.ndarray:
    """Return how often each bootstrap sample has each image (RESAMPLES, images), always the same draw."""
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=RESAMPLES)


def resample(per_image: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each metric's score of RESAMPLES bootstrap samples of the images (Koehn 2004; Efron 1979).

    The same images are drawn for every system, so that the samples of two systems are paired. CIDEr's document
    frequencies stay those of all images.
    """
    return {name: METRICS[name].resample(draw(len(values)), values) for name, values in per_image.items()}


def intervals(per_image: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return, for each metric in `Scores.per_image`, the two values between which LEVEL % of the samples lie."""
    return {name: np.percentile(samples, ENDS).round(2).tolist() for name, samples in resample(per_image).items()}


def p_values(first: Scores, second: Scores) -> dict[str, float]:
    """Return how probable it is that the difference between two systems is chance (paired bootstrap, two-sided).

    A sample in which both are equal, to a hundredth, counts half for each: the same captions give 1, and so do two
    systems without a right n-gram of four words, whose BLEU-4 is not exactly 0.
    """
    ours, theirs = resample(first.per_image), resample(second.per_image)
    better = {name: float(np.mean((np.sign((ours[name] - theirs[name]).round(2)) + 1) / 2)) for name in ours}
    return {name: min(1.0, 2 * min(share, 1 - share)) for name, share in better.items()}


def describe(
    captions: Sequence[str], training: Iterable[str], tokenise: Callable[[str], list[str]]
) -> dict[str, float]:
    """Return statistics of captions; shares are between 0 and 1.

    length: mean number of words. vocabulary: different words used. distinct_captions: different captions / captions.
    novelty: share of captions that have words and are no training caption; only letters and digits are compared.
    distinct_1, distinct_2: different n-grams / n-grams (Li et al. 2016). unk, bad_endings: share of captions with
    `<unk>`, and of those that end like "with a". repetition: share of captions in which a word follows itself or
    three words in a row come twice.
    """
    texts = [tokenise(caption) for caption in captions]
    # The training captions may be more than fit in memory, so they are read one by one.
    known = set(map(letters, captions)).intersection(map(letters, training))
    unigrams, bigrams = ([gram for text in texts for gram in ngrams(text, n)] for n in (1, 2))
    values = {
        "length": len(unigrams) / len(captions),
        "vocabulary": len(set(unigrams)),
        "distinct_captions": len(set(captions)) / len(captions),
        "novelty": fmean(letters(caption) not in known | {""} for caption in captions),
        "distinct_1": len(set(unigrams)) / max(1, len(unigrams)),
        "distinct_2": len(set(bigrams)) / max(1, len(bigrams)),
        "unk": fmean("<unk>" in caption.lower() for caption in captions),
        "bad_endings": fmean(bool(text) and text[-1] in BAD_ENDINGS for text in texts),
        "repetition": fmean(map(repeats, texts)),
    }
    return {name: round(value, 4) for name, value in values.items()}


def letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def repeats(words: list[str]) -> bool:
    triples = list(ngrams(words, 3))
    return any(first == second for first, second in ngrams(words, 2)) or len(set(triples)) < len(triples)
