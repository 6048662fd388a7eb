"""Several runs in one table, with the p-values of their differences from the first: `python evaluate.py --compare`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from cli import UserError
from cli.files import read_file
from metrics import METRICS, Scores, p_values
from utils import RUNS, write_atomically


def find_predictions(names: Sequence[str], split: str | None) -> tuple[str | None, dict[str, Path]]:
    """Return the split to compare on and the predictions of each run; a name can also be that of a predictions file.

    Without a split it is val where all runs were scored on it, since one compares to choose, else test; it stays None
    where only files are given. Raises UserError for a run that was not scored on the split.
    """
    if all(Path(name).is_file() for name in names):
        return split, {name: Path(name) for name in names}
    first, *others = ["val" if split == "dev" else split] if split else ["val", "test"]
    for each in (first, *others):
        found = {name: path for name in names if (path := find_file(name, each))}
        if len(found) == len(set(names)):
            return each, found
    missing = next(name for name in names if not find_file(name, first))
    again = f"python evaluate.py --run {missing} --split {first}"
    raise UserError(f"{missing} has no predictions-{first}.json to compare; score it first with: {again}")


def find_file(name: str, split: str) -> Path | None:
    places = (Path(name), *(folder / f"predictions-{split}.json" for folder in (RUNS / name, Path(name))))
    return next((place for place in places if place.is_file()), None)


def search_of(predictions: Path, split: str) -> str:
    """Return the search that wrote a run's captions, from its scores; `unknown` for captions of another system."""
    scores = predictions.with_name(f"scores-{split}.json")
    if predictions.name != f"predictions-{split}.json" or not scores.is_file():
        return "unknown"
    try:
        return json.loads(read_file(scores))["signature"].partition("|search:")[2]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{scores} is damaged; score the run again, or delete the file to compare without it") from None


def write_table(path: Path, scores: Mapping[str, Scores], searches: Mapping[str, str], signature: str) -> str:
    """Write the table as Markdown and CSV, and return the Markdown; `path` has no suffix.

    `scores` are those of each run, of which the first is the one that the others are compared with; `searches` say how
    their captions were searched, from `search_of`.
    """
    first, baseline = next(iter(scores.items()))
    rows: list[dict[str, Any]] = []
    for name, each in scores.items():
        chance = dict.fromkeys(baseline.per_image) if name == first else p_values(baseline, each)
        row = {metric: each.corpus.get(metric) for metric in baseline.corpus}
        row |= {f"p_{metric}": chance[metric] for metric in baseline.per_image}
        rows.append({"run": name, **row, "search": searches[name]})
    titles = {name: metric.title for name, metric in METRICS.items()}
    titles |= {f"p_{name}": f"p ({title})" for name, title in titles.items()}

    lines = [f"| {' | '.join(titles.get(column, column) for column in rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(format_cell(column, value) for column, value in row.items())} |" for row in rows]
    lines += ["", f"p: paired bootstrap against {first}, two-sided.", f"`{signature}`", ""]
    page = "\n".join(lines)
    write_atomically(path.with_suffix(".md"), page.encode())
    write_atomically(path.with_suffix(".csv"), pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode())
    return page


def format_cell(column: str, value: str | float | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value.replace("|", " ")
    if column.startswith("p_"):
        return f"{value:.3f}" if value >= 0.001 else "<0.001"
    return f"{value:.1f}"
