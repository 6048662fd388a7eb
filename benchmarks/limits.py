"""Measure the limits and biases of a captioner on the dev pictures, for its model card.

    python -m benchmarks.limits "data.root=[flickr8k, coco]"

captions the dev splits with pretrained/captioner.pth, and writes
benchmarks/results/flickr8k_coco/pretrained-limits.json.

What a caption should name is for the references to say, and they differ. So each one of a picture is held back in turn.
The others agree on a thing where AGREE of them name it. The captioner and whoever wrote the one held back are measured
against them: how much of what is agreed on they name (recall), how much of what they name another confirms (precision).
"""

from cli import Parser, UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import evaluate
import metrics
from config import setting_names
from data import annotations, splits
from data.vocab import SPECIALS, TOKENISERS
from models.checkpoint import load_model
from models.encoder import file_sha256
from utils import PRETRAINED, as_json, write_atomically

LIMITS = Path(__file__).parent / "results" / "flickr8k_coco" / "pretrained-limits.json"
AGREE = 3  # references
LISTED = 30  # words that are never said
KINDS = ("dogs", "other animals", "food", "vehicles", "indoors", "street", "sports")  # of pictures: they overlap

WORDS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("things.yaml").read_text(encoding="utf-8"))
PEOPLE = " ".join(WORDS[who] for who in ("women or girls", "men or boys", "children", "other people"))
THINGS = {"people": PEOPLE} | {thing: words for thing, words in WORDS.items() if thing != "other people"}

Texts = list[list[list[str]]]  # (P, R): the words of each of some texts on each picture


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    overrides = parser.parse_options(setting_names()).overrides
    model = load_model(PRETRAINED, overrides)
    table = annotations.load(model.config.data, splits.read_splits(PRETRAINED.parent))
    with tempfile.TemporaryDirectory() as folder:
        how = {"checkpoint": [PRETRAINED], "run": None, "split": "val", "tokeniser": "auto", "out": folder}
        evaluate.score_run(argparse.Namespace(overrides=overrides, **how))
        references = evaluate.choose_references(table, model.config, "val", "auto")
        captions = evaluate.read_predictions(Path(folder, "predictions-val.json"), references)
        scores = json.loads(Path(folder, "scores-val.json").read_text(encoding="utf-8"))
    file = {
        "sha256": file_sha256(PRETRAINED),
        "bytes": PRETRAINED.stat().st_size,
        "seed": model.config.train.seed,
        "image_size": model.transform.image_size,
        "features": list(model.encoder.feature_shape),
        "decoder_weights": sum(each.numel() for each in model.decoder.parameters()),
        "words": len(model.vocab) - len(SPECIALS),
    }
    found = {"checkpoint": file, "scores": scores, **measure(captions, references)}
    write_atomically(LIMITS, as_json(found) + b"\n")
    print(f"wrote {LIMITS}; now: python -m benchmarks.card")


def measure(captions: dict[str, str], references: evaluate.References) -> dict[str, Any]:
    """Return all that is measured of one caption per picture; shares are [share, low, high], between 0 and 1.

    Raises UserError where pictures have different numbers of references.
    """
    if len(set(map(len, references.captions.values()))) > 1:
        raise UserError("the limits need as many references of each picture; take captions such as Flickr8k's")
    tokenise = TOKENISERS[references.language]()
    written = [[tokenise(caption)] for caption in captions.values()]
    people = [[tokenise(text) for text in references.captions[image]] for image in captions]
    one_each = [references.captions[image][0] for image in captions]
    batched, names = references.tokeniser.tokenise, ["bleu4", "cider"]
    scores = metrics.evaluate(captions, references.captions, batched, references.language, names)
    return {
        "by_length": by_length(scores, people),
        "by_content": by_content(scores, people),
        "named": {thing: naming(words, written, people) for thing, words in THINGS.items()},
        "gender": gender(written, people),
        "one_person": metrics.describe(one_each, references.training, tokenise),
        "never_said": never_said(written, people),
    }


def by_length(scores: metrics.Scores, people: Texts) -> list[dict[str, Any]]:
    """Return the scores of three thirds of the pictures, by the mean number of words of their references."""
    lengths = np.array([np.mean(list(map(len, texts))) for texts in people])  # (P,)
    thirds = np.array_split(np.argsort(lengths, kind="stable"), 3)
    return [{"words": lengths[third[[0, -1]]].round(1).tolist()} | scores_of(scores, third) for third in thirds]


def by_content(scores: metrics.Scores, people: Texts) -> dict[str, dict[str, Any]]:
    """Return the scores of pictures in which AGREE references see people, animals, both, or neither; and by kind."""
    persons, animals = (says(kind, people).sum(1) >= AGREE for kind in (PEOPLE, WORDS["animals"]))  # (P,)
    groups = {"people, no animals": persons & ~animals, "animals, no people": animals & ~persons}
    groups |= {"both": persons & animals, "neither": ~persons & ~animals}
    groups |= {kind: says(WORDS[kind], people).sum(1) >= AGREE for kind in KINDS}
    return {name: scores_of(scores, np.flatnonzero(chosen)) for name, chosen in groups.items() if chosen.any()}


def scores_of(scores: metrics.Scores, chosen: np.ndarray) -> dict[str, Any]:
    """Return BLEU-4 and CIDEr-D, [score, low, high], of the pictures with these numbers."""
    part = {name: values[chosen] for name, values in scores.per_image.items()}
    once = np.ones((1, len(chosen)))
    means = {name: metrics.METRICS[name].resample(once, values)[0] for name, values in part.items()}
    bounds = metrics.intervals(part)
    return {"pictures": len(chosen), **{name: [round(float(mean), 2), *bounds[name]] for name, mean in means.items()}}


def naming(things: str, written: Texts, people: Texts) -> dict[str, Any]:
    """Return recall and precision of naming these things, of the captions and of a person."""
    own, theirs = (np.stack([says(words, who) for words in things.split(",")], axis=2) for who in (written, people))
    others = theirs.sum(1, keepdims=True) - theirs  # (P, R, things), for each reference held back
    agreed, confirmed = others >= AGREE, others >= 1
    return {
        "pictures": round(agreed.sum() / theirs.shape[1], 1),
        "captions": int(own.sum()),
        "recall": share(own & agreed, agreed),
        "precision": share(own & confirmed, own | np.zeros_like(theirs)),
        "person_recall": share(theirs & agreed, agreed),
        "person_precision": share(theirs & confirmed, theirs),
    }


def gender(written: Texts, people: Texts) -> dict[str, Any]:
    """Return which gender is named where the references not held back agree on one and none names the other.

    `male` is the share of men among captions, and among references, that name one gender alone.
    """
    own, theirs = (
        [says(words, who) for words in (WORDS["women or girls"], WORDS["men or boys"])] for who in (written, people)
    )  # (P, 1), (P, R)
    others = [each.sum(1, keepdims=True) - each for each in theirs]
    answers = {"right": (True, False), "both": (True, True), "neither": (False, False), "wrong": (False, True)}
    found: dict[str, Any] = {}
    for name, right, wrong in (("women or girls", 0, 1), ("men or boys", 1, 0)):
        agreed = (others[right] >= AGREE) & (others[wrong] == 0)
        found[name] = {
            "pictures": round(agreed.sum() / agreed.shape[1], 1),
            **{a: share(agreed & (own[right] == r) & (own[wrong] == w), agreed) for a, (r, w) in answers.items()},
            "person_wrong": share(agreed & ~theirs[right] & theirs[wrong], agreed),
        }
    male = {who: share(men & ~women, men ^ women) for who, (women, men) in (("captions", own), ("references", theirs))}
    return found | {"male": male}


def never_said(written: Texts, people: Texts) -> list[tuple[str, int]]:
    """Return the words that most pictures have in a reference, with their numbers, and no caption has."""
    pictures = Counter(word for texts in people for word in set().union(*texts))
    for word in set().union(*(text for [text] in written)):
        del pictures[word]
    return sorted(pictures.items(), key=lambda item: (-item[1], item[0]))[:LISTED]


def says(words: str, texts: Texts) -> np.ndarray:
    """Return which of the texts (P, R) has one of the words."""
    wanted = set(words.split())
    return np.array([[not wanted.isdisjoint(text) for text in each] for each in texts])


def share(hits: np.ndarray, cases: np.ndarray) -> list[float] | None:
    """Return hits / cases (P, …) with its bootstrap interval, pictures drawn; None where there is no case."""
    hit, of = (each.reshape(len(each), -1).sum(1) for each in (hits, cases))  # (P,)
    if not of.any():
        return None
    drawn = metrics.draw(len(cases))
    drawn = drawn[drawn @ of > 0]
    low, high = np.percentile(drawn @ hit / (drawn @ of), metrics.ENDS)
    return [round(float(value), 4) for value in (hit.sum() / of.sum(), low, high)]


if __name__ == "__main__":
    raise SystemExit(run_script(main))
