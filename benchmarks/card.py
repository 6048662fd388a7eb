"""Write the model card of the captioner in pretrained/, in Hugging Face's form: `python -m benchmarks.card`.

The text is that of benchmarks/card.md; what stands there for each $name comes from the results of the seeds of
configs/pretrained.yaml and configs/pretrained_scst.yaml, and from those of benchmarks/limits.py.
"""

from cli import UserError, run_script

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from benchmarks.limits import AGREE, LIMITS
from benchmarks.report import ALONE, show, spread
from config import flatten, load_config
from evaluate import NAMES
from models.encoder import file_sha256
from utils import PRETRAINED, write_atomically

FIRST, RECIPE = "pretrained", "pretrained_scst"  # what the second learns goes on from the first
RIVAL = f"ablations/scst-{ALONE}"  # on a ResNet-50, and searched in the same way
TEXT = Path(__file__).with_suffix(".md")
CARD = PRETRAINED.with_name("README.md")
SHOWN = ("bleu1", "bleu4", "meteor", "rouge_l", "cider")
HUB = {"bleu4": "bleu", "meteor": "meteor", "rouge_l": "rouge", "cider": "cider"}  # what the Hub calls these metrics
WRITING = {  # what `metrics.describe` finds
    "length": ("words a caption", "{:.1f}"),
    "vocabulary": ("different words", "{:,}"),
    "distinct_captions": ("different captions", "{:.1%}"),
    "novelty": ("captions that no training picture has", "{:.1%}"),
    "repetition": ("captions that repeat themselves", "{:.1%}"),
}

Found = dict[str, Any]  # of a JSON


def main() -> None:
    write_atomically(CARD, make(LIMITS.parent, PRETRAINED).encode())
    print(f"wrote {CARD}")


def make(results: Path, checkpoint: Path) -> str:
    """Return the card of a checkpoint, from the folder with the results of the seeds and of benchmarks/limits.py.

    Raises UserError where something is missing, and for a checkpoint that is not the one measured or not the best.
    """
    measured = results / LIMITS.name
    first, seeds, rivals = (
        [read(path) for path in sorted(results.glob(f"{recipe}-seed*.json"))] for recipe in (FIRST, RECIPE, RIVAL)
    )
    for recipe, found in ((FIRST, first), (RECIPE, seeds)):
        if not found:
            raise UserError(f"{results} has no {recipe}-seed0.json; make it: python -m benchmarks.recipes {recipe}")
    if not checkpoint.is_file():
        raise UserError(f"there is no {checkpoint}; put the best seed's checkpoint there")
    limits = read(measured) if measured.is_file() else None
    if not limits or limits["checkpoint"]["sha256"] != file_sha256(checkpoint):
        raise UserError(
            f"{measured} is missing, or not of this {checkpoint.name}; write it: python -m benchmarks.limits"
        )
    best = max(seeds, key=lambda result: result["scores"]["cider"])
    if limits["checkpoint"]["seed"] != best["seed"]:
        raise UserError(
            f"{checkpoint} is of another seed than {best['seed']}, which has the best CIDEr-D; keep that one"
        )
    compared = {f"`configs/{FIRST}.yaml`, mean": first, "`configs/scst.yaml`, `search.consensus=0`, mean": rivals}
    facts = of_training(first, seeds, best) | of_file(limits["checkpoint"])
    facts |= of_scores(seeds, limits["scores"], compared) | of_limits(limits)
    text = Template(TEXT.read_text(encoding="utf-8")).substitute(facts)
    return f"---\n{yaml.safe_dump(header(best, limits['scores']), sort_keys=False)}---\n\n{text}"


def read(path: Path) -> Found:
    return json.loads(path.read_text(encoding="utf-8"))


def header(best: Found, scores: Found) -> Found:
    """Return what the Hub reads of a card."""
    values = {name: round(scores[name], 2) for name in HUB if scores[name]}
    metrics = [{"type": HUB[name], "name": NAMES[name], "value": value} for name, value in values.items()]
    result = {
        "task": {"type": "image-to-text", "name": "Image captioning"},
        "dataset": {"type": "flickr8k", "name": "Flickr8k", "split": "validation"},
        "metrics": metrics,
    }
    name = f"flickr8k-{best['config']['encoder.name']}-{best['config']['decoder.name']}".replace("_", "-")
    return {
        "language": "en",
        "license": "mit",
        "library_name": "pytorch",
        "pipeline_tag": "image-to-text",
        "tags": ["image-captioning", "show-attend-and-tell"],
        "datasets": ["flickr8k"],
        "metrics": [metric["type"] for metric in metrics],
        "model-index": [{"name": name, "results": [result]}],
    }


def of_training(first: Sequence[Found], seeds: Sequence[Found], best: Found) -> dict[str, object]:
    config, machine = best["config"], best["environment"]
    return {
        "encoder": config["encoder.name"],
        "settings": settings_table([first[0]["config"], config]),
        "min_count": config["data.min_count"],
        "beam": config["search.beam"],
        "length_penalty": config["search.length_penalty"],
        "seed": best["seed"],
        "seeds": listed(result["seed"] for result in seeds),
        "first_minutes": listed(round(result["train_minutes"]) for result in first),
        "minutes": listed(round(result["train_minutes"]) for result in seeds),
        "memory": max(result["peak_memory_gb"] for result in [*first, *seeds]),
        "machine": f"{machine['processor']}, PyTorch {machine['torch']}, threads: {machine['threads']}",
    }


def settings_table(configs: Sequence[Found]) -> str:
    """Return the settings of recipes that are not those of config.yaml, a column for each recipe."""
    rows = []
    for name, usual in flatten(load_config().model_dump()).items():
        values = [config.get(name, usual) for config in configs]
        if name not in {"run", "train.seed", "train.start"} and any(value != usual for value in values):
            rows.append([f"`{name}`", *("" if value == usual else f"`{show(value)}`" for value in values)])
    return table("setting | first | then", rows)


def of_file(file: Found) -> dict[str, object]:
    return {
        "sha256": file["sha256"],
        "megabytes": f"{file['bytes'] / 1e6:.1f}",
        "image_size": file["image_size"],
        "cells": file["features"][0],
        "weights": f"{file['decoder_weights'] / 1e6:.1f}",
        "words": f"{file['words']:,}",
    }


def of_scores(seeds: Sequence[Found], kept: Found, compared: Mapping[str, Sequence[Found]]) -> dict[str, object]:
    rows = [[f"seed {result['seed']}", *figures(result["scores"], result["intervals"])] for result in seeds]
    rows.append(["mean ± deviation", *deviations(seeds)])
    rows.append(["**`captioner.pth`**", *figures(kept, kept["intervals"])])
    rows += [[name, *deviations(results)] for name, results in compared.items()]
    return {
        "scores": table(f" | {' | '.join(NAMES[name] for name in SHOWN)}", rows),
        "signature": kept["signature"],
        "used": kept["captions"]["vocabulary"],
    }


def figures(scores: Found, intervals: Found) -> list[str]:
    return ["–" if scores[name] is None else score([scores[name], *intervals.get(name, [])]) for name in SHOWN]


def deviations(seeds: Sequence[Found]) -> list[str]:
    return [spread([result["scores"][name] for result in seeds]) for name in SHOWN]


def of_limits(limits: Found) -> dict[str, object]:
    named, gender, content = limits["named"], limits["gender"], limits["by_content"]
    best, worst = (choose(content, key=lambda kind: content[kind]["cider"][0]) for choose in (max, min))
    shares = {
        "women_wrong": gender["women or girls"]["wrong"],
        "men_wrong": gender["men or boys"]["wrong"],
        **{f"male_{who}": found for who, found in gender["male"].items()},
    }
    for name, thing in {"women": "women or girls", "men": "men or boys", "two": "“two”"}.items():
        shares |= {f"{name}_recall": named[thing]["recall"], f"{name}_person": named[thing]["person_recall"]}
    return {
        **{name: percent(found, bounds=False) for name, found in shares.items()},
        "agree": AGREE,
        "groups": groups_table(limits),
        "short_cider": score(limits["by_length"][0]["cider"][:1]),
        "long_cider": score(limits["by_length"][-1]["cider"][:1]),
        "best": f"“{best}” ({score(content[best]['cider'][:1])})",
        "worst": f"“{worst}” ({score(content[worst]['cider'][:1])})",
        "named": named_table(named),
        "gender": gender_table(gender),
        "writing": writing_table(limits),
        "never_said": listed(f"{word} ({pictures})" for word, pictures in limits["never_said"]),
    }


def groups_table(limits: Found) -> str:
    thirds = zip(("shortest", "middling", "longest"), limits["by_length"], strict=True)
    rows = {f"{name} references: {'–'.join(map(str, third['words']))} words": third for name, third in thirds}
    rows |= limits["by_content"]
    cells = ([name, found["pictures"], score(found["bleu4"]), score(found["cider"])] for name, found in rows.items())
    return table("pictures with | number | BLEU-4 | CIDEr-D", cells)


def named_table(named: Found) -> str:
    rows = []
    for thing, found in named.items():
        recall = [round(found["pictures"]), percent(found["recall"]), percent(found["person_recall"], bounds=False)]
        precision = [percent(found["precision"]), percent(found["person_precision"], bounds=False)]
        rows.append([thing, *recall, found["captions"], *precision])
    return table("thing | agreed on | recall | a person's | captions with it | precision | a person's", rows)


def gender_table(gender: Found) -> str:
    rows = []
    for name in ("women or girls", "men or boys"):
        found = gender[name]
        answers = [percent(found[answer]) for answer in ("right", "both", "neither", "wrong")]
        rows.append([name, round(found["pictures"]), *answers, percent(found["person_wrong"], bounds=False)])
    return table("references | pictures | the same | both | none | the other | a person: the other", rows)


def writing_table(limits: Found) -> str:
    own, person = limits["scores"]["captions"], limits["one_person"]
    rows = ([what, form.format(own[name]), form.format(person[name])] for name, (what, form) in WRITING.items())
    return table(" | `captioner.pth` | a person (first references)", rows)


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    lines = [f"| {head} |", "|---" * (head.count(" | ") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in rows)])


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


def listed(items: Iterable[object]) -> str:
    return ", ".join(map(str, items))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
