"""Caption pictures with a trained run: JPGs with their captions, a page to browse them, and predictions.json.

python inference_visualize.py                              the held-out pictures of the newest run
python inference_visualize.py holiday/ 'cats/*.jpg' --out holiday_captions
"""

from cli import UserError, answer_early, note, options, run_script, say

if __name__ == "__main__":
    answer_early(options.inference_visualize, "PyTorch")  # --help and mistakes, before PyTorch is imported

import argparse
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from captioning import Captioner, Encoded, Picture, doubt, feature_cache, prediction
from data.features import Features, Files
from data.folders import image_folders, pictures_at, plural
from models.ensemble import refuse_homeless
from models.model import Caption, CaptionModel
from render import gallery
from render.attention import AttentionMaps, draw_attention
from render.caption import NO_WORDS, draw_caption
from render.fonts import advice, undrawable
from render.texts import embed, own_file, own_folder, write_sidecars, write_tables
from utils import LANGUAGES, PRETRAINED, as_json, find_run, knows_photographs, unique_name, write_atomically

PAGE = "captions_result.html"
QUALITY = 88  # of JPEGs
PATIENCE = 5  # seconds without a word


def main() -> None:
    args, began = options.inference_visualize(), time.monotonic()
    checkpoints = choose_checkpoints(args)
    if not args.images:
        refuse_homeless(checkpoints, args.out)
    captioner = Captioner.load(checkpoints, args.overrides)
    model, named = captioner.model, ", ".join(map(str, checkpoints))
    heads = choose_heads(args.attention, model.decoder.heads, named)
    if args.images:
        pictures, features, out = find_pictures(args.images), None, Path(args.out or ".")
    else:
        run = Path(checkpoints[0]).parent
        pictures, features = split_pictures(model, args.split, run)
        out = Path(args.out or run)
    pictures = pictures[: args.limit]
    source = "cached features" if features else f"{model.config.encoder.name} on {model.device.type}"
    note(f"captioning {plural(len(pictures), 'picture', 'pictures')} with {named} ({source})")
    if args.images and not (args.checkpoint or args.run or args.language) and checkpoints != [PRETRAINED]:
        note("this is the newest run; --language en takes the captioner in pretrained/")

    torch.manual_seed(model.config.train.seed)  # drawn captions are the same each time
    captioned, skipped = draw_captions(out, captioner, pictures, features, heads, args.num_captions)
    show(captioned)
    texts = [(item.path, str(item.image_id), captions) for item, captions in captioned]
    tables = list(write_tables(out, texts))
    for reason in skipped:
        note(f"skipped: {reason}")
    if args.sidecars:
        for line in write_sidecars(texts, args.existing):
            note(line)
    if args.embed:
        for line in embed(texts, own_folder(out / "captioned") if args.embed == "copies" else None, args.existing):
            note(line)
    note(f"wrote captions of {plural(len(captioned), 'picture', 'pictures')} in {time.monotonic() - began:.0f} s:")
    files = ", ".join(str(out / name) for name in ["predictions.json", *tables, "outputs/*.jpg"])
    note(f"    {out / PAGE} (open it in a browser), {files}")


def show(captioned: list[tuple[Picture, list[Caption]]]) -> None:
    """Print the captions: for people in a terminal, for programs a line with tabs for each picture."""
    for picture, captions in captioned:
        texts = [each.text or NO_WORDS for each in captions]
        if not sys.stdout.isatty():
            say(str(picture.image_id), *texts)
            continue
        unsure = doubt(captions[0])
        say(f"    {picture.name}: {texts[0]}{f' ({unsure})' if unsure else ''}")
        for text in texts[1:]:
            say(f"        or: {text}")
    doubts = [(picture.name, doubt(best)) for picture, (best, *_) in captioned if doubt(best)]
    if doubts and not sys.stdout.isatty():
        name, unsure = doubts[0]
        note(f"unsure of {len(doubts):,} of {len(captioned):,} captions, such as that of {name} ({unsure})")


def choose_checkpoints(args: argparse.Namespace) -> list[str | Path]:
    """Return those named, or the newest run's: for --images, a run that knows photographs, or else pretrained/."""
    if args.checkpoint:
        return list(args.checkpoint)
    if args.language:
        return [LANGUAGES[args.language]]
    if args.run or not args.images:
        return [find_run("checkpoints.pth", args.run) / "checkpoints.pth"]
    try:
        return [find_run("checkpoints.pth", accept=knows_photographs) / "checkpoints.pth"]
    except UserError:  # there is none
        return [PRETRAINED]


def choose_heads(asked: str | None, heads: int, named: str) -> slice | None:
    """Return the attention heads to be averaged, None if none was asked for; raises UserError where there is none."""
    if asked is None:
        return None
    if not heads:
        raise UserError(
            f"--attention: {named} writes without attention; take a run of configs/attention.yaml, or "
            "--checkpoint pretrained/captioner.pth, or leave --attention out"
        )
    if asked == options.MEAN:
        return slice(None)
    if asked not in map(str, range(1, heads + 1)):
        raise UserError(f"--attention {asked}: {named} has heads 1 to {heads}; name one, or give --attention alone")
    return slice(int(asked) - 1, int(asked))


def find_pictures(patterns: list[str]) -> list[Picture]:
    """Return the pictures named by paths, folders (with all below) and globs, each once; prints what is not taken."""
    found = dict[Path, None]()
    for pattern in patterns:
        paths, notes = pictures_at(pattern)
        found |= dict.fromkeys(paths)
        for line in notes:
            note(line)
    return [Picture(path, path.name, path.as_posix()) for path in found]


def split_pictures(model: CaptionModel, split: str | None, run: Path) -> tuple[list[Picture], Features | None]:
    """Return the pictures of a split of the model's own dataset, and their features where all are in the cache."""
    from data import annotations, splits  # with pandas, which one's own pictures do not need

    data = model.config.data
    table = annotations.load(data, splits.read_splits(run))
    _, chosen = splits.choose_split(table, split, data.source)
    folders = image_folders(data)
    ids = dict(chosen[["image", "image_id"]].to_numpy().tolist())  # plain values, for JSON
    pictures = [
        Picture(folders.path(image), image, ids[image], tuple(captions))
        for image, captions in annotations.references(chosen).items()
    ]
    if not model.config.encoder.frozen:
        return pictures, None
    return pictures, feature_cache(model).find(*Files.group((picture.name for picture in pictures), folders))


def draw_captions(
    out: Path, captioner: Captioner, pictures: list[Picture], known: Features | None, heads: slice | None, number: int
) -> tuple[list[tuple[Picture, list[Caption]]], list[str]]:
    """Write `number` captions of each picture: outputs/*.jpg, the page and predictions.json in the folder `out`.

    `known` are the features of all pictures, if they are cached. With `heads`, a second JPG shows their mean attention.
    Returns the captions, and what was wrong with pictures that could not be read; raises UserError where that was all.
    """
    config, folder, taken = captioner.model.config, out / "outputs", dict[str, int]()  # no two files share a name
    stems = {picture: unique_name(picture.path.stem, taken) for picture in pictures}
    attention_stems = {picture: unique_name(stem, taken, "-attention") for picture, stem in stems.items()}

    def draw(item: Encoded, captions: list[Caption]) -> dict[str, Any]:
        """Write the JPGs of a picture and return its row of the page."""
        picture, best = item.picture, captions[0]
        save(draw_caption(item.shown, best.text), folder / f"{stems[picture]}.jpg")
        attention = AttentionMaps.of(best, heads) if heads else None
        if attention:
            save(draw_attention(item.shown, attention), folder / f"{attention_stems[picture]}.jpg")
        return gallery.row(
            f"{folder.name}/{stems[picture]}.jpg",
            [each.text for each in captions],
            picture.references,
            size=item.shown.size,
            name=picture.name,
            doubt=doubt(best),
            attention=attention,
        )

    skipped, rows = list[str](), list[dict[str, Any]]()
    done = list[tuple[Picture, list[Caption]]]()
    bar = tqdm(total=len(pictures), desc="captioning", unit="img", disable=None)
    seen, told = 0, time.monotonic()

    def count_read() -> None:
        """Move the bar when a picture is read; without a terminal, say every few seconds how many are."""
        nonlocal seen, told
        seen += 1
        bar.update()
        if bar.disable and time.monotonic() - told > PATIENCE:
            told = time.monotonic()
            note(f"read {seen:,} of {plural(len(pictures), 'picture', 'pictures')}")

    batches = captioner.caption_pictures(pictures, known, number, heads is not None, count_read)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        for captioned, errors in batches:
            if captioned and not done:
                folder = own_folder(folder)
            rows += pool.map(draw, *zip(*captioned, strict=True)) if captioned else []
            done += [(item.picture, without_attention(each)) for item, each in captioned]
            skipped += map(str, errors)
    if not done:
        others = f", as {len(skipped) - 1:,} more" if len(skipped) > 1 else ""
        raise UserError(f"nothing was captioned: {skipped[0]}{others}")
    texts = [best.text for _, (best, *_) in done]
    subtitle = f"{config.encoder.name} and {config.decoder.name}"
    subtitle += "; point at a word to see its attention" if heads else ""
    page = gallery.page("Captions", subtitle, rows, rate([picture for picture, _ in done], texts, captioner.model))
    write_atomically(own_file(out / PAGE, "<title>Captions</title>"), page.encode())
    predictions = [prediction(picture.image_id, captions, number) for picture, captions in done]
    write_atomically(own_file(out / "predictions.json", '"image_id":'), as_json(predictions))
    missing = set[str]().union(*map(undrawable, texts))
    lacking = "".join(dict.fromkeys(each for each in "".join(texts) if each in missing))
    if lacking:
        note(
            f"no font here can write {lacking[:5]}{'…' if len(lacking) > 5 else ''}, left out in the JPGs; "
            f"{advice(lacking)}"
        )
    return done, skipped


def save(drawing: Image.Image, path: Path) -> None:
    """Write a JPG; raises UserError where the disk cannot take it, and leaves no part of it there."""
    content = io.BytesIO()  # Pillow itself does not see that a disk took only a part
    drawing.save(content, "JPEG", quality=QUALITY)
    try:
        path.write_bytes(content.getvalue())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; make room there, or choose another place with --out"
        ) from None


def without_attention(captions: list[Caption]) -> list[Caption]:
    """Return captions without their attention, which takes memory and has been drawn."""
    return [replace(each, attention=None) for each in captions]


def rate(pictures: list[Picture], captions: list[str], model: CaptionModel) -> list[float]:
    """Return the CIDEr-D x100 of each picture's caption; none unless there are two pictures, with references, and none
    of the sample, whose few words make even wrong captions score high.
    """
    if len(pictures) < 2 or not pictures[0].references or model.config.data.format == "sample":
        return []
    import metrics  # with NLTK and the scorer

    references = {picture.name: picture.references for picture in pictures}
    best, tokenise = dict(zip(references, captions, strict=True)), metrics.batched(model.vocab.tokenise)
    scores = metrics.evaluate(best, references, tokenise, model.config.data.language, ["cider"])
    return scores.per_image["cider"].tolist()


if __name__ == "__main__":
    raise SystemExit(run_script(main))
