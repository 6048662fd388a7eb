"""Score captions against the references of a split, as papers do, with intervals and a signature.

python evaluate.py                                    caption and score the test pictures of the newest run
python evaluate.py --predictions captions.json        score captions in COCO's results form, of any system
python evaluate.py --compare flickr8k attention       one table of runs that were scored before
"""

from cli import UserError, answer_early, options, run_script, say

if __name__ == "__main__":
    answer_early(options.evaluate, "PyTorch")  # --help and mistakes, before PyTorch is imported

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import distributed
import metrics
from captioning import Captioner, caption_dataset, encode_dataset
from cli.files import read_file
from config import Config, load_config
from data import annotations, formats, splits, tars
from data.folders import image_folders
from data.vocab import TOKENISERS
from metrics import METRICS
from models.ensemble import refuse_homeless
from models.hub import is_on_hub
from render import comparison
from utils import RUNS, as_json, find_run, write_atomically

SHOWN = 5  # picture names in a message


@dataclass
class References:
    """What captions of a split are scored against: all that the scores depend on but the captions themselves."""

    split: str
    image_ids: dict[str, str | int]  # each picture's id in the dataset
    captions: dict[str, list[str]]  # each picture's captions, raw
    dataset_of: dict[str, str]  # the dataset that each picture is of
    training: Iterable[str]  # the captions of the training split
    language: str
    tokeniser: metrics.Tokeniser

    def of(self, images: Sequence[str]) -> "References":
        """Return the references of these pictures alone."""
        ids = {image: self.image_ids[image] for image in images}
        return replace(self, image_ids=ids, captions={image: self.captions[image] for image in images})

    def score(self, captions: dict[str, str]) -> metrics.Scores:
        return metrics.evaluate(captions, self.captions, self.tokeniser.tokenise, self.language)

    def score_apart(self, captions: dict[str, str]) -> dict[str, metrics.Scores]:
        """Return the scores of each dataset's captions alone; none where there is one dataset."""
        parts: dict[str, dict[str, str]] = {}
        for image, caption in captions.items():
            parts.setdefault(self.dataset_of[image], {})[image] = caption
        return {name: self.score(part) for name, part in parts.items()} if len(parts) > 1 else {}

    @property
    def signature(self) -> str:
        counts = sorted({len(captions) for captions in self.captions.values()})
        each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        scorer = f"scorer:{metrics.SCORER}|tok:{self.tokeniser.name}"
        return f"{scorer}|refs:raw-{each}|split:{self.split}|n:{len(self.captions)}"


def main() -> None:
    args = options.evaluate()
    if args.compare:
        compare(args)
    elif args.predictions:
        path = Path(args.predictions)
        references = read_references(path, args)
        score(read_predictions(path, references), references, f"search:{path.name}", Path(args.out or path.parent))
    else:
        with distributed.processes():
            score_run(args)


def score_run(args: argparse.Namespace) -> None:
    """Caption a split with a checkpoint, or with several as an ensemble, and score the captions."""
    paths = args.checkpoint or [str(find_run("checkpoints.pth", args.run) / "checkpoints.pth")]
    refuse_homeless(paths, args.out)
    model = Captioner.load(paths, args.overrides).model
    config = model.config
    table = annotations.load(config.data, splits.read_splits(Path(paths[0]).parent))
    references = choose_references(table, config, args.split, args.tokeniser)
    images = list(references.captions)
    say(f"captioning {len(images):,} {references.split} pictures with {', '.join(paths)}")
    features = encode_dataset(model, images, image_folders(config.data))
    if len(features.names) < len(images):  # some cannot be read, and data.broken=skip
        images = list(features.names)
        references = references.of(images)
    torch.manual_seed(config.train.seed)  # where captions are drawn
    began = time.perf_counter()
    captions = caption_dataset(model, features, images)
    rate = len(images) / (time.perf_counter() - began)
    if distributed.rank():
        return
    out = Path(args.out or Path(paths[0]).parent)
    predictions = out / f"predictions-{references.split}.json"
    rows = [{"image_id": image_id, "caption": captions[image]} for image, image_id in references.image_ids.items()]
    write_atomically(predictions, as_json(rows))
    say(f"wrote {predictions} ({rate:,.0f} pictures captioned a second)")
    search = describe_search(config) + (f"|ensemble:{len(paths)}" if len(paths) > 1 else "")
    checkpoint = ", ".join(path if is_on_hub(path) else Path(path).name for path in paths)
    score(captions, references, search, out, images_per_second=round(rate, 1), checkpoint=checkpoint)


def describe_search(config: Config) -> str:
    """Return the search as a part of a signature; settings that are off are not named."""
    search = config.search
    if search.temperature:
        how = f"draw|temperature:{search.temperature:g}|top_k:{search.top_k}|top_p:{search.top_p:g}"
        how += f"|seed:{config.train.seed}"
    else:
        how = f"{'greedy' if search.beam == 1 else f'beam-{search.beam}'}|lp:{search.length_penalty:g}"
    others = {
        "max": search.max_length,
        "consensus": f"{search.consensus:g}" if search.by_consensus() else None,
        "classes": f"{search.classes:g}" if search.classes and not search.temperature else None,
        "min_length": search.min_length,
        "no_repeat_ngram": search.no_repeat_ngram,
        "forbidden": ",".join(search.forbidden),
    }
    return f"search:{how}" + "".join(f"|{name}:{value}" for name, value in others.items() if value)


def score(captions: dict[str, str], references: References, search: str, out: Path, **about: Any) -> None:
    """Print the scores of captions and write them, and `about` them, to scores-<split>.json, signed with `search`."""
    empty = sum(not caption.strip() for caption in captions.values())
    if empty:
        say(f"warning: {empty:,} of {len(captions):,} captions have no words")
    found, apart = references.score(captions), references.score_apart(captions)
    corpus, intervals = found.corpus, metrics.intervals(found.per_image)
    texts = metrics.describe(list(captions.values()), references.training, TOKENISERS[references.language]())
    scores: dict[str, Any] = dict.fromkeys(METRICS) | round_all(corpus)
    scores |= {"split": references.split, "signature": f"{references.signature}|{search}", "intervals": intervals}
    scores |= {"captions": texts, "datasets": {name: about_dataset(each) for name, each in apart.items()}}
    path = out / f"scores-{references.split}.json"
    write_atomically(path, as_json(scores | about))
    for note in found.notes:
        say(note)
    say(show(corpus))
    for name, each in apart.items():
        say(f"of these {name} alone: {show(each.corpus)}")
    bounds = ", ".join(f"{METRICS[name].title} {low:.1f} to {high:.1f}" for name, (low, high) in intervals.items())
    say(f"{metrics.LEVEL} % intervals by bootstrap: {bounds}")
    say(
        f"captions: {texts['length']:.1f} words on average, {texts['vocabulary']:,} different words, "
        f"{texts['distinct_captions']:.0%} distinct, {texts['novelty']:.0%} not among the training captions, "
        f"{texts['bad_endings']:.1%} with a bad ending, {texts['repetition']:.1%} with repetitions"
    )
    say(str(scores["signature"]))
    say(f"wrote {path}")


def show(scores: dict[str, float]) -> str:
    return "  ".join(f"{metric.title} {scores[name]:.1f}" for name, metric in METRICS.items() if name in scores)


def about_dataset(scores: metrics.Scores) -> dict[str, Any]:
    pictures = len(next(iter(scores.per_image.values())))
    return {"pictures": pictures, **round_all(scores.corpus), "intervals": metrics.intervals(scores.per_image)}


def round_all(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in scores.items()}


def choose_references(table: pd.DataFrame, config: Config, split: str | None, tokeniser: str) -> References:
    split, rows = splits.choose_split(table, split, config.data.source)
    ids = dict(rows.drop_duplicates("image")[["image", "image_id"]].to_numpy().tolist())
    training = tars.train_captions(config.data) if config.data.shards else table["caption"][table["split"] == "train"]
    picked = metrics.pick_tokeniser(tokeniser, config.data.language)
    dataset_of = dict(rows.drop_duplicates("image")[["image", "dataset"]].to_numpy().tolist())
    return References(split, ids, annotations.references(rows), dataset_of, training, config.data.language, picked)


def read_references(predictions: Path, args: argparse.Namespace) -> References:
    """Return the references of --run, of the run that the predictions lie in, or of the dataset in the settings."""
    searched = [word for word in args.overrides if word.startswith("search.")]
    if searched:
        raise UserError(f"{searched[0]} changes nothing about captions that are written already; leave it out")
    beside = predictions.parent if (predictions.parent / "config.yaml").is_file() else None
    run = find_run("config.yaml", args.run) if args.run else beside
    config = load_config(run / "config.yaml" if run else None, args.overrides)
    table = annotations.load(config.data, splits.read_splits(run) if run else None, need_pictures=False)
    return choose_references(table, config, args.split, args.tokeniser)


def read_predictions(path: Path, references: References) -> dict[str, str]:
    """Return a caption for each picture of the split; captions of other pictures are not used.

    Raises UserError for a file of another form, a picture twice, and pictures of the split without caption.
    """
    try:
        rows = json.loads(read_file(path).decode("utf-8-sig"))
        # Half an emoji, which JSON can hold, can be neither printed nor given to Java.
        found = [(str(row["image_id"]), row["caption"].encode(errors="replace").decode()) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f'{path} is not in COCO\'s results form: [{{"image_id": …, "caption": "…"}}, …]') from None
    formats.check_lengths((caption for _, caption in found), str(path))
    ids = {image: str(image_id) for image, image_id in references.image_ids.items()}
    for where, names in ((path, [name for name, _ in found]), ("the dataset", list(ids.values()))):
        twice = pd.Series(names, dtype=str).duplicated()
        if twice.any():
            raise UserError(f"{where} has the picture {names[twice.argmax()]} twice; keep one")
    captions = dict(found)
    missing = [name for name in ids.values() if name not in captions]
    if missing:
        raise UserError(
            f"{path} has no caption for {len(missing):,} of {len(ids):,} {references.split} pictures "
            f"({', '.join(missing[:SHOWN])} …); caption them, or take another --split or dataset"
        )
    if len(captions) > len(ids):
        say(f"not scored: {len(captions) - len(ids):,} captions of pictures that are not in {references.split}")
    return {image: captions[name] for image, name in ids.items()}


def compare(args: argparse.Namespace) -> None:
    """Score the captions of several runs in the same way, and say which differences from the first may be chance."""
    args.split, runs = comparison.find_predictions(args.compare, args.split)
    references = read_references(next(iter(runs.values())), args)
    systems = {name: references.score(read_predictions(path, references)) for name, path in runs.items()}
    searches = {name: comparison.search_of(path, references.split) for name, path in runs.items()}
    path = Path(args.out or RUNS) / f"comparison-{references.split}"
    for line in comparison.write_table(path, systems, searches, references.signature).split("\n"):
        say(line)
    for note in next(iter(systems.values())).notes:
        say(note)
    say(f"wrote {path}.md and {path}.csv")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
