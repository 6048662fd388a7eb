"""Write the model cards of the captioners in pretrained/, in Hugging Face's form: `python -m benchmarks.card`.

The text is that of benchmarks/card.md, in which $names stand for figures of the results of configs/pretrained.yaml
and configs/pretrained_scst.yaml, or of benchmarks/limits.py; that of the Chinese one is in benchmarks/card_zh.md.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
from collections.abc import Sequence
from pathlib import Path
from string import Template

from benchmarks.limits import AGREE, LIMITS
from benchmarks.report import BOTH, TITLES, Found, all_settings, read, show, spread, table
from config import flatten, load_config
from models.encoder import file_sha256
from utils import LANGUAGES, PRETRAINED, write_atomically

FIRST, RECIPE = "pretrained", "pretrained_scst"  # the second goes on from what the first has learned
TEXT = Path(__file__).with_suffix(".md")
CARD = PRETRAINED.with_name("README.md")
CHINESE = TEXT.with_name("results") / "flickr8k_cn"
CHINESE_CARD = CARD.with_name("README.zh.md")
SHOWN = ("bleu4", "meteor", "cider")  # of each dataset
WRITING = {  # of `metrics.describe`
    "length": ("words a caption", "{:.1f}"),
    "vocabulary": ("different words", "{:,}"),
    "distinct_captions": ("different captions", "{:.1%}"),
    "novelty": ("captions that no training picture has", "{:.1%}"),
    "repetition": ("captions that repeat themselves", "{:.1%}"),
}


def main() -> None:
    write_atomically(CARD, make(LIMITS.parent, PRETRAINED).encode())
    write_atomically(CHINESE_CARD, make_chinese(CHINESE, LANGUAGES["zh"]).encode())
    print(f"wrote {CARD} and {CHINESE_CARD}")


def make(results: Path, checkpoint: Path) -> str:
    """Return the card of a checkpoint, from the folder with the results of the seeds and of benchmarks/limits.py.

    Raises UserError for a checkpoint that is not the one measured or not the best.
    """
    first, seeds = (read_seeds(results, recipe) for recipe in (FIRST, RECIPE))
    limits, best = read(results / LIMITS.name), max(seeds, key=lambda result: result["scores"]["cider"])
    if limits["checkpoint"]["sha256"] != file_sha256(checkpoint):
        raise UserError(f"{LIMITS.name} is not of this {checkpoint.name}; write it: python -m benchmarks.limits")
    if limits["checkpoint"]["seed"] != best["seed"]:
        raise UserError(
            f"{checkpoint} is of another seed than {best['seed']}, which has the best CIDEr-D; keep that one"
        )
    facts = about_training(first, seeds, best, limits["scores"]) | about_captions(limits)
    return Template(TEXT.read_text(encoding="utf-8")).substitute(facts)


def make_chinese(results: Path, checkpoint: Path) -> str:
    """Return the card of the Chinese captioner, from the folder with the results of its seeds and its own scores."""
    first, seeds = (read_seeds(results, recipe) for recipe in ("pretrained_zh", "pretrained_zh_scst"))
    kept = read(results / "captioner.json")
    file, scores, captions = kept["checkpoint"], kept["scores"], kept["scores"]["captions"]
    if file["sha256"] != file_sha256(checkpoint):
        raise UserError(f"{results / 'captioner.json'} is not of this {checkpoint.name}; score it with evaluate.py")
    names = ("bleu4", "rouge_l", "cider")
    rows = [
        [
            f"seed {found['seed']}",
            *(score([found["scores"][name], *found["intervals"].get(name, [])]) for name in names),
        ]
        for found in seeds
    ]
    rows.append(["mean ± deviation", *(spread([found["scores"][name] for found in seeds]) for name in names)])
    rows.append(
        ["**`captioner.zh.pth`**", *(score([scores[name], *scores["intervals"].get(name, [])]) for name in names)]
    )
    means = [spread([found["scores"][name] for found in first]) for name in names]
    rows.append(["`configs/pretrained_zh.yaml`, mean", *means])
    config, machine = seeds[0]["config"], seeds[0]["environment"]
    facts = {
        "name": f"{config['encoder.name']}-{config['decoder.name']}".replace("_", "-"),
        "encoder": config["encoder.name"],
        "bleu4": f"{scores['bleu4']:.2f}",
        "cider": f"{scores['cider']:.2f}",
        "length": f"{captions['length']:.0f}",
        "megabytes": f"{file['bytes'] / 1e6:.1f}",
        "weights": f"{file['decoder_weights'] / 1e6:.1f}",
        "words": f"{file['words']:,}",
        "min_count": config["data.min_count"],
        "first_minutes": ", ".join(f"{found['train_minutes']:.0f}" for found in first),
        "minutes": ", ".join(f"{found['train_minutes']:.0f}" for found in seeds),
        "seeds": ", ".join(str(found["seed"]) for found in seeds),
        "machine": f"{machine['processor']}, PyTorch {machine['torch']}",
        "scores": table(["", *(TITLES[name] for name in names)], rows),
        "signature": scores["signature"],
        "distinct": f"{captions['distinct_captions']:.0%}",
        "known": f"{1 - captions['novelty']:.0%}",
        "used": captions["vocabulary"],
        "sha256": file["sha256"],
    }
    return Template(TEXT.with_name("card_zh.md").read_text(encoding="utf-8")).substitute(facts)


def read_seeds(results: Path, recipe: str) -> list[Found]:
    return [read(path) for path in sorted(results.glob(f"{recipe}-seed*.json"))]


def about_training(first: Sequence[Found], seeds: Sequence[Found], best: Found, kept: Found) -> dict[str, object]:
    """Return what the card says of how the recipes were trained, and what they and the `kept` checkpoint score."""
    config, machine = best["config"], best["environment"]
    rows = [[f"seed {result['seed']}", *all_scores(result["datasets"])] for result in seeds]
    rows += [["mean ± deviation", *deviations(seeds)]] if len(seeds) > 1 else []
    rows += [
        ["**`captioner.pth`**", *all_scores(kept["datasets"])],
        [f"`configs/{FIRST}.yaml`, mean", *deviations(first)],
    ]
    return {
        "encoder": config["encoder.name"],
        "name": f"{config['encoder.name']}-{config['decoder.name']}".replace("_", "-"),
        "settings": settings_table([first[0], best]),
        "min_count": config["data.min_count"],
        "coco_weight": f"{config['data.weights'][1]:g}",
        "cider": f"{kept['cider']:.1f}",
        "beam": config["search.beam"],
        "length_penalty": config["search.length_penalty"],
        "seed": best["seed"],
        "seeds": ", ".join(str(result["seed"]) for result in seeds),
        "first_minutes": ", ".join(f"{result['train_minutes']:.0f}" for result in first),
        "minutes": ", ".join(f"{result['train_minutes']:.0f}" for result in seeds),
        "memory": max(result["peak_memory_gb"] or 0 for result in [*first, *seeds]),
        "machine": f"{machine['processor']}, PyTorch {machine['torch']}, threads: {machine['threads']}",
        **{
            f"{dataset}_{name}": f"{kept['datasets'][dataset][name]:.2f}"
            for dataset in BOTH
            for name in ("bleu4", "meteor", "rouge_l", "cider")
        },
        "scores": table(["", *(f"{title} {TITLES[name]}" for title in BOTH.values() for name in SHOWN)], rows),
        "signature": kept["signature"],
        "used": kept["captions"]["vocabulary"],
    }


def settings_table(results: Sequence[Found]) -> str:
    """Return the settings of results that are not those of config.yaml, a column for each."""
    rows, configs = [], [all_settings(result) for result in results]
    for name, default in all_settings({"config": flatten(load_config().model_dump())}).items():
        values = [config[name] for config in configs]
        if name not in {"run", "train.seed", "train.start"} and any(value != default for value in values):
            rows.append([f"`{name}`", *("" if value == default else f"`{show(value)}`" for value in values)])
    return table(["setting", "first", "then"], rows)


def all_scores(datasets: Found) -> list[str]:
    parts = [(datasets[dataset], name) for dataset in BOTH for name in SHOWN]
    return [score([part[name], *part["intervals"].get(name, [])]) for part, name in parts]


def deviations(seeds: Sequence[Found]) -> list[str]:
    return [spread([seed["datasets"][dataset][name] for seed in seeds]) for dataset in BOTH for name in SHOWN]


def about_captions(limits: Found) -> dict[str, object]:
    """Return what the card says of the checkpoint's file and of the captions that it writes."""
    file, named, gender, groups = (limits[name] for name in ("checkpoint", "named", "gender", "by_content"))
    worst, *_, best = sorted(groups, key=lambda kind: groups[kind]["cider"][0])
    shares = {"women_wrong": gender["women or girls"]["wrong"], "men_wrong": gender["men or boys"]["wrong"]}
    shares |= {f"male_{who}": found for who, found in gender["male"].items()}
    for name, thing in {"women": "women or girls", "men": "men or boys", "two": "“two”"}.items():
        shares |= {f"{name}_recall": named[thing]["recall"], f"{name}_person": named[thing]["person_recall"]}
    thirds = zip(("shortest", "middling", "longest"), limits["by_length"], strict=True)
    parts = {f"{name} references: {'–'.join(map(str, third['words']))} words": third for name, third in thirds}
    parts |= groups
    own, person = limits["scores"]["captions"], limits["one_person"]
    return {
        "sha256": file["sha256"],
        "megabytes": f"{file['bytes'] / 1e6:.1f}",
        "image_size": file["image_size"],
        "cells": file["features"][0],
        "weights": f"{file['decoder_weights'] / 1e6:.1f}",
        "words": f"{file['words']:,}",
        **{name: percent(found, bounds=False) for name, found in shares.items()},
        "agree": AGREE,
        "groups": table(
            ["pictures with", "number", "BLEU-4", "CIDEr-D"],
            [[name, part["pictures"], score(part["bleu4"]), score(part["cider"])] for name, part in parts.items()],
        ),
        "short_cider": score(limits["by_length"][0]["cider"][:1]),
        "long_cider": score(limits["by_length"][-1]["cider"][:1]),
        "best": f"“{best}” ({score(groups[best]['cider'][:1])})",
        "worst": f"“{worst}” ({score(groups[worst]['cider'][:1])})",
        "named": named_table(named),
        "gender": gender_table(gender),
        "writing": table(
            ["", "`captioner.pth`", "a person (first references)"],
            [[what, form.format(own[name]), form.format(person[name])] for name, (what, form) in WRITING.items()],
        ),
        "never_said": ", ".join(f"{word} ({pictures})" for word, pictures in limits["never_said"]),
    }


def named_table(named: Found) -> str:
    rows = []
    for thing, found in named.items():
        recall = [round(found["pictures"]), percent(found["recall"]), percent(found["person_recall"], bounds=False)]
        precision = [percent(found["precision"]), percent(found["person_precision"], bounds=False)]
        rows.append([thing, *recall, found["captions"], *precision])
    head = ["thing", "agreed on", "recall", "a person's", "captions with it", "precision", "a person's"]
    return table(head, rows)


def gender_table(gender: Found) -> str:
    rows = []
    for name in ("women or girls", "men or boys"):
        found = gender[name]
        answers = [percent(found[answer]) for answer in ("right", "both", "neither", "wrong")]
        rows.append([name, round(found["pictures"]), *answers, percent(found["person_wrong"], bounds=False)])
    return table(["references", "pictures", "the same", "both", "none", "the other", "a person: the other"], rows)


def score(found: Sequence[float]) -> str:
    """Return a score x100, and its interval where it has one."""
    value, *bounds = (f"{each:.1f}" for each in found)
    return value + (f" ({'–'.join(bounds)})" if bounds else "")


def percent(found: Sequence[float] | None, bounds: bool = True) -> str:
    """Return a share in %, with its interval unless nothing was found, which makes that of the bootstrap [0, 0]."""
    if found is None:
        return "–"
    value, low, high = (f"{100 * each:.0f}" for each in found)
    return f"{value} ({low}–{high})" if bounds and found[0] else value


if __name__ == "__main__":
    raise SystemExit(run_script(main))
