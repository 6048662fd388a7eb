"""Measure what folders of 1,000, 10,000 and 100,000 pictures cost apart from the networks: listing, tables, pages.

`python -m benchmarks.folders` takes some fifteen minutes on two cores and writes benchmarks/results/folders.json: the
processor time of each step, the memory that it takes at its peak beyond what the process had before (on Linux), and the
slope from 10,000 pictures to 100,000, by which cost grows as pictures ** slope: 1.0 is linear. The pictures are links
to one small JPEG, the captions are made up. Each step has a process of its own. Chromium and playwright are needed for
the page alone.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import csv
import json
import math
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from PIL import Image

import inference_visualize
from benchmarks.memory import ROOT
from benchmarks.recipes import environment
from benchmarks.web import memory_of, open_chromium
from benchmarks.workload import EACH, make_captions
from captioning import SEARCH_BATCH, Captioner, Encoded, Picture
from config import DataConfig, load_config
from data import annotations, splits
from data.dataset import Flickr8kDataset, make_batches
from data.features import Extractor, FeatureCache, Files, Opener
from data.folders import ImageFolders, image_folders, pictures_at
from data.tokens import tokenise
from data.transforms import WHOLE, Transform, View
from data.vocab import build_vocab
from inference_visualize import draw_captions, find_pictures
from models.model import Caption
from render import gallery
from render.texts import write_sidecars, write_tables
from training.setup import index_images
from utils import unique_name, write_atomically

OUT = Path(__file__).parent / "results" / "folders.json"
SIZES = (1_000, 10_000, 100_000)
IN_FOLDER = 100  # pictures of each folder where many folders have pictures of the same names
LINKS = 10_000  # to one file: file systems allow no more than so many
HIDDEN = mock.Mock(save=lambda *_, **__: None)  # in the place of a drawn JPG

Work = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="pictures, ascending")
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS), metavar="STEP")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/folders.json")
    parser.add_argument("--one", nargs=3, metavar=("STEP", "FOLDER", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        step, folder, count = args.one
        print(json.dumps(measure(STEPS[step](Path(folder), int(count)))))
        return
    steps: dict[str, list[dict[str, float]]] = {step: [] for step in args.steps}
    for count in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_folders(Path(folder), count)
            for step, found in steps.items():
                command = [sys.executable, "-m", "benchmarks.folders", "--one", step, folder, str(count)]
                printed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
                found.append(json.loads(printed.splitlines()[-1]))
                print(f"{step:16} {count:9,} pictures: {found[-1]}", flush=True)
    result = {
        "environment": environment(),
        "pictures": list(args.sizes),
        "steps": {step: as_columns(found, args.sizes) for step, found in steps.items()},
    }
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def as_columns(found: list[dict[str, float]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the figures of a step by size, and the slope between the last two sizes."""
    seconds, memory = ([each[name] for each in found] for name in ("seconds", "memory_mb"))
    growth = [math.log(seconds[-1] / seconds[-2]) / math.log(sizes[-1] / sizes[-2])] if len(sizes) > 1 else []
    return {"seconds": seconds, "memory_mb": memory, "slope": round(growth[0], 2) if growth else None}


def measure(work: Work) -> dict[str, float]:
    """Return the processor time of some work, and the MB by which its peak lies above what the process had before;
    work in another process returns these itself.
    """
    before, began = reset_peak(), time.process_time()
    found = work()
    took = time.process_time() - began
    if isinstance(found, dict) and "seconds" in found:
        return found
    return {"seconds": round(took, 4), "memory_mb": round(max(0.0, peak() - before), 1)}


def reset_peak() -> float:
    """Let the peak of this process's memory begin anew, where Linux does that; returns the MB that it has now."""
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        clear.write_text("5")
    return peak()


def peak() -> float:
    if Path("/proc/self/status").is_file():
        return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1000
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


# ---- what is measured on ---------------------------------------------------------------------------------------------


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


def captioned(root: Path, dataset: str) -> list[tuple[Picture, list[Caption]]]:
    """Return the pictures of a dataset, each with a made-up caption."""
    pictures = find_pictures([str(root / dataset / "images")])
    texts = make_captions(len(pictures), np.random.default_rng(0))
    return [
        (each, [Caption(text, tuple(text.split()), -9.0, -2.0)]) for each, text in zip(pictures, texts, strict=True)
    ]


def list_pictures(root: Path, count: int) -> Work:
    return lambda: pictures_at(str(root / "flat" / "images"))


def match_glob(root: Path, count: int) -> Work:
    return lambda: pictures_at(f"{root}/flat/images/*.jpg")


def name_drawings(root: Path, count: int) -> Work:
    taken = dict[str, int]()
    return lambda: [unique_name(each.path.stem, taken) for each in find_pictures([str(root / "equal" / "images")])]


def config_of(root: Path, dataset: str) -> DataConfig:
    return load_config(overrides=[f"data.root={root / dataset}"]).data


def read_table(root: Path, count: int, dataset: str) -> Work:
    config = config_of(root, dataset)
    return lambda: annotations.load(config)


def find_splits(root: Path, count: int) -> Work:
    table = annotations.load(config_of(root, "equal"), need_pictures=False)
    saved = splits.splits_of(table)
    moved = [f"moved/{name.removeprefix('images/')}" for name in table["image"].unique()]
    return lambda: splits.find_again(saved, moved)


def make_dataset(root: Path, count: int) -> Work:
    table = annotations.load(config_of(root, "flat"))

    def work() -> None:
        tokens = tokenise(table["caption"].tolist(), "en")
        vocab = build_vocab(tokens.count())
        images, image_of = index_images(table)
        numbers, folders = tokens.numericalize(vocab), ImageFolders({"": root})
        dataset = Flickr8kDataset(images, image_of, numbers, vocab, folders, Transform(32))
        make_batches(dataset, 64, by_image=False, rng=np.random.default_rng(0))
        make_batches(dataset, 64, by_image=True, rng=np.random.default_rng(0))

    return work


class StandIn(Extractor):
    """Makes rows of zeros without opening a picture."""

    def encode(self, openers: Iterable[Opener], view: View = WHOLE) -> Iterator[list[torch.Tensor | UserError]]:
        yield from ([torch.zeros(4, dtype=torch.float16)] for _ in openers)


def look_up(root: Path, count: int) -> Work:
    encoder = SimpleNamespace(identity={"name": "stand-in"}, spatial=False, feature_shape=(4,))
    extractor = StandIn(encoder, Transform(32), torch.float32, torch.device("cpu"), root)
    cache = FeatureCache(root / "cache", extractor, rows_per_file=2000)
    folders = image_folders(config_of(root, "flat"))
    names = [path.name for path in pictures_at(str(root / "flat" / "images"))[0]]
    cache.fill(*Files.group(names, folders))
    return lambda: cache.fill(*Files.group(names, folders))


def write_results(root: Path, count: int) -> Work:
    """Write all that inference_visualize.py writes, but for the JPGs: the page, predictions.json and the tables."""
    shown, row = Image.new("RGB", (32, 32)), torch.zeros(1)
    items = [(Encoded(picture, shown, row), captions) for picture, captions in captioned(root, "flat")]
    batches = [(items[first : first + SEARCH_BATCH], list[UserError]()) for first in range(0, count, SEARCH_BATCH)]
    names = SimpleNamespace(encoder=SimpleNamespace(name="resnet50"), decoder=SimpleNamespace(name="lstm"))
    captioner = SimpleNamespace(model=SimpleNamespace(config=names), caption_pictures=lambda *_: batches)

    def work() -> None:
        with mock.patch.object(inference_visualize, "draw_caption", return_value=HIDDEN):
            pictures = [item.picture for item, _ in items]
            done, _ = draw_captions(root / "out", cast(Captioner, captioner), pictures, None, None, 1)
            list(write_tables(root / "out", [(each.path, str(each.image_id), texts) for each, texts in done]))

    return work


def write_texts(root: Path, count: int) -> Work:
    texts = [(picture.path, str(picture.image_id), captions) for picture, captions in captioned(root, "flat")]
    return lambda: list(write_sidecars(texts, "overwrite"))


def open_page(root: Path, count: int, query: str | None = None) -> Work:
    """Return the figures of the process in which Chromium shows the page: until there are cards, or for a search."""
    references = make_captions(EACH * count, np.random.default_rng(1))
    rows = [
        gallery.row(
            each.path.name, [best.text], references[EACH * n : EACH * (n + 1)], size=(32, 32), name=each.path.name
        )
        for n, (each, [best]) in enumerate(captioned(root, "flat"))
    ]
    page = root / "page.html"
    page.write_text(gallery.page("Captions", "", rows), encoding="utf-8")
    return lambda: watch_page(page, query)


def watch_page(path: Path, query: str | None) -> dict[str, float]:
    with open_chromium() as (page, _):
        page.goto(path.as_uri(), wait_until="commit")
        page.wait_for_selector("article")
        before = 0.0
        if query:
            before = renderer_seconds(page)
            page.fill("input", query)
            page.wait_for_function("document.querySelector('output').textContent.includes(' of ')")
        return {"seconds": round(renderer_seconds(page) - before, 3), "memory_mb": memory_of(page)}


def renderer_seconds(page: Any) -> float:
    """Return the processor time of the processes of Chromium which show pages."""
    processes = page.context.browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(process["cpuTime"] for process in processes if process["type"] == "renderer")


def start(root: Path, count: int) -> Work:
    """Run inference_visualize.py on one picture of the folder."""
    words = ["--images", str(root / "flat" / "images"), "--limit", "1", "--out", str(root / "started")]
    command = [sys.executable, str(ROOT / "inference_visualize.py"), "--language", "en", *words]

    def work() -> dict[str, float]:
        subprocess.run(command, cwd=root, check=True, capture_output=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        unit = 1e6 if sys.platform == "darwin" else 1e3
        return {"seconds": round(used.ru_utime + used.ru_stime, 2), "memory_mb": round(used.ru_maxrss / unit)}

    return work


STEPS: dict[str, Callable[[Path, int], Work]] = {
    "list": list_pictures,
    "glob": match_glob,
    "name": name_drawings,
    "table": partial(read_table, dataset="flat"),
    "table-equal": partial(read_table, dataset="equal"),
    "splits-equal": find_splits,
    "dataset": make_dataset,
    "cache": look_up,
    "results": write_results,
    "sidecars": write_texts,
    "page": open_page,
    "search": partial(open_page, query="aab"),
    "start": start,
}


if __name__ == "__main__":
    raise SystemExit(run_script(main))
