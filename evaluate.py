"""Score a run: its captions against the references, by the scorer that papers use, with intervals and a signature."""

from cli import Parser, UserError, run_script

import argparse
import csv
import io
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import distributed
import metrics
from captioning import caption_dataset, encode_dataset
from config import Config, load_config, setting_names
from data import annotations, splits, tars
from data.vocab import TOKENISERS
from models.ensemble import load_ensemble, refuse_homeless_ensemble
from utils import RUNS, as_json, find_run, pick_device, write_atomically

NAMES = {
    **{f"bleu{n}": f"BLEU-{n}" for n in range(1, 5)},
    **{"meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr-D", "spice": "SPICE"},
}
TESTED = ("bleu4", "cider")  # the metrics with intervals and p-values
SHOWN = 5  # picture names in a message
DIGITS = 4  # of scores in files; what is printed has one, rounded once
FEW = 30  # pictures of which p-values are not to be believed


@dataclass
class References:
    """The pictures of a split: `rows` of the table, their raw captions, and how captions are tokenised."""

    split: str
    rows: pd.DataFrame
    captions: dict[str, list[str]]
    training: Iterable[str]
    language: str
    tokeniser: str
    tokenise: Callable[[list[str]], list[str]]

    @property
    def own_tokeniser(self) -> Callable[[str], list[str]]:
        return TOKENISERS[self.language]()

    @property
    def signature(self) -> str:
        """Everything that the scores depend on, but for the captions."""
        counts = sorted({len(captions) for captions in self.captions.values()})
        per_picture = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return (
            f"scorer:{metrics.SCORER}|tok:{self.tokeniser}|refs:raw-{per_picture}|split:{self.split}"
            f"|n:{len(self.captions)}"
        )


def main() -> None:
    args = parse_args()
    if args.compare:
        compare(args)
    elif args.predictions:
        score_predictions(args)
    else:
        with distributed.processes():
            score_run(args)


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Score the captions of a run, or of another system, against the references of a split.",
        epilog="Example: python evaluate.py --run flickr8k --split val search.beam=3",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--checkpoint",
        action="append",
        metavar="FILE",
        help="a checkpoints.pth (default: the newest run's); several, each after its own --checkpoint, write together",
    )
    what.add_argument("--predictions", metavar="FILE", help="score captions in COCO's results form, of any system")
    what.add_argument("--compare", nargs="+", metavar="RUN", help="one table of runs that were scored before")
    parser.add_argument("--run", metavar="NAME", help="score this run, or with --predictions take its references")
    parser.add_argument(
        "--split",
        choices=["train", "val", "dev", "test"],
        help="default: test, or val where it is empty; with --compare val, or test where only that is scored",
    )
    parser.add_argument(
        "--tokeniser",
        choices=["auto", "ptb", "words", "characters"],
        default="auto",
        help="how captions are cut: ptb as papers do (needs Java), words (without it), characters (for Chinese); "
        "default: auto, which chooses",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: beside the checkpoint or the predictions)"
    )
    return parser.parse_options_and_settings(setting_names())


def score_run(args: argparse.Namespace) -> None:
    """Caption a split with a checkpoint and score the captions."""
    if args.checkpoint and args.run:
        raise UserError("--checkpoint and --run both say which model; give one of them")
    paths = list(map(Path, args.checkpoint or [find_run("checkpoints.pth", args.run) / "checkpoints.pth"]))
    refuse_homeless_ensemble(paths, args.out)
    model = load_ensemble(paths, args.overrides)
    path = paths[0]
    device = pick_device()
    model.to(device)
    table = annotations.load(model.config.data, splits.read_splits(path.parent))
    references = choose_references(table, model.config, args)
    print(f"captioning {len(references.captions):,} {references.split} pictures with {', '.join(map(str, paths))}")

    folder = annotations.image_folder(model.config.data)
    names = list(references.captions)
    features = encode_dataset(model, names, folder)
    torch.manual_seed(model.config.train.seed)  # where captions are drawn
    began = time.perf_counter()
    captions = caption_dataset(model, features, names)
    rate = len(captions) / (time.perf_counter() - began)
    if distributed.rank():
        return

    out = Path(args.out) if args.out else path.parent
    predictions = out / f"predictions-{references.split}.json"
    write_predictions(predictions, captions, references)
    signature = f"{references.signature}|{describe_search(model.config)}"
    if len(paths) > 1:
        signature += f"|ensemble:{len(paths)}"
    scores = score(captions, references, signature) | {
        "images_per_second": round(rate, 1),
        "checkpoint": ", ".join(p.name for p in paths),
    }
    report(scores, out / f"scores-{references.split}.json", predictions)


def score_predictions(args: argparse.Namespace) -> None:
    """Score a file in COCO's results form, whoever wrote it."""
    path = Path(args.predictions)
    references = read_references(path, args)
    captions = read_predictions(path, references)
    scores = score(captions, references, f"{references.signature}|search:{path.name}")
    report(scores, (Path(args.out) if args.out else path.parent) / f"scores-{references.split}.json")


def compare(args: argparse.Namespace) -> None:
    """Score several runs' captions in the same way, and say which differences to the first may be chance."""
    runs = choose_predictions(args)
    references = read_references(next(iter(runs.values())), args)
    rows: list[dict[str, Any]] = []
    baseline: metrics.Scores | None = None
    for name, path in runs.items():
        captions = read_predictions(path, references)
        scores = metrics.score(captions, references.captions, references.tokenise, rouge=True)
        by_java, notes = metrics.score_by_java(captions, references.captions, references.tokenise, references.language)
        chance = metrics.p_values(baseline, scores) if baseline else dict.fromkeys(TESTED)
        row = {"run": name, "search": search_of(path, references)} | scores.corpus | by_java
        rows.append(row | {f"p_{key}": chance[key] for key in TESTED})
        baseline = baseline or scores
    write_comparison(rows, references, Path(args.out) if args.out else RUNS, notes)


def search_of(predictions: Path, references: References) -> str:
    """Return how a run's captions were searched, as its scores say; of other systems nothing is known."""
    scores = predictions.with_name(f"scores-{references.split}.json")
    if predictions.name != f"predictions-{references.split}.json" or not scores.is_file():
        return "unknown"
    try:
        return json.loads(scores.read_text(encoding="utf-8"))["signature"].partition("|search:")[2]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{scores} is damaged; score that run again") from None


def choose_references(table: pd.DataFrame, config: Config, args: argparse.Namespace) -> References:
    split, rows = splits.choose_split(table, args.split, config.data.source)
    tokeniser, tokenise = metrics.pick_tokeniser(args.tokeniser, config.data.language)
    return References(
        split=split,
        rows=rows,
        captions=annotations.references(rows),
        training=tars.train_captions(config.data)
        if config.data.shards
        else table["caption"][table["split"] == "train"],
        language=config.data.language,
        tokeniser=tokeniser,
        tokenise=tokenise,
    )


def read_references(predictions: Path, args: argparse.Namespace) -> References:
    """Return what --run was trained with, or the run that the predictions lie in, or what the command line names."""
    searched = [word for word in args.overrides if word.startswith("search.")]
    if searched:
        raise UserError(f"{searched[0]} changes nothing about captions that are written already; leave it out")
    run = predictions.parent if (predictions.parent / "config.yaml").is_file() else None
    if args.run:
        run = find_run("config.yaml", args.run)
    config = load_config(run / "config.yaml" if run else None, args.overrides)
    table = annotations.load(config.data, splits.read_splits(run) if run else None)
    return choose_references(table, config, args)


def choose_predictions(args: argparse.Namespace) -> dict[str, Path]:
    """Return each run's predictions, or the file of that name.

    Without --split it becomes val where all runs were scored on it, since one compares to choose, else test.
    Raises UserError for a run that was not scored on the split.
    """
    if all(Path(name).is_file() for name in args.compare):
        return {name: Path(name) for name in args.compare}
    splits = ["val" if args.split == "dev" else args.split] if args.split else ["val", "test"]
    for split in splits:
        found = {name: path for name in args.compare if (path := find_predictions(name, split))}
        if len(found) == len(set(args.compare)):
            args.split = split
            return found
    missing = next(name for name in args.compare if not find_predictions(name, splits[0]))
    again = f"python evaluate.py --run {missing} --split {splits[0]}"
    raise UserError(f"{missing} has no predictions-{splits[0]}.json to compare; score it first with: {again}")


def find_predictions(name: str, split: str) -> Path | None:
    places = (Path(name), *(folder / f"predictions-{split}.json" for folder in (RUNS / name, Path(name))))
    return next((place for place in places if place.is_file()), None)


def read_predictions(path: Path, references: References) -> dict[str, str]:
    """Return a caption for each picture of the split; what is said of other pictures is not used.

    Raises UserError for a file of another form, a picture twice, and pictures of the split without caption.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
        # Half an emoji, which JSON can hold, can neither be printed nor be given to Java.
        found = [(str(row["image_id"]), row["caption"].encode(errors="replace").decode()) for row in rows]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        form = '[{"image_id": …, "caption": "…"}, …]'
        raise UserError(f"{path} is not in COCO's results form; it should read {form}") from None
    refuse_twice([name for name, _ in found], f"{path} has more than one caption for")
    captions = dict(found)
    pictures = references.rows.drop_duplicates("image")
    ids = pictures["image_id"].astype(str)
    refuse_twice(ids.tolist(), "the references have more than one picture with the id")
    missing = [name for name in ids if name not in captions]
    if len(missing) == len(ids):
        raise UserError(
            f"{path} has captions of none of the {len(ids):,} {references.split} pictures, such as {ids.iloc[0]:.60}; "
            "give captions of the same dataset and split"
        )
    if missing:
        raise UserError(
            f"{path} has no caption for {len(missing):,} of {len(ids):,} {references.split} pictures "
            f"({shorten(missing)}); caption them, or take another --split"
        )
    if len(captions) > len(ids):
        print(f"not scored: {len(captions) - len(ids):,} captions of pictures that are not in {references.split}")
    return {image: captions[name] for image, name in zip(pictures["image"], ids, strict=True)}


def refuse_twice(names: list[str], what: str) -> None:
    twice = pd.Series(names, dtype=str)[lambda series: series.duplicated()].unique().tolist()
    if twice:
        raise UserError(f"{what} {shorten(twice)}; keep one")


def shorten(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")


def score(captions: dict[str, str], references: References, signature: str) -> dict[str, Any]:
    """Return what scores-<split>.json holds."""
    if len(captions) == 1:
        print("warning: one picture alone has a CIDEr of 0, since every n-gram is in all documents there are")
    empty = sum(not caption.strip() for caption in captions.values())
    if empty:
        print(f"warning: {empty:,} of {len(captions):,} captions have no words")
    scores = metrics.score(captions, references.captions, references.tokenise, rouge=True)
    by_java, notes = metrics.score_by_java(captions, references.captions, references.tokenise, references.language)
    for note in notes:
        print(note)
    every = (scores.corpus | by_java).items()
    rounded = {name: None if value is None else round(value, DIGITS) for name, value in every}
    return {
        **{name: rounded[name] for name in NAMES},
        "split": references.split,
        "signature": signature,
        "intervals": metrics.intervals(scores),
        "captions": metrics.describe(list(captions.values()), references.training, references.own_tokeniser),
    }


def describe_search(config: Config) -> str:
    """Return the search as a part of a signature; what is as by default is not named."""
    search = config.search
    if search.temperature:
        parts = [f"search:draw|temperature:{search.temperature:g}|top_k:{search.top_k}|top_p:{search.top_p:g}"]
        parts.append(f"seed:{config.train.seed}")
    else:
        parts = [f"search:{'greedy' if search.beam == 1 else f'beam-{search.beam}'}|lp:{search.length_penalty:g}"]
    parts.append(f"max:{search.max_length}")
    if search.by_consensus():
        parts.append(f"consensus:{search.consensus:g}")
    for name in ("min_length", "no_repeat_ngram", "forbidden"):
        value = getattr(search, name)
        if value:
            parts.append(f"{name}:{','.join(value) if isinstance(value, list) else value}")
    return "|".join(parts)


def write_predictions(path: Path, captions: dict[str, str], references: References) -> None:
    pictures = references.rows.drop_duplicates("image")
    rows = [
        {"image_id": image_id, "caption": captions[image]}
        for image, image_id in pictures[["image", "image_id"]].to_numpy().tolist()
    ]
    write_atomically(path, as_json(rows))


def report(scores: dict[str, Any], path: Path, predictions: Path | None = None) -> None:
    """Print the scores and write them to `path`."""
    write_atomically(path, as_json(scores))
    print("  ".join(f"{NAMES[name]} {scores[name]:.1f}" for name in NAMES if scores[name] is not None))
    bounds = ", ".join(f"{NAMES[name]} {low:.1f} to {high:.1f}" for name, (low, high) in scores["intervals"].items())
    print(f"{metrics.LEVEL} % intervals by bootstrap: {bounds}")
    about = scores["captions"]
    print(
        f"captions: {about['length']:.1f} words on average, {about['vocabulary']:,} different words, "
        f"{about['distinct_captions']:.0%} distinct, {about['novelty']:.0%} not among the training captions, "
        f"{about['bad_endings']:.1%} with a bad ending, {about['repetition']:.1%} with repetitions"
    )
    if "images_per_second" in scores:
        print(f"{scores['images_per_second']:,.0f} pictures captioned a second")
    print(scores["signature"])
    print(f"wrote {path}{f' and {predictions}' if predictions else ''}")


def write_comparison(rows: list[dict[str, Any]], references: References, out: Path, notes: list[str]) -> None:
    """Print the table and write it as Markdown and CSV."""
    columns = {key: name for key, name in NAMES.items() if any(row[key] is not None for row in rows)}
    columns |= {f"p_{key}": f"p ({NAMES[key]})" for key in TESTED}
    lines = [f"| run | {' | '.join(columns.values())} | search |", "|---" * (2 + len(columns)) + "|"]
    for row in rows:
        cells = [f"{row[key]:.1f}" if row[key] is not None else "–" for key in NAMES if key in columns]
        cells += [as_p(row[f"p_{key}"]) for key in TESTED]
        lines.append(f"| {row['run']} | {' | '.join(cells)} | {row['search'].replace('|', ' ')} |")
    lines += ["", f"p: paired bootstrap against {rows[0]['run']}, two-sided.", f"`{references.signature}`"]
    if len(references.captions) < FEW:
        notes = [*notes, f"of {len(references.captions)} pictures alone p says little; compare on {FEW} or more"]
    page = "\n".join(lines) + "\n"
    table = io.StringIO()
    writer = csv.DictWriter(table, ["run", *columns, "search"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = out / f"comparison-{references.split}"
    write_atomically(path.with_suffix(".md"), page.encode())
    write_atomically(path.with_suffix(".csv"), table.getvalue().encode())
    print(page + "\n".join(notes))
    print(f"wrote {path}.md and {path}.csv")


def as_p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


if __name__ == "__main__":
    raise SystemExit(run_script(main))
