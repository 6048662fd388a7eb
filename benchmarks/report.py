"""Write the tables of the README and of docs/ from benchmarks/results/: `python -m benchmarks.report`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, one for each function in TABLES.
"""

from cli import UserError, run_script

import json
import re
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from config import flatten, load_config
from evaluate import NAMES
from utils import write_atomically

HERE = Path(__file__).parent
README, DOCS = HERE.parent / "README.md", HERE.parent / "docs"
DATASETS = {  # pictures and captions
    "Flickr8k, train and dev": (7_000, 35_000),
    "COCO 2017, train and val": (123_287, 616_767),
    "Conceptual 12M": (12_423_374, 12_423_374),
    "a billion pictures, a caption each": (1_000_000_000, 1_000_000_000),
}
ALONE = "alone"  # the variant of a recipe that does without its consensus
ANEW = "anew"  # the same settings, trained again by the code of later variants
DECODERS = ("lstm", "attention", "transformer")
MAIN = {  # the recipes in the README's table
    "lstm": "Show and Tell",
    "attention": "Show, Attend and Tell",
    "pretrained_scst": "the captioner in `pretrained/`",
    "scst": "`attention`, then self-critical",
    "transformer_scst": "Transformer, then self-critical",
}
# Rows of the speed table: what was measured, and how its figures in results/speed.json are told.
FIGURES = (
    (
        "5 epochs of Flickr8k from JPEGs to a trained LSTM, against a frozen ResNet run once per caption in fp32 "
        "(both measured on a slice and scaled by pictures and captions)",
        "**{seed_style_ratio:.0f} times as fast**: {own_minutes} min, not {seed_style_minutes}",
    ),
    (
        "encoding JPEGs with ResNet-50",
        "{encode_images_per_second:.0f} pictures/s, {encode_share_of_matmul_ceiling:.0%} of what the processor can "
        "multiply ({matmul_gflops:,} GFLOP/s)",
    ),
    (
        "captioning {captioned_pictures:,} JPEGs with a beam of 3, drawn and with a page, against encoding them",
        "{caption_s:.1f} s, not {encoder_s:.1f}: {caption_over_encoder:.2f} times",
    ),
    (
        "a beam of 5 against the same search picture by picture",
        "**{beam_over_per_image:.1f} times as fast** for the decoder that gains least",
    ),
    (
        "an epoch on cached features, validation apart, against forward and backward alone in memory",
        "{train_over_bare_loop:.2f} times as long for the decoder that loses most",
    ),
    (
        "2 processes of one thread against 1 of two",
        "{ddp_ratio:.2f} times the captions/s, {ddp_process_memory_gb} GB each",
    ),
    (
        "memory of training on {stream_captions[1]:,} captions in tars against {stream_captions[0]:,}",
        "{stream_memory_growth:.2f} times: {stream_memory_gb[1]:.2f} GB, not {stream_memory_gb[0]:.2f}",
    ),
    (
        "start of `train.py`, `evaluate.py`, `inference_visualize.py`, `visualize_loss.py`, to `--help`",
        "{start_train_s:.1f}, {start_evaluate_s:.1f}, {start_inference_visualize_s:.1f}, "
        "{start_visualize_loss_s:.1f} s",
    ),
)
PER_DECODER = (
    ("captions/s in training", "{captions_per_second:,.0f}"),
    ("ms a step of 64 captions", "{step_ms:.0f}"),
    ("share spent reading data", "{data_share:.1%}"),
    ("against forward and backward alone", "{over_bare_loop:.2f} x"),
    ("peak memory", "{train_memory_gb} GB"),
    (
        "captions/s by greedy search, beam 3, beam 5",
        "{beam1_images_per_second:,.0f}, {beam3_images_per_second:,.0f}, {beam5_images_per_second:,.0f}",
    ),
    ("words in these captions", "{caption_words}"),
    ("beam 5 against picture by picture", "{beam5_over_per_image:.1f} x"),
)


def main() -> None:
    for path in TABLES:
        write_atomically(path, fill(path, path.read_text(encoding="utf-8")).encode())
        print(f"wrote the tables of {path}")


def fill(path: Path, page: str) -> str:
    """Return the page with its tables written anew."""
    for name, table in TABLES[path].items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        found = re.findall(f"{start}.*?{end}", page, flags=re.DOTALL)
        if len(found) != 1:
            raise UserError(f"{path} has {len(found)} places for {start} … {end}; it should have one")
        page = page.replace(found[0], f"{start}\n{table()}\n{end}")
    return page


def dev_scores(dataset: str) -> str:
    """Return the mean and standard deviation over seeds of each recipe, on the dev split of a dataset.

    A recipe that ranks captions by consensus has a row for what it scores without, too.
    """
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    folder = HERE / "results" / dataset
    for path in sorted([*folder.glob("*-seed*.json"), *folder.glob(f"ablations/*-{ALONE}-seed*.json")]):
        result = json.loads(path.read_text())
        setting = ", `search.consensus=0`" if result.get("variant") == ALONE else ""
        by_recipe.setdefault(f"`configs/{result['recipe']}.yaml`{setting}", []).append(result)
    known = [result["scores"] for results in by_recipe.values() for result in results]
    shown = [name for name in NAMES if any(scores[name] is not None for scores in known)]
    lines = [
        f"| recipe | seeds | {' | '.join(NAMES[name] for name in shown)} | training |",
        "|---" * (3 + len(shown)) + "|",
    ]
    for recipe, results in sorted(by_recipe.items(), key=lambda item: mean(r["scores"]["cider"] for r in item[1])):
        cells = [spread([result["scores"][name] for result in results]) for name in shown]
        minutes = mean(result["train_minutes"] for result in results)
        lines.append(f"| {recipe} | {len(results)} | {' | '.join(cells)} | {minutes:.0f} min |")
    signatures = sorted({result["signature"] for results in by_recipe.values() for result in results})
    return "\n".join([*lines, "", *(f"`{signature}`  " for signature in signatures)])


def main_scores() -> str:
    """Return a few rows of `dev_scores` for the README: model, scores, signature, and the command that makes them."""
    lines = ["| model | BLEU-4 | METEOR | CIDEr-D | | made by |", "|---" * 6 + "|"]
    signatures: list[str] = []
    for recipe, model in MAIN.items():
        paths = sorted((HERE / "results" / "flickr8k").glob(f"{recipe}-seed*.json"))
        results = [json.loads(path.read_text()) for path in paths]
        cells = [spread([result["scores"][name] for result in results]) for name in ("bleu4", "meteor", "cider")]
        signatures += [signature for signature in {r["signature"] for r in results} if signature not in signatures]
        number = signatures.index(results[0]["signature"]) + 1
        command = f"`python -m benchmarks.recipes {recipe} --dataset mine`"
        lines.append(f"| {model} | {' | '.join(cells)} | ({number}) | {command} |")
    return "\n".join([*lines, "", *(f"({n}) `{signature}`  " for n, signature in enumerate(signatures, start=1))])


def ablations() -> str:
    """Return what each variant of a recipe changes and scores, against the recipe with the same seed.

    One that was made without consensus is compared with what the recipe scores without, and one that was trained
    otherwise with the recipe trained anew, by the same code, where there is that.
    """
    lines = ["| recipe | with | BLEU-4 | CIDEr-D | change in CIDEr-D |", "|---" * 5 + "|"]
    rows: list[tuple[str, str, float, float, Any]] = []
    defaults = flatten(load_config().model_dump())
    folder = HERE / "results" / "flickr8k"
    for path in sorted((folder / "ablations").glob("*.json")):
        variant = json.loads(path.read_text())
        if variant["variant"] in (ALONE, ANEW):
            continue
        name = f"{variant['recipe']}-seed{variant['seed']}"
        base = json.loads((folder / f"{name}.json").read_text())
        settings = defaults | variant["config"]  # which may be older than some settings
        if settings["search.consensus"] == 0 < (defaults | base["config"])["search.consensus"]:
            alone = f"{variant['recipe']}-{ALONE}-seed{variant['seed']}.json"
            base = json.loads((folder / "ablations" / alone).read_text())
            name += ", `search.consensus=0`"
        usual = defaults | base["config"]
        changed = {key: value for key, value in settings.items() if key != "run" and value != usual[key]}
        anew = folder / "ablations" / f"{variant['recipe']}-{ANEW}-seed{variant['seed']}.json"
        if anew.is_file() and not all(key.startswith("search.") for key in changed):
            base = json.loads(anew.read_text())
            name += ", trained anew"
        what = ", ".join(f"`{key}={show(value)}`" for key, value in changed.items())
        scores, before = variant["scores"], base["scores"]
        rows.append((name, "–", before["bleu4"], before["cider"], ""))
        rows.append((name, what, scores["bleu4"], scores["cider"], scores["cider"] - before["cider"]))
    for name, what, bleu4, cider, change in dict.fromkeys(sorted(rows, key=lambda row: (row[0], row[1] != "–"))):
        lines.append(f"| {name} | {what} | {bleu4:.1f} | {cider:.1f} | {change and f'{change:+.1f}'} |")
    return "\n".join(lines)


def speed() -> str:
    """Return what benchmarks/speed.py has measured; nothing where it has not been run."""
    found = read_speed()
    if not found:
        return ""
    lines = ["| what | measured |", "|---" * 2 + "|"]
    lines += [f"| {what.format(**found)} | {told.format(**found)} |" for what, told in FIGURES]
    machine = found["environment"]
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads, {machine['capability']}, "
        f"Python {machine['python']}, PyTorch {machine['torch']}; load before: {machine['load']}.",
    ]
    return "\n".join(lines)


def speed_by_decoder() -> str:
    found = read_speed()
    if not found:
        return ""
    lines = [f"| | {' | '.join(DECODERS)} |", "|---" * (1 + len(DECODERS)) + "|"]
    for what, told in PER_DECODER:
        own = [{key.removeprefix(f"{name}_"): value for key, value in found.items()} for name in DECODERS]
        lines.append(f"| {what} | {' | '.join(told.format(**each) for each in own)} |")
    return "\n".join(lines)


def read_speed() -> dict[str, Any]:
    path = HERE / "results" / "speed.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def scaling() -> str:
    """Return what datasets take: disk by arithmetic, time by the rates that benchmarks/speed.py has measured."""
    found = read_speed()
    lines = [
        "| dataset | pictures | captions | pooled features | 7 x 7 features | words | encoding | LSTM epoch |",
        "|---" * 8 + "|",
    ]
    for name, (pictures, captions) in DATASETS.items():
        encoding, epoch, words = "–", "–", "–"
        if found:
            encoding = as_time(pictures / found["encode_images_per_second"])
            epoch = as_time(captions / found["lstm_captions_per_second"])
            words = as_bytes(captions * found["stream_bytes_per_caption"])
        disk = [as_bytes(pictures * cells * 2048 * 2) for cells in (1, 49)]
        cells = [name, f"{pictures:,}", f"{captions:,}", *disk, words, encoding, epoch]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def spread(values: list[float]) -> str:
    if None in values:
        return "–"
    return f"{mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    README: {"main-scores": main_scores},
    DOCS / "results.md": {
        "dev-scores": partial(dev_scores, "flickr8k"),
        "speed": speed,
        "ablations": ablations,
        "chinese-scores": partial(dev_scores, "flickr8k_cn"),
        "speed-by-decoder": speed_by_decoder,
    },
    DOCS / "scaling.md": {"scaling": scaling},
}


if __name__ == "__main__":
    raise SystemExit(run_script(main))
