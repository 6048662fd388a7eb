"""The model card of a checkpoint that is given away, in Hugging Face's form: filled from its config, and from what lies
beside it in its run, its scores and its splits. What only people know is left to them, as questions.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path
from string import Template
from typing import Any

import yaml

from config import FREE, Config, flatten, load_config, marked
from data.splits import SPLITS, read_splits

LANGUAGES = {"en": ("en", "an English"), "zh": ("zh", "a Chinese"), "zh-characters": ("zh", "a Chinese")}
PAPERS = {
    "lstm": "an LSTM (*Show and Tell*, Vinyals et al. 2015)",
    "attention": "an LSTM with attention (*Show, Attend and Tell*, Xu et al. 2015)",
    "transformer": "a Transformer (Vaswani et al. 2017)",
}
SCORES = {"bleu4": "BLEU-4", "meteor": "METEOR", "rouge_l": "ROUGE-L", "cider": "CIDEr-D", "spice": "SPICE"}
TEXT = Template("""$front
# $name

It writes $language sentence about a photograph: $decoder on the features of $backbone.
`$file` has $megabytes MB: $weights million weights of the decoder, a vocabulary of $words words, and all settings.
$encoder

## How to use it

With the code of this project:

```bash
python inference_visualize.py --checkpoint $where --images photo.jpg
```

Pictures may have any size; each is resized to $image_size x $image_size pixels. $search

## What it was trained on

$data

## How it was trained

These settings are not those of `config.yaml`:

$settings

## Scores

$scores

## To be said by you

- Whose are the photographs and the captions, and under which terms may the captioner be used?
- What should nobody use it for, and whom does it describe wrongly more often than others?
- What does it not know? Caption photographs unlike those it was trained on, and show what it writes.

$checksum
""")


def make_card(
    checkpoint: dict[str, Any],
    trained: Config,
    run: Path,
    name: str,
    file: str,
    content: bytes,
    where: str | None = None,
) -> str:
    """Return the card of the captioner `name`, whose tensors are in a `file` with this content.

    `trained` are the settings that it was trained with, and `run` is the folder with its scores and splits; `where` is
    what --checkpoint takes, if not that file.
    """
    config = checkpoint["config"]
    tag, language = LANGUAGES.get(config["data"]["language"], (config["data"]["language"], "a"))
    scores = {
        split: json.loads(path.read_text(encoding="utf-8"))
        for split in SPLITS
        if (path := run / f"scores-{split}.json").is_file()
    }
    search, decoder, encoder = config["search"], config["decoder"]["name"], config["encoder"]
    inside = "The backbone is inside." if checkpoint["backbone"] else "The backbone is not inside; its weights are "
    if not checkpoint["backbone"]:
        inside += f"`{checkpoint['encoder']['source']}` (sha256 `{checkpoint['encoder']['sha256']}`)."
    return TEXT.substitute(
        front=front_matter(name, tag, decoder, scores),
        name=name,
        language=language,
        decoder=PAPERS.get(decoder, f"the decoder `{decoder}`"),
        backbone=f"{'a frozen' if encoder['frozen'] else 'a trained'} `{encoder['name']}`",
        file=file,
        where=where or file,
        megabytes=f"{len(content) / 1e6:.1f}",
        weights=f"{sum(tensor.numel() for tensor in checkpoint['decoder'].values()) / 1e6:.1f}",
        words=f"{len(checkpoint['vocabulary']['words']):,}",
        encoder=inside,
        image_size=checkpoint["transform"]["image_size"],
        search=f"Its search is a beam of {search['beam']} with a length penalty of {search['length_penalty']:g}.",
        data=about_data(trained, run),
        settings=about_settings(config),
        scores="\n\n".join(about_scores(split, found) for split, found in scores.items())
        or "It was not scored; do so with `python evaluate.py`, and make this page again.",
        checksum=f"`{file}` has the sha256 `{hashlib.sha256(content).hexdigest()}`.",
    )


def front_matter(name: str, language: str, decoder: str, scores: dict[str, dict]) -> str:
    """Return the card's metadata, with the scores of the split that counts most: test, or else val."""
    about: dict[str, Any] = {"language": language, "library_name": "pytorch", "pipeline_tag": "image-to-text"}
    about["tags"] = ["image-captioning", decoder]
    for split in [split for split in ("test", "val") if split in scores][:1]:
        metrics = [
            {"type": title.lower(), "name": title, "value": round(scores[split][name], 2)}
            for name, title in titles_of(scores[split]).items()
        ]
        task = {"type": "image-to-text", "name": "Image captioning"}
        dataset = {"type": "image-captions", "name": "its own pictures", "split": split}
        about["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n"


def about_data(trained: Config, run: Path) -> str:
    """Return how many pictures of each dataset the run's splits.json has, as a table, and where its words are from."""
    known, data = read_splits(run), trained.data
    least = f"Words that occur fewer than {data.min_count} times were left out."
    if trained.train.start:
        least = (
            f"It began from `{Path(trained.train.start).name}`, whose words it has: say here what that was trained on."
        )
    if data.format == "sample":
        least += " These are drawings of coloured shapes, no photographs."
    if known is None:
        return least
    counts = Counter(
        (Path(data.roots[0]).name if len(data.roots) == 1 else image.split("/")[0], split)  # several: in the names
        for split, images in known.items()
        for image in images
    )
    rows = [[name, *(f"{counts[name, split]:,}" for split in SPLITS)] for name in sorted({name for name, _ in counts})]
    return f"{table(['pictures of', *SPLITS], rows)}\n\n{least}"


def about_settings(config: dict[str, Any]) -> str:
    """Return the settings that are not those of config.yaml; not those that are of one machine, such as folders."""
    usual = flatten(load_config().model_dump())
    rows = [
        [f"`{name}`", f"`{json.dumps(value)}`"]
        for name, value in flatten(config).items()
        if name not in marked(FREE) and name not in ("run", "train.start") and value != usual.get(name)
    ]
    return table(["setting", "value"], rows) if rows else "(none)"


def about_scores(split: str, found: dict[str, Any]) -> str:
    """Return the scores of a split, of each of several datasets too, with the intervals that they have."""
    titles = titles_of(found)
    parts = {split: found} | {f"{split}, {name} alone": each for name, each in found.get("datasets", {}).items()}
    rows = []
    for name, part in parts.items():
        bounds = {key: " ({:.1f}–{:.1f})".format(*interval) for key, interval in part["intervals"].items()}
        rows.append([name, *(f"{part[key]:.1f}{bounds.get(key, '')}" for key in titles)])
    return (
        f"{table(['split', *titles.values()], rows)}\n\n`{found['signature']}`\n\nIn brackets: the 95 % bootstrap "
        f"interval over pictures. Its captions have {found['captions']['length']:.1f} words on average; "
        f"{found['captions']['distinct_captions']:.0%} of them are distinct."
    )


def titles_of(scores: dict[str, Any]) -> dict[str, str]:
    return {name: title for name, title in SCORES.items() if scores.get(name) is not None}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
