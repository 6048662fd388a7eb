"""Several runs in one table, with the p-values of their differences from the first: `python evaluate.py --compare`."""

from cli import UserError

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import metrics
from metrics import METRICS, Scores
from utils import RUNS, write_atomically


def find_predictions(names: Sequence[str], split: str | None) -> tuple[str | None, dict[str, Path]]:
    """Return the split to compare on and the predictions of each run; a name can also be that of a predictions file.

    Without a split it is val where all runs were scored on it, since one compares to choose, else test; it stays None
    where only files are given. Raises UserError for a run that was not scored on the split.
    """
    if all(Path(name).is_file() for name in names):
        return split, {name: Path(name) for name in names}
    splits = ["val" if split == "dev" else split] if split else ["val", "test"]
    found = {each: {name: path for name in names if (path := find_file(name, each))} for each in splits}
    for each in splits:
        if len(found[each]) == len(set(names)):
            return each, found[each]
    missing = next(name for name in names if name not in found[splits[0]])
    again = f"python evaluate.py --run {missing} --split {splits[0]}"
    raise UserError(f"{missing} has no predictions-{splits[0]}.json to compare; score it first with: {again}")


def find_file(name: str, split: str) -> Path | None:
    places = (Path(name), *(folder / f"predictions-{split}.json" for folder in (RUNS / name, Path(name))))
    return next((place for place in places if place.is_file()), None)


def search_of(predictions: Path, split: str) -> str:
    """Return the search that wrote a run's captions, from its scores; `unknown` for captions of another system."""
    scores = predictions.with_name(f"scores-{split}.json")
    if predictions.name != f"predictions-{split}.json" or not scores.is_file():
        return "unknown"
    try:
        return json.loads(scores.read_text(encoding="utf-8"))["signature"].partition("|search:")[2]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{scores} is damaged; score that run again") from None


def write_table(path: Path, scores: Mapping[str, Scores], searches: Mapping[str, str], signature: str) -> str:
    """Write the table as Markdown and CSV, and return the Markdown.

    Args:
        path: where to write, without the suffixes .md and .csv.
        scores: of each run, by its name; the first is the one that the others are compared with.
        searches: how each run's captions were searched, from `search_of`.
        signature: of the references.
    """
    (first, baseline), *others = scores.items()
    rows: list[dict[str, Any]] = [{"run": first} | baseline.corpus]
    for name, each in others:
        chance = metrics.p_values(baseline, each)
        rows.append({"run": name} | each.corpus | {f"p_{metric}": p for metric, p in chance.items()})
    shown = [name for name in METRICS if any(name in row for row in rows)]
    tested = [f"p_{name}" for name in baseline.per_image]
    titles = [METRICS[name].title for name in shown] + [f"p ({METRICS[name].title})" for name in baseline.per_image]

    lines = [f"| run | {' | '.join(titles)} | search |", "|---" * (2 + len(titles)) + "|"]
    for row in rows:
        row["search"] = searches[row["run"]]
        cells = [f"{row[name]:.1f}" if name in row else "–" for name in shown]
        cells += [format_p(row[name]) if name in row else "–" for name in tested]
        lines.append(f"| {row['run']} | {' | '.join(cells)} | {row['search'].replace('|', ' ')} |")
    lines += ["", f"p: paired bootstrap against {first}, two-sided.", f"`{signature}`"]
    page = "\n".join(lines) + "\n"

    table = io.StringIO()
    writer = csv.DictWriter(table, ["run", *shown, *tested, "search"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path.with_suffix(".md"), page.encode())
    write_atomically(path.with_suffix(".csv"), table.getvalue().encode())
    return page


def format_p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
