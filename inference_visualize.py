"""Caption pictures with a trained run: JPGs with their captions, a page to browse them, and predictions.json."""

from cli import Parser, UserError, printable, run_script

import argparse
import glob
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import distributed
import metrics
from config import flatten, read_yaml, setting_names
from data import annotations
from data.features import Extractor, FeatureCache, Features, read_ahead
from data.transforms import Transform, open_picture
from models.ensemble import load_ensemble, refuse_homeless_ensemble
from models.model import CAPTION_BATCH, Caption, CaptionModel
from render import LONGEST_SIDE, NO_WORDS, Gallery, WordMaps, draw_attention, draw_caption, undrawable
from utils import PRETRAINED, as_json, find_run, pick_device, write_atomically

PAGE = "captions_result.html"
QUALITY = 88
SKIPS_SHOWN = 20
FEW = 10  # pictures whose captions are printed too
MEAN = "mean"  # --attention without a head
PICTURE_ENDINGS = frozenset(annotations.SUFFIXES)


@dataclass(frozen=True)
class Picture:
    """A picture to caption: `image_id` names it in predictions.json, `references` are known captions.

    `content` is what the file holds, where it lies on no disk.
    """

    path: Path
    name: str
    image_id: str | int
    references: tuple[str, ...] = ()
    content: bytes | None = None


Opened = tuple[Picture, Image.Image, torch.Tensor | None]  # small enough to keep; pixels (3, S, S) to be encoded


@dataclass(frozen=True)
class Done:
    """A picture with its captions, the first of them drawn below it in `file`; `size` is that of the picture there."""

    picture: Picture
    captions: list[Caption]
    look: WordMaps | None
    file: str
    size: tuple[int, int]


def main() -> None:
    args = parse_args()
    with distributed.processes():
        caption(args)


def caption(args: argparse.Namespace) -> None:
    began = time.monotonic()
    refuse_contradictions(args)
    checkpoints = choose_checkpoints(args)
    if not args.images:
        refuse_homeless_ensemble(checkpoints, args.out)
    model = load_ensemble(checkpoints, args.overrides)
    device = pick_device()
    model.to(device)
    named = ", ".join(map(str, checkpoints))
    heads = choose_heads(args.attention, model.decoder.heads, named)
    if args.images:
        pictures, features, out = find_pictures(args.images), None, Path(args.out or ".")
    else:
        pictures, features = split_pictures(model, args.split, checkpoints[0].parent, device)
        out = Path(args.out) if args.out else checkpoints[0].parent
    pictures = pictures[: args.limit]
    source = "cached features" if features else f"{model.config.encoder.name} on {device.type}"
    print(f"captioning {count(len(pictures))} with {named} ({source})")

    broken = caption_pictures(model, pictures, features, args.num_captions, heads, out, device)
    done = len(pictures) - len(broken)
    for number, reason in enumerate(broken):
        if number == SKIPS_SHOWN:
            print(f"… and {len(broken) - SKIPS_SHOWN:,} more")
            break
        print(f"skipped: {reason}")
    print(f"wrote captions of {count(done)} in {time.monotonic() - began:.0f} s:")
    print(f"    {out / PAGE} (open it in a browser), {out / 'outputs'}/*.jpg, {out / 'predictions.json'}")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Caption the test (or val) pictures of the newest run, or any pictures of your own.",
        epilog="Example: python inference_visualize.py --images holiday/ 'cats/*.jpg' --out holiday_captions. "
        "The search can be changed: search.beam=3 search.length_penalty=1, or search.temperature=0.8 "
        "search.top_p=0.9 to draw them, the same ones each time; config.yaml lists all of search.*",
    )
    parser.add_argument("--images", nargs="+", metavar="PATH", help="picture files, folders or globs")
    parser.add_argument(
        "--checkpoint",
        action="append",
        metavar="FILE",
        help="a checkpoints.pth (default: the newest run's; for --images, of those that learned from photographs, or "
        "the one in pretrained/); "
        "several, each after its own --checkpoint, write together",
    )
    parser.add_argument("--run", metavar="NAME", help="take this run's checkpoint")
    parser.add_argument(
        "--split",
        choices=["train", "val", "dev", "test"],
        help="the pictures, without --images (default: test, or val where it is empty)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="caption the first N pictures only")
    parser.add_argument(
        "--num-captions",
        type=positive,
        default=1,
        metavar="N",
        help="the best N captions of each picture, by a beam of at least N (default: 1)",
    )
    parser.add_argument(
        "--attention",
        nargs="?",
        const=MEAN,
        metavar="HEAD",
        help="draw where the decoder looked for each word: the mean over its heads, or one of them, counted from 1",
    )
    parser.add_argument(
        "--out", metavar="FOLDER", help="where to write (default: the run's folder, or with --images this one)"
    )
    return parser.parse_options_and_settings(setting_names())


def count(pictures: int) -> str:
    return f"{pictures:,} picture{'' if pictures == 1 else 's'}"


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def refuse_contradictions(args: argparse.Namespace) -> None:
    if args.checkpoint and args.run:
        raise UserError("--checkpoint and --run both say which model; give one of them")
    if args.images and args.split:
        raise UserError("--images and --split both say which pictures; give one of them")


def choose_checkpoints(args: argparse.Namespace) -> list[Path]:
    """Return those named, or the newest run's: for photographs, one that knows them, or else the one in pretrained/."""
    if args.checkpoint:
        return [Path(name) for name in args.checkpoint]
    if args.run or not args.images:
        return [find_run("checkpoints.pth", args.run) / "checkpoints.pth"]
    try:
        return [find_run("checkpoints.pth", accept=knows_photographs) / "checkpoints.pth"]
    except UserError:  # there is none
        return [PRETRAINED]


def knows_photographs(run: Path) -> bool:
    config = run / "config.yaml"
    return not config.is_file() or flatten(read_yaml(config)).get("data.format") != "sample"


def choose_heads(asked: str | None, heads: int, named: str) -> slice | None:
    """Return which of a decoder's attention maps are to be averaged, or None where none were asked for.

    Raises UserError for a decoder without attention and for a head that is not among its `heads`.
    """
    if asked is None:
        return None
    if not heads:
        raise UserError(
            f"--attention: {named} writes without attention maps; take a run of configs/attention.yaml, or "
            "--checkpoint pretrained/captioner.pth, or leave --attention out"
        )
    if asked == MEAN:
        return slice(None)
    if asked not in map(str, range(1, heads + 1)):
        known = f"heads 1 to {heads}; name one of them, or" if heads > 1 else "one head;"
        raise UserError(f"--attention {asked}: the decoder of {named} has {known} give --attention alone")
    return slice(int(asked) - 1, int(asked))


def split_pictures(
    model: CaptionModel, split: str | None, run: Path, device: torch.device
) -> tuple[list[Picture], Features | None]:
    """Return the pictures of a split of the model's own dataset, and their features where all are in the cache."""
    data = model.config.data
    table = annotations.load(data, annotations.read_splits(run))
    _, chosen = annotations.choose_split(table, split, data.source)
    folder = annotations.image_folder(data)
    ids = dict(chosen[["image", "image_id"]].to_numpy().tolist())  # plain values, for JSON
    pictures = [
        Picture(folder / image, image, ids[image], tuple(captions))
        for image, captions in annotations.references(chosen).items()
    ]
    features = None
    if model.config.encoder.frozen:
        features = FeatureCache(model, sorted(table["image"].unique()), folder, device).find()
    return pictures, features


def find_pictures(patterns: list[str]) -> list[Picture]:
    """Return the picture files named by paths, folders (with all below them) and globs, each once.

    Raises UserError for a pattern that matches nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_ENDINGS and p.is_file())
        elif path.exists():
            paths = [path]
        else:
            paths = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
        if not paths:
            what = "holds no picture files" if path.is_dir() else "matches no picture"
            raise UserError(f"--images {pattern} {what}; check the path")
        found |= dict.fromkeys(paths)
    return [Picture(path, path.name, path.as_posix()) for path in found]


def caption_pictures(
    model: CaptionModel,
    pictures: list[Picture],
    features: Features | None,
    num_captions: int,
    heads: slice | None,
    out: Path,
    device: torch.device,
) -> list[str]:
    """Write outputs/*.jpg, the page and predictions.json into `out`; return what was wrong with the broken pictures.

    A batch of pictures is read while the one before it is captioned, and no picture is kept.
    """
    torch.manual_seed(model.config.train.seed)  # drawn captions are the same each time
    artist = Artist(model, encoding(model, features, device), pictures, num_captions, heads, out / "outputs")
    found = work_in_turn(artist, pictures, None if features else model.transform)
    if distributed.rank():
        return [str(done) for done in found if isinstance(done, UserError)]
    broken: list[str] = []
    captioned: list[tuple[Picture, list[Caption]]] = []
    bar = tqdm(found, total=len(pictures), desc="captioning", unit="img", disable=distributed.bar_hidden())
    subtitle = f"{model.config.encoder.name} and {model.config.decoder.name}"
    subtitle += "; point at a word to see where the model looked" if heads else ""
    with Gallery(out / PAGE, "Captions", subtitle, attention=heads is not None) as gallery:
        for done in bar:
            if isinstance(done, UserError):
                broken.append(str(done))
            else:
                captioned.append((done.picture, done.captions))
                show(gallery, done, model.config.search.max_length)
        if not captioned:
            raise UserError(f"nothing was captioned: {broken[0]}")
        gallery.score(rate(captioned, model))
    left_out = sorted(set().union(*(undrawable(captions[0].text) for _, captions in captioned)))
    if left_out:
        print(
            f"no font here has {''.join(left_out[:5])}{'…' if len(left_out) > 5 else ''}, left out in the JPGs; "
            "for Chinese: apt install fonts-noto-cjk, or pip install -r requirements-extras.txt"
        )
    rows = [prediction(picture, captions, num_captions) for picture, captions in captioned]
    write_atomically(out / "predictions.json", as_json(rows))
    if len(captioned) <= FEW:
        for picture, captions in captioned:
            print(printable(f"    {picture.name}: {captions[0].text or NO_WORDS}"))
    return broken


def work_in_turn(artist: "Artist", pictures: list[Picture], transform: Transform | None) -> Iterator[Done | UserError]:
    """Yield what has become of all pictures; several processes take turns at the batches."""
    batches = [pictures[first : first + CAPTION_BATCH] for first in range(0, len(pictures), CAPTION_BATCH)]
    mine = [picture for batch in distributed.share(batches) for picture in batch]
    opened = read_ahead(lambda picture: read(picture, transform), mine, CAPTION_BATCH)
    for _ in range(0, len(batches), distributed.size()):  # in the last turn there may be nothing left for some
        yield from distributed.gather(artist(next(opened, [])))


class Artist:
    """Captions opened pictures and writes them as JPGs: with the caption below, and with where the model looked.

    Args:
        pictures: all there are, in whichever process, so that no two get the same file name.
        heads: whose maps are averaged, or None for no second JPG.
    """

    def __init__(
        self,
        model: CaptionModel,
        encode: Callable[[list[Opened]], torch.Tensor],
        pictures: list[Picture],
        num_captions: int,
        heads: slice | None,
        folder: Path,
    ) -> None:
        self.model, self.encode, self.num_captions, self.heads, self.folder = model, encode, num_captions, heads, folder
        taken: set[str] = set()
        self.stems = {picture: unique_name(picture.path.stem, taken) for picture in pictures}
        self.seconds = {stem: unique_name(f"{stem}-attention", taken) for stem in self.stems.values() if heads}
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def __call__(self, batch: list[Opened | UserError]) -> list[Done | UserError]:
        """Return what has become of each picture: it is drawn, or what is wrong with it."""
        good = [item for item in batch if not isinstance(item, UserError)]
        found = iter(self.describe(good))
        done = [item if isinstance(item, UserError) else self.done(item, next(found)) for item in batch]
        jobs = [job for item, each in zip(batch, done, strict=True) for job in self.draw(item, each)]
        for job in jobs:
            job.result()
        return done

    def describe(self, opened: list[Opened]) -> list[list[Caption]]:
        if not opened:
            return []
        return self.model.describe(
            self.encode(opened), num_captions=self.num_captions, keep_attention=self.heads is not None
        )

    def done(self, opened: Opened, captions: list[Caption]) -> Done:
        picture, shown, _ = opened
        texts = [replace(caption, attention=None) for caption in captions]
        file = f"{self.folder.name}/{self.stems[picture]}.jpg"
        return Done(picture, texts, WordMaps.of(captions[0], self.heads), file, shown.size)

    def draw(self, item: Opened | UserError, done: Done | UserError) -> Iterator[Future[None]]:
        if isinstance(item, UserError) or isinstance(done, UserError):
            return
        picture, shown, _ = item
        stem = self.stems[picture]
        yield self.pool.submit(save, draw_caption, shown, done.captions[0].text, self.folder / f"{stem}.jpg")
        if done.look:
            path = self.folder / f"{self.seconds[stem]}.jpg"
            yield self.pool.submit(save, draw_attention, shown, done.look, path)


def encoding(
    model: CaptionModel, features: Features | None, device: torch.device
) -> Callable[[list[Opened]], torch.Tensor]:
    """Return the function from opened pictures to features: looked up where they are known, else computed."""
    if features is not None:
        return lambda batch: features.take([picture.name for picture, _, _ in batch])
    extractor = Extractor(model, device)
    return lambda batch: extractor(torch.stack([pixels for _, _, pixels in batch if pixels is not None]))


def read(picture: Picture, transform: Transform | None) -> Opened | UserError:
    """Open a picture, and transform it where it is to be encoded; of a broken one return the error."""
    try:
        opened = open_picture(picture.path, picture.content)
    except UserError as error:
        return error
    pixels = transform.resize(opened) if transform else None
    opened.thumbnail((LONGEST_SIDE[1], LONGEST_SIDE[1]))
    return picture, opened, pixels


def save(draw: Callable[..., Image.Image], picture: Image.Image, drawn: str | WordMaps, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(picture, drawn).save(path, quality=QUALITY)


def show(gallery: Gallery, done: Done, max_length: int) -> None:
    """Add a picture to the page; where there are several captions, each with how sure the model is of its words."""
    texts = [caption.text for caption in done.captions]
    sure = [per_word(caption, max_length) for caption in done.captions] if len(texts) > 1 else []
    picture = done.picture
    gallery.add(
        done.file, texts, picture.references, size=done.size, name=picture.name, probabilities=sure, looks=done.look
    )


def per_word(caption: Caption, max_length: int) -> float:
    """Return the geometric mean of the probabilities of a caption's words and of its end, where it has one."""
    return math.exp(caption.log_prob / min(len(caption.words) + 1, max_length))


def rate(captioned: list[tuple[Picture, list[Caption]]], model: CaptionModel) -> list[float | None]:
    """Return the CIDEr-D x100 of each picture's best caption; none where there are not two pictures with references."""
    references = {picture.name: picture.references for picture, _ in captioned if picture.references}
    if len(references) < 2:
        return []
    best = {picture.name: captions[0].text for picture, captions in captioned}
    tokenise = partial(metrics.by_words, model.vocab.tokenise)
    return metrics.score(best, references, tokenise).cider.tolist()


def prediction(picture: Picture, captions: list[Caption], num_captions: int) -> dict[str, Any]:
    """Return a row of COCO's results form, with all captions where more than one was asked for."""
    row: dict[str, Any] = {"image_id": picture.image_id, "caption": captions[0].text}
    if num_captions > 1:
        row["captions"] = [{"caption": caption.text, "log_prob": round(caption.log_prob, 4)} for caption in captions]
    return row


def unique_name(stem: str, taken: set[str]) -> str:
    """Return `stem`, numbered when a file from another folder has it; file systems may not tell cases apart."""
    numbered = (f"{stem}-{number}" for number in itertools.count(2))
    name = next(name for name in itertools.chain([stem], numbered) if name.lower() not in taken)
    taken.add(name.lower())
    return name


if __name__ == "__main__":
    sys.exit(run_script(main))
