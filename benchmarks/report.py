"""Write the tables of the README and of docs/ from benchmarks/results/: `python -m benchmarks.report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, one for each function in TABLES.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from config import flatten, load_config
from metrics import METRICS
from utils import write_atomically

Found = dict[str, Any]  # what a JSON holds

HERE = Path(__file__).parent
README, DOCS = HERE.parent / "README.md", HERE.parent / "docs"
TITLES = {name: metric.title for name, metric in METRICS.items()}
DATASETS = {  # pictures and captions
    "Flickr8k, train and dev": (7_000, 35_000),
    "COCO 2017, train and val": (123_287, 616_767),
    "Conceptual 12M": (12_423_374, 12_423_374),
    "a hundred million pictures, a caption each": (100_000_000, 100_000_000),
    "a billion pictures, a caption each": (1_000_000_000, 1_000_000_000),
}
BOTH = {"flickr8k": "Flickr8k", "coco": "COCO"}  # datasets that a captioner learned from, by their folders
ALONE = "alone"  # the variant of a recipe that does without its consensus
ANEW = "anew"  # the same settings, trained again by the code of later variants
FAULTS = """\
A row that cannot fail shows nothing, so each was run on a copy of the program with the fault that *fails when* names:
`python -m tests.stress.mutations` puts them in, and none may go unseen."""
MAIN = {  # the recipes in the README's table
    "lstm": "Show and Tell",
    "attention": "Show, Attend and Tell",
    "pretrained_scst": "attention on EfficientNet-Lite2, then self-critical",
    "scst": "`attention`, then self-critical",
    "transformer_scst": "Transformer, then self-critical",
}


def main() -> None:
    for path in TABLES:
        write_atomically(path, fill(path, path.read_text(encoding="utf-8")).encode())
        print(f"wrote the tables of {path}")


def fill(path: Path, page: str) -> str:
    """Return the page with its tables written anew."""
    for name, make in TABLES[path].items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = page.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise UserError(f"{path} has no place for a table: {start} … {end}")
        page = f"{before}{start}\n{make()}\n{end}{after}"
    return page


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def dev_scores(dataset: str) -> str:
    """Return the mean and standard deviation over seeds of each recipe, on the dev split of a dataset.

    A recipe that ranks captions by consensus has a row for what it scores without, too.
    """
    by_recipe: dict[str, list[Found]] = {}
    folder = HERE / "results" / dataset
    for path in sorted([*folder.glob("*-seed*.json"), *folder.glob(f"ablations/*-{ALONE}-seed*.json")]):
        result = read(path)
        setting = ", `search.consensus=0`" if result.get("variant") == ALONE else ""
        by_recipe.setdefault(f"`configs/{result['recipe']}.yaml`{setting}", []).append(result)
    everything = [result for results in by_recipe.values() for result in results]
    shown = [name for name in TITLES if any(result["scores"].get(name) is not None for result in everything)]
    rows = []
    for recipe, results in sorted(by_recipe.items(), key=lambda item: fmean(r["scores"]["cider"] for r in item[1])):
        cells = [spread([result["scores"].get(name) for result in results]) for name in shown]
        minutes = fmean(result["train_minutes"] for result in results)
        rows.append([recipe, len(results), *cells, f"{minutes:.0f} min"])
    signatures = [f"`{signature}`  " for signature in sorted({result["signature"] for result in everything})]
    return "\n".join([table(["recipe", "seeds", *(TITLES[name] for name in shown), "training"], rows), "", *signatures])


def scores_apart() -> str:
    """Return the scores on Flickr8k's and on COCO's dev pictures of captioners that were trained on both."""
    by_recipe: dict[str, list[Found]] = {}
    folder = HERE / "results" / "flickr8k_coco"
    for path in sorted([*folder.glob("*-seed*.json"), *folder.glob("ablations/*-seed*.json")]):
        result = read(path)
        usual = flatten(load_config(HERE.parent / "configs" / f"{result['recipe']}.yaml").model_dump())
        own = {name: all_settings(result)[name] for name in ("train.epochs", "search.classes", "search.consensus")}
        changes = [f"`{name}={value:g}`" for name, value in own.items() if value != usual[name]]
        name = ", ".join([f"`{result['recipe']}`", *changes])
        by_recipe.setdefault(name, []).append(result)
    shown = [(dataset, name) for dataset in BOTH for name in ("bleu4", "meteor", "cider")]
    rows = []
    for name, results in by_recipe.items():
        cells = [spread([each["datasets"][dataset][metric] for each in results]) for dataset, metric in shown]
        rows.append([name, len(results), *cells])
    titles = [f"{BOTH[dataset]} {TITLES[name]}" for dataset, name in shown]
    return table(["recipe", "seeds", *titles], rows)


def photographs() -> str:
    """Return what the captioner in pretrained/ writes of photographs that Python packages bring, and what it wrote."""
    found = read(HERE / "results" / "photographs.json")
    return table(["photograph", "before", "now"], [[name, each["before"], each["now"]] for name, each in found.items()])


def main_scores() -> str:
    """Return a few rows of `dev_scores` for the README: model, scores, signature, and the command that makes them."""
    rows, signatures = [], list[str]()
    for recipe, model in MAIN.items():
        results = [read(path) for path in sorted((HERE / "results" / "flickr8k").glob(f"{recipe}-seed*.json"))]
        cells = [spread([result["scores"][name] for result in results]) for name in ("bleu4", "meteor", "cider")]
        signatures += [signature for signature in {r["signature"] for r in results} if signature not in signatures]
        number = signatures.index(results[0]["signature"]) + 1
        rows.append([model, *cells, f"({number})", f"`python -m benchmarks.recipes {recipe} --dataset mine`"])
    made = table(["model", "BLEU-4", "METEOR", "CIDEr-D", "", "made by"], rows)
    return "\n".join([made, "", *(f"({n}) `{signature}`  " for n, signature in enumerate(signatures, start=1))])


def ablations() -> str:
    """Return what each variant of a recipe changes and scores, against the recipe with the same seed.

    One that was made without consensus is compared with what the recipe scores without, and one that was trained
    otherwise with the recipe trained anew, by the same code, where there is that.
    """
    rows = list[tuple[str, str, str, str, str]]()
    folder = HERE / "results" / "flickr8k"
    for path in sorted((folder / "ablations").glob("*.json")):
        variant = read(path)
        recipe, seed = variant["recipe"], f"seed{variant['seed']}"
        if variant["variant"] in (ALONE, ANEW):
            continue
        name, base, settings = f"{recipe}-{seed}", read(folder / f"{recipe}-{seed}.json"), all_settings(variant)
        if settings["search.consensus"] == 0 < all_settings(base)["search.consensus"]:
            base, name = read(folder / "ablations" / f"{recipe}-{ALONE}-{seed}.json"), f"{name}, `search.consensus=0`"
        usual = all_settings(base)
        changed = {key: value for key, value in settings.items() if key != "run" and value != usual.get(key)}
        anew = folder / "ablations" / f"{recipe}-{ANEW}-{seed}.json"
        if anew.is_file() and not all(key.startswith("search.") for key in changed):
            base, name = read(anew), f"{name}, trained anew"
        what = ", ".join(f"`{key}={show(value)}`" for key, value in changed.items())
        scores, before = variant["scores"], base["scores"]
        rows.append((name, "–", f"{before['bleu4']:.1f}", f"{before['cider']:.1f}", ""))
        change = f"{scores['cider'] - before['cider']:+.1f}"
        rows.append((name, what, f"{scores['bleu4']:.1f}", f"{scores['cider']:.1f}", change))
    by_recipe = dict.fromkeys(sorted(rows, key=lambda row: (row[0], row[1] != "–")))  # each base once, and first
    return table(["recipe", "with", "BLEU-4", "CIDEr-D", "change in CIDEr-D"], by_recipe)


def all_settings(result: Found) -> Found:
    """Return all settings of a result, also those that are younger than it."""
    settings = flatten(load_config().model_dump()) | result["config"]
    if settings["train.batch_size"] == 64:  # what auto is for all of these datasets
        settings["train.batch_size"] = "auto"
    return settings


def speed(template: str, results: str = "speed.json") -> str:
    """Return a table of what benchmarks/speed.py, and benchmarks/serve.py, have measured."""
    return (HERE / template).read_text(encoding="utf-8").rstrip().format(**read(HERE / "results" / results))


def int8_scores() -> str:
    """Return what an LSTM scores that learned from features in 8 bits, and in the usual precision, seed by seed."""
    folder, rows, changes = HERE / "results" / "int8" / "ablations", list[list[str]](), list[float]()
    for path in sorted(folder.glob("lstm-int8-seed*.json")):
        both = [read(path.with_name(path.name.replace("int8", name)))["scores"] for name in ("auto", "int8")]
        scores = [f"{each[name]:.1f}" for each in both for name in ("bleu4", "cider")]
        changes.append(both[1]["cider"] - both[0]["cider"])
        rows.append([path.stem.rpartition("seed")[2], *scores, f"{changes[-1]:+.1f}"])
    head = "seed, `auto`: BLEU-4, CIDEr-D, `int8`: BLEU-4, CIDEr-D, change in CIDEr-D"
    return table(head.split(", "), rows) + f"\n\nMean change in CIDEr-D: {spread(changes)}."


def scaling() -> str:
    """Return what datasets take: disk by arithmetic, memory and time by what benchmarks/speed.py has measured."""
    found = read(HERE / "results" / "speed.json")
    head = "dataset, pictures, captions, pooled features, 7 x 7 features, captions in memory, encoding, LSTM epoch"
    rows = []
    for name, (pictures, captions) in DATASETS.items():
        disk = [as_bytes(pictures * regions * 2048 * 2) for regions in (1, 49)]
        memory = as_bytes(captions * found["bytes_per_caption"])
        encoding = as_time(pictures / found["encode_images_per_second"])
        epoch = as_time(captions / found["lstm_captions_per_second"])
        rows.append([name, f"{pictures:,}", f"{captions:,}", *disk, memory, encoding, epoch])
    return table(head.split(", "), rows)


def folders() -> str:
    """Return what benchmarks/folders.py has measured: processor time and memory of each step by the folder's size."""
    found = read(HERE / "results" / "folders.json")
    sizes = ", ".join(f"{size:,}" for size in found["pictures"])
    rows = [
        [step["title"], cells(step["seconds"]), cells(step["memory_mb"]), f"{step['slope']:.2f}"]
        for step in found["steps"].values()
    ]
    made = table(["step", f"seconds for {sizes} pictures", "MB", "slope"], rows)
    where = "{processor}, {threads} thread(s), Python {python}, PyTorch {torch}.".format(**found["environment"])
    return f"{made}\n\n{where}"


def cells(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in values)


def reliability() -> str:
    """Return what each stress test tried and lost, and the fault of the program with which it was seen to fail."""
    cells = []
    for row in read(HERE / "results" / "reliability.json"):
        fault = row["mutation"] if row["caught"] else "–"
        cells.append([row["check"], f"{row['tried']:,}", row["lost"], row["figures"], fault, f"`{row['command']}`"])
    made = table(["check", "tried", "lost", "figures", "fails when", "command"], cells)
    return f"{made}\n\n{FAULTS}"


def as_bytes(number: float) -> str:
    unit, size = next((pair for pair in (("TB", 1e12), ("GB", 1e9)) if number >= pair[1]), ("MB", 1e6))
    return f"{number / size:.3g} {unit}"


def as_time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"


def show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def spread(values: list[Any]) -> str:
    """Return mean ± standard deviation, or – where a value is missing."""
    if None in values:
        return "–"
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"main-scores": main_scores},
    DOCS / "results.md": {
        "dev-scores": partial(dev_scores, "flickr8k"),
        "speed": partial(speed, "speed.md"),
        "ablations": ablations,
        "chinese-scores": partial(dev_scores, "flickr8k_cn"),
        "both-scores": scores_apart,
        "speed-by-decoder": partial(speed, "speed_by_decoder.md"),
        "speed-8-bits": partial(speed, "speed_8_bits.md"),
        "speed-avx2": partial(speed, "speed_8_bits.md", "speed_avx2.json"),
        "int8-scores": int8_scores,
        "folders": folders,
    },
    DOCS / "limits.md": {"photographs": photographs},
    DOCS / "scaling.md": {"scaling": scaling},
    DOCS / "serving.md": {"serving": partial(speed, "serving.md")},
    DOCS / "reliability.md": {"results": reliability},
}


if __name__ == "__main__":
    raise SystemExit(run_script(main))
