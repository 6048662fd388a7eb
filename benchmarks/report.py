"""Write the README's tables from benchmarks/results/: `python -m benchmarks.report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, one for each function in TABLES.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from config import UserError, cli, flatten, load_config
from evaluate import NAMES
from utils import write_atomically

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def main() -> None:
    page = README.read_text(encoding="utf-8")
    write_atomically(README, fill(page).encode())
    print(f"wrote the tables of {README}")


def fill(page: str) -> str:
    """Return the page with its tables written anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        found = re.findall(f"{start}.*?{end}", page, flags=re.DOTALL)
        if len(found) != 1:
            raise UserError(f"{README} has {len(found)} places for {start} … {end}; it should have one")
        page = page.replace(found[0], f"{start}\n{table()}\n{end}")
    return page


def dev_scores(dataset: str) -> str:
    """Return the mean and standard deviation over seeds of each recipe, on the dev split of a dataset."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((HERE / "results" / dataset).glob("*-seed*.json")):
        result = json.loads(path.read_text())
        by_recipe.setdefault(result["recipe"], []).append(result)
    known = [result["scores"] for results in by_recipe.values() for result in results]
    shown = [name for name in NAMES if any(scores[name] is not None for scores in known)]
    lines = [
        f"| recipe | seeds | {' | '.join(NAMES[name] for name in shown)} | training |",
        "|---" * (3 + len(shown)) + "|",
    ]
    for recipe, results in sorted(by_recipe.items(), key=lambda item: mean(r["scores"]["cider"] for r in item[1])):
        cells = [spread([result["scores"][name] for result in results]) for name in shown]
        minutes = mean(result["train_minutes"] for result in results)
        lines.append(f"| `configs/{recipe}.yaml` | {len(results)} | {' | '.join(cells)} | {minutes:.0f} min |")
    signatures = sorted({result["signature"] for results in by_recipe.values() for result in results})
    return "\n".join([*lines, "", *(f"`{signature}`  " for signature in signatures)])


def ablations() -> str:
    """Return what each change of a recipe does, one seed each, against the recipe with the same seed."""
    lines = ["| recipe | with | BLEU-4 | CIDEr-D | CIDEr-D gained |", "|---" * 5 + "|"]
    rows: list[tuple[str, str, float, float, Any]] = []
    defaults = flatten(load_config().model_dump())
    for path in sorted((HERE / "results" / "flickr8k" / "ablations").glob("*.json")):
        variant = json.loads(path.read_text())
        name = f"{variant['recipe']}-seed{variant['seed']}"
        base = json.loads((HERE / "results" / "flickr8k" / f"{name}.json").read_text())
        settings, usual = (defaults | result["config"] for result in (variant, base))  # older than some settings
        changed = [f"`{key}={show(value)}`" for key, value in settings.items() if value != usual[key]]
        scores, before = variant["scores"], base["scores"]
        rows.append((name, "–", before["bleu4"], before["cider"], ""))
        rows.append((name, ", ".join(changed), scores["bleu4"], scores["cider"], scores["cider"] - before["cider"]))
    for name, what, bleu4, cider, gained in dict.fromkeys(sorted(rows, key=lambda row: (row[0], row[1] != "–"))):
        lines.append(f"| {name} | {what} | {bleu4:.1f} | {cider:.1f} | {gained and f'{gained:+.1f}'} |")
    return "\n".join(lines)


def show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> str:
    if None in values:
        return "–"
    return f"{mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


TABLES: dict[str, Callable[[], str]] = {
    "dev-scores": partial(dev_scores, "flickr8k"),
    "chinese-scores": partial(dev_scores, "flickr8k_cn"),
    "ablations": ablations,
}


if __name__ == "__main__":
    raise SystemExit(cli(main))
