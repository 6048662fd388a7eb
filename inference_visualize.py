"""Caption pictures with a trained run: JPGs with their captions, a page to browse them, and predictions.json.

python inference_visualize.py                              the held-out pictures of the newest run
python inference_visualize.py --images holiday/ 'cats/*.jpg' --out holiday_captions
"""

from cli import Parser, UserError, printable, run_script

import argparse
import glob
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

import distributed
import metrics
from captioning import SEARCH_BATCH, Captioned, Captioner, Picture, feature_cache, prediction, probability_per_word
from config import setting_names
from data import annotations, splits
from data.features import Features, Files
from data.formats import PICTURE_SUFFIXES
from models.ensemble import refuse_homeless_ensemble
from models.model import Caption, CaptionModel
from render.attention import AttentionMaps, draw_attention
from render.caption import NO_WORDS, draw_caption
from render.fonts import undrawable
from render.gallery import Gallery
from utils import PRETRAINED, as_json, find_run, knows_photographs, unique_name, write_atomically

PAGE = "captions_result.html"
QUALITY = 88  # of JPEGs
MAX_SKIPS = 20  # broken pictures that are named
FEW = 10  # pictures whose captions are printed, too
MEAN = "mean"  # --attention without a head


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Caption the test (or val) pictures of the newest run, or any pictures of your own.",
        epilog="Example: python inference_visualize.py --images holiday/ 'cats/*.jpg' --out holiday_captions. "
        "The search can be changed: search.beam=3 search.length_penalty=1, or search.temperature=0.8 "
        "search.top_p=0.9 to draw captions, the same ones each time; config.yaml lists all of search.*",
    )
    add = parser.add_argument
    add("--images", nargs="+", metavar="PATH", help="picture files, folders or globs")
    checkpoint = (
        "a checkpoints.pth (default: the newest run's; for --images, of those that learned from photographs, or "
    )
    checkpoint += "pretrained/captioner.pth); repeat it and several models write together"
    add("--checkpoint", action="append", metavar="FILE", help=checkpoint)
    add("--run", metavar="NAME", help="take this run's checkpoint")
    split = "the pictures, without --images (default: test, or val where it is empty)"
    add("--split", choices=["train", "val", "dev", "test"], help=split)
    add("--limit", type=positive, metavar="N", help="caption the first N pictures only")
    several = "the best N captions of each picture, by a beam of at least N (default: 1)"
    add("--num-captions", type=positive, default=1, metavar="N", help=several)
    attention = "draw the attention of each word: the mean over the decoder's heads, or one of them, counted from 1"
    add("--attention", nargs="?", const=MEAN, metavar="HEAD", help=attention)
    add("--out", metavar="FOLDER", help="where to write (default: the run's folder, or with --images this one)")
    args = parser.parse_options(setting_names())
    if args.checkpoint and args.run:
        raise UserError("--checkpoint and --run both say which model; give one of them")
    if args.images and args.split:
        raise UserError("--images and --split both say which pictures; give one of them")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> None:
    args, began = parse_args(), time.monotonic()
    with distributed.processes():
        caption(args, began)


def caption(args: argparse.Namespace, began: float) -> None:
    checkpoints = choose_checkpoints(args)
    if not args.images:
        refuse_homeless_ensemble(checkpoints, args.out)
    captioner = Captioner.load(checkpoints, args.overrides)
    model, named = captioner.model, ", ".join(map(str, checkpoints))
    heads = choose_heads(args.attention, model.decoder.heads, named)
    if args.images:
        pictures, features, out = find_pictures(args.images), None, Path(args.out or ".")
    else:
        pictures, features = split_pictures(model, args.split, checkpoints[0].parent)
        out = Path(args.out) if args.out else checkpoints[0].parent
    pictures = pictures[: args.limit]
    source = "cached features" if features else f"{model.config.encoder.name} on {model.device.type}"
    print(f"captioning {count(len(pictures))} with {named} ({source})")

    torch.manual_seed(model.config.train.seed)  # drawn captions are the same each time
    results = Results(out, pictures, model, heads, args.num_captions)
    skipped = results.write(captioner, features)
    for reason in skipped[:MAX_SKIPS]:
        print(f"skipped: {reason}")
    if len(skipped) > MAX_SKIPS:
        print(f"… and {len(skipped) - MAX_SKIPS:,} more")
    print(f"wrote captions of {count(len(pictures) - len(skipped))} in {time.monotonic() - began:.0f} s:")
    print(f"    {out / PAGE} (open it in a browser), {out / 'outputs'}/*.jpg, {out / 'predictions.json'}")


def count(pictures: int) -> str:
    return f"{pictures:,} picture{'' if pictures == 1 else 's'}"


# ---- which model, which pictures -------------------------------------------------------------------------------------


def choose_checkpoints(args: argparse.Namespace) -> list[Path]:
    """Return those named, or the newest run's: for --images, a run that knows photographs, or else pretrained/."""
    if args.checkpoint:
        return [Path(name) for name in args.checkpoint]
    if args.run or not args.images:
        return [find_run("checkpoints.pth", args.run) / "checkpoints.pth"]
    try:
        return [find_run("checkpoints.pth", accept=knows_photographs) / "checkpoints.pth"]
    except UserError:  # there is none
        return [PRETRAINED]


def choose_heads(asked: str | None, heads: int, named: str) -> slice | None:
    """Return the attention heads to be averaged, or None where no attention was asked for.

    Raises UserError for a decoder without attention and for a head that is not among its `heads`.
    """
    if asked is None:
        return None
    if not heads:
        raise UserError(
            f"--attention: {named} writes without attention; take a run of configs/attention.yaml, or "
            "--checkpoint pretrained/captioner.pth, or leave --attention out"
        )
    if asked == MEAN:
        return slice(None)
    if asked not in map(str, range(1, heads + 1)):
        known = f"heads 1 to {heads}; name one of them, or" if heads > 1 else "one head;"
        raise UserError(f"--attention {asked}: the decoder of {named} has {known} give --attention alone")
    return slice(int(asked) - 1, int(asked))


def find_pictures(patterns: list[str]) -> list[Picture]:
    """Return the picture files named by paths, folders (with all below them) and globs, each once.

    Raises UserError for a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not paths:
            what = "holds no picture files" if path.is_dir() else "matches no picture"
            raise UserError(f"--images {pattern} {what}; check the path")
        found |= dict.fromkeys(paths)
    return [Picture(path, path.name, path.as_posix()) for path in found]


def split_pictures(model: CaptionModel, split: str | None, run: Path) -> tuple[list[Picture], Features | None]:
    """Return the pictures of a split of the model's own dataset, and their features where all are in the cache."""
    data = model.config.data
    table = annotations.load(data, splits.read_splits(run))
    _, chosen = splits.choose_split(table, split, data.source)
    folder = annotations.image_folder(data)
    ids = dict(chosen[["image", "image_id"]].to_numpy().tolist())  # plain values, for JSON
    pictures = [
        Picture(folder / image, image, ids[image], tuple(captions))
        for image, captions in annotations.references(chosen).items()
    ]
    if not model.config.encoder.frozen:
        return pictures, None
    return pictures, feature_cache(model).find(Files([picture.name for picture in pictures], folder))


# ---- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A picture that was captioned and drawn: `file` is the JPG, relative to the page; `size` that of the picture."""

    picture: Picture
    captions: list[Caption]
    attention: AttentionMaps | None
    file: str
    size: tuple[int, int]


class Results:
    """Writes outputs/*.jpg, the page and predictions.json into the folder `out`, for all these pictures.

    Args:
        heads: the attention heads whose mean is drawn into a second JPG, or None for no such JPG.
    """

    def __init__(
        self, out: Path, pictures: list[Picture], model: CaptionModel, heads: slice | None, num_captions: int
    ) -> None:
        self.out, self.pictures, self.model, self.heads, self.num_captions = out, pictures, model, heads, num_captions
        taken: set[str] = set()  # names of files, which no two pictures share in whichever process
        self.stems = {picture: unique_name(picture.path.stem, taken) for picture in pictures}
        self.attention_stems = {stem: unique_name(f"{stem}-attention", taken) for stem in self.stems.values() if heads}

    def write(self, captioner: Captioner, features: Features | None) -> list[str]:
        """Caption and draw all pictures; returns what was wrong with those that could not be read."""
        skipped, done = list[str](), list[tuple[Picture, list[Caption]]]()
        subtitle = f"{self.model.config.encoder.name} and {self.model.config.decoder.name}"
        subtitle += "; point at a word to see its attention" if self.heads else ""
        found = self.draw_all(captioner, features)
        if distributed.rank():
            for _ in found:
                pass
            return skipped
        bar = tqdm(found, total=len(self.pictures), desc="captioning", unit="img", disable=distributed.bar_hidden())
        with Gallery(self.out / PAGE, "Captions", subtitle, attention=self.heads is not None) as gallery:
            for item in bar:
                if isinstance(item, UserError):
                    skipped.append(str(item))
                    continue
                done.append((item.picture, item.captions))
                texts = [each.text for each in item.captions]
                longest = self.model.config.search.max_length
                gallery.add(
                    item.file,
                    texts,
                    item.picture.references,
                    size=item.size,
                    name=item.picture.name,
                    probabilities=[probability_per_word(c, longest) for c in item.captions] if len(texts) > 1 else [],
                    attention=item.attention,
                )
            if not done:
                raise UserError(f"nothing was captioned: {skipped[0]}")
            gallery.score(self.rate(done))
        lacking = sorted(set().union(*(undrawable(captions[0].text) for _, captions in done)))
        if lacking:
            print(
                f"no font here has {''.join(lacking[:5])}{'…' if len(lacking) > 5 else ''}, left out in the JPGs; "
                "for Chinese: apt install fonts-noto-cjk, or pip install -r requirements-extras.txt"
            )
        rows = [prediction(picture.image_id, captions, self.num_captions) for picture, captions in done]
        write_atomically(self.out / "predictions.json", as_json(rows))
        for picture, captions in done if len(done) <= FEW else []:
            print(printable(f"    {picture.name}: {captions[0].text or NO_WORDS}"))
        return skipped

    def draw_all(self, captioner: Captioner, features: Features | None) -> Iterator[Drawn | UserError]:
        """Yield what became of each picture; several processes take turns at batches of them."""
        batches = [self.pictures[i : i + SEARCH_BATCH] for i in range(0, len(self.pictures), SEARCH_BATCH)]
        mine = [picture for batch in distributed.share(batches) for picture in batch]
        found = captioner.caption_pictures(mine, features, self.num_captions, self.heads is not None)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in range(0, len(batches), distributed.size()):  # in the last turn some may have nothing left
                yield from distributed.gather(list(pool.map(self.draw, next(found, []))))

    def draw(self, item: Captioned | UserError) -> Drawn | UserError:
        """Write the JPGs of a picture."""
        if isinstance(item, UserError):
            return item
        folder, stem = self.out / "outputs", self.stems[item.picture]
        folder.mkdir(parents=True, exist_ok=True)
        attention = AttentionMaps.of(item.captions[0], self.heads) if self.heads else None
        draw_caption(item.shown, item.captions[0].text).save(folder / f"{stem}.jpg", quality=QUALITY)
        if attention:
            path = folder / f"{self.attention_stems[stem]}.jpg"
            draw_attention(item.shown, attention).save(path, quality=QUALITY)
        captions = [replace(each, attention=None) for each in item.captions]
        return Drawn(item.picture, captions, attention, f"{folder.name}/{stem}.jpg", item.shown.size)

    def rate(self, done: list[tuple[Picture, list[Caption]]]) -> list[float | None]:
        """Return the CIDEr-D x100 of each picture's best caption; none unless two pictures have references."""
        references = {picture.name: picture.references for picture, _ in done if picture.references}
        if len(references) < 2:
            return []
        best = {picture.name: captions[0].text for picture, captions in done}
        tokenise = metrics.batched(self.model.vocab.tokenise)
        language = self.model.config.data.language
        return metrics.evaluate(best, references, tokenise, language, ["cider"]).per_image["cider"].tolist()


if __name__ == "__main__":
    sys.exit(run_script(main))
