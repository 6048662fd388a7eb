"""What benchmarks/folders.py measures: made-up folders of pictures, and what is done with them apart from the networks.

Each step makes ready what it needs in a folder, of so many pictures, and returns the work to be measured.
"""

import csv
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from PIL import Image

import inference_visualize
from benchmarks.memory import ROOT
from benchmarks.web import memory_of, open_chromium, processor_time_of
from benchmarks.workload import EACH, make_captions
from captioning import SEARCH_BATCH, Encoded, Picture
from cli import UserError
from config import load_config
from data import annotations, splits
from data.dataset import Flickr8kDataset, make_batches
from data.features import FeatureCache, Files
from data.folders import ImageFolders, pictures_at
from data.tokens import tokenise
from data.transforms import Transform
from data.vocab import build_vocab
from models.model import Caption
from render import gallery
from render.texts import write_sidecars, write_tables
from training.setup import index_images
from utils import unique_name

IN_FOLDER = 100  # pictures of each folder where many folders have pictures of the same names
LINKS = 10_000  # to one file: file systems allow no more than so many

Work = Callable[[], Any]


def write_folders(root: Path, count: int) -> None:
    """Write two datasets of so many pictures with five captions each: `flat`, of one folder with names that differ, and
    `equal`, of folders with the same names in each, whose table writes images/ before them.
    """
    rng = np.random.default_rng(0)
    captions = make_captions(EACH * count, rng)
    flat = [f"{number:06}.jpg" for number in range(count)]
    equal = [f"{number // IN_FOLDER:04}/{number % IN_FOLDER:04}.jpg" for number in range(count)]
    for dataset, names, before in (("flat", flat, ""), ("equal", equal, "images/")):
        folder = root / dataset / "images"
        for name in dict.fromkeys(name.rpartition("/")[0] for name in names):
            (folder / name).mkdir(parents=True)
        for number, name in enumerate(names):
            file = root / f"{number // LINKS}.jpg"
            if not file.is_file():
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
            os.link(file, folder / name)
        with open(root / dataset / "captions.csv", "w", newline="") as table:
            rows = ((f"{before}{names[row // EACH]}", text) for row, text in enumerate(captions))
            csv.writer(table).writerows([("image", "caption"), *rows])


def find(root: Path, dataset: str = "flat") -> list[Picture]:
    return inference_visualize.find_pictures([str(root / dataset / "images")])


def captioned(root: Path) -> list[tuple[Picture, list[Caption]]]:
    """Return the pictures of `flat`, each with a made-up caption."""
    pictures = find(root)
    texts = make_captions(len(pictures), np.random.default_rng(0))
    return [
        (each, [Caption(text, tuple(text.split()), -9.0, -2.0)]) for each, text in zip(pictures, texts, strict=True)
    ]


def load(root: Path, dataset: str = "flat") -> pd.DataFrame:
    return annotations.load(load_config(overrides=[f"data.root={root / dataset}"]).data)


def name_drawings(root: Path, count: int) -> Work:
    def work() -> list[str]:
        taken = dict[str, int]()
        return [unique_name(each.path.stem, taken) for each in find(root, "equal")]

    return work


def find_splits(root: Path, count: int) -> Work:
    table = load(root, "equal")
    saved, moved = splits.splits_of(table), [f"moved/{name}" for name in table["image"].unique()]
    return lambda: splits.find_again(saved, moved)


def make_dataset(root: Path, count: int) -> Work:
    table = load(root)

    def work() -> None:
        tokens = tokenise(table["caption"].tolist(), "en")
        vocab, (images, image_of) = build_vocab(tokens.count()), index_images(table)
        numbers, folders = tokens.numericalize(vocab), ImageFolders({"": root})
        dataset = Flickr8kDataset(images, image_of, numbers, vocab, folders, Transform(32))
        for by_image in (False, True):
            make_batches(dataset, 64, by_image, np.random.default_rng(0))

    return work


def look_up(root: Path, count: int) -> Work:
    """Find the features of all pictures in the cache, where an extractor that opens no picture has put them."""
    encoder = SimpleNamespace(identity={"name": "stand-in"}, spatial=False, feature_shape=(4,))
    extractor: Any = SimpleNamespace(encoder=encoder, transform=Transform(32), precision="fp32")
    extractor.encode = lambda openers, view: ([torch.zeros(4, dtype=torch.float16)] for _ in openers)
    cache = FeatureCache(root / "cache", extractor, rows_per_file=2000)
    names = [each.name for each in find(root)]
    folders = ImageFolders({"": root / "flat" / "images"})
    cache.fill(*Files.group(names, folders))
    return lambda: cache.fill(*Files.group(names, folders))


def write_results(root: Path, count: int) -> Work:
    """Write all that inference_visualize.py writes, but for the JPGs: the page, predictions.json and the tables."""
    shown, row = Image.new("RGB", (32, 32)), torch.zeros(1)
    items = [(Encoded(picture, shown, row), captions) for picture, captions in captioned(root)]
    batches = [(items[first : first + SEARCH_BATCH], list[UserError]()) for first in range(0, count, SEARCH_BATCH)]
    config = SimpleNamespace(encoder=SimpleNamespace(name="resnet50"), decoder=SimpleNamespace(name="lstm"))
    captioner: Any = SimpleNamespace(model=SimpleNamespace(config=config), caption_pictures=lambda *_: iter(batches))
    drawn = SimpleNamespace(save=lambda *_, **__: None)

    def work() -> None:
        with mock.patch.object(inference_visualize, "draw_caption", return_value=drawn):
            pictures = [item.picture for item, _ in items]
            done, _ = inference_visualize.draw_captions(root / "out", captioner, pictures, None, None, 1)
        list(write_tables(root / "out", [(each.path, str(each.image_id), texts) for each, texts in done]))

    return work


def write_texts(root: Path, count: int) -> Work:
    texts = [(picture.path, str(picture.image_id), captions) for picture, captions in captioned(root)]
    return lambda: list(write_sidecars(texts, "overwrite"))


def open_page(root: Path, count: int, query: str = "") -> Work:
    """Show a page with five references for each picture until there are cards, or search it: what Chromium takes."""
    references = make_captions(EACH * count, np.random.default_rng(1))
    rows = [
        gallery.row(item.name, [best.text], references[EACH * n : EACH * (n + 1)], size=(32, 32), name=item.name)
        for n, (item, [best]) in enumerate(captioned(root))
    ]
    (root / "page.html").write_text(gallery.page("Captions", "", rows), encoding="utf-8")

    def work() -> dict[str, float]:
        with open_chromium() as (page, _):
            page.goto((root / "page.html").as_uri(), wait_until="commit")
            page.wait_for_selector("article")
            before = processor_time_of(page) if query else 0
            if query:
                page.fill("input", query)
                page.wait_for_function("document.querySelector('output').textContent.includes(' of ')")
            return {"seconds": round(processor_time_of(page) - before, 3), "memory_mb": memory_of(page)}

    return work


def start(root: Path, count: int) -> Work:
    """Caption one picture of the folder, by the whole command."""
    words = ["--language", "en", "--limit", "1", "--out", "started", "--images", "flat/images"]

    def work() -> dict[str, float]:
        subprocess.run(
            [sys.executable, ROOT / "inference_visualize.py", *words], cwd=root, check=True, capture_output=True
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {"seconds": round(used.ru_utime + used.ru_stime, 2), "memory_mb": round(used.ru_maxrss / 1e3)}

    return work


STEPS: dict[str, tuple[str, Callable[[Path, int], Work]]] = {  # what each is called, and what makes it
    "list": ("listing a folder", lambda root, _: lambda: pictures_at(str(root / "flat" / "images"))),
    "glob": ("the pictures of a pattern, `*.jpg`", lambda root, _: lambda: pictures_at(f"{root}/flat/images/*.jpg")),
    "name": ("naming drawings, where many folders have an 0001.jpg", name_drawings),
    "table": ("reading captions.csv and finding its pictures", lambda root, _: lambda: load(root)),
    "table-equal": (
        "reading captions.csv, where many folders have an 0001.jpg",
        lambda root, _: lambda: load(root, "equal"),
    ),
    "splits-equal": ("finding saved splits again, where many folders have an 0001.jpg", find_splits),
    "dataset": ("tokens, vocabulary, dataset and batches of two epochs", make_dataset),
    "cache": ("looking up cached features", look_up),
    "results": ("writing the page, predictions.json and tables", write_results),
    "sidecars": ("writing a .txt beside each picture", write_texts),
    "page": ("opening the page in Chromium", open_page),
    "search": ("searching the page", partial(open_page, query="aab")),
    "start": ("`inference_visualize.py --limit 1`, all of it", start),
}
