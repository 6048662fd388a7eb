"""What the speed benchmark works on: pictures and captions as large, as long and as many-worded as Flickr8k's.

Speed does not depend on what is in them, so nothing has to be downloaded: colours are smooth noise, words have Zipf's
frequencies, and the backbone's weights are random. What is learned from them may write on and on, so that captions are
cut at the length at which a trained model's end: search takes time by the word, and how many there were is told.
"""

import csv
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config, load_config
from data import annotations
from data.dataset import Features, Flickr8kDataset
from data.vocab import build_vocab
from data.words import Words, cut_afresh
from models.model import CaptionModel
from train import Trainer

SIZE = (500, 375)  # pixels, as Flickr gives them
CAPTIONS = 30000  # of Flickr8k's training pictures: what the vocabulary is made of
WORDS, EXPONENT = 7999, 1.24  # of which some 2,500 come five times in as many captions, as Flickr8k's do
LENGTH, SPREAD = 10.8, 3.8  # mean and standard deviation of the words in a caption of Flickr8k
LONGEST = 13  # words written: Flickr8k's have 11 on average, and the last beams of a batch go on for longer
EACH = 5  # captions of a picture
VALIDATION = 20  # pictures
DECODERS: dict[str, Sequence[str]] = {  # as configs/ trains them
    "lstm": (),
    "attention": ("decoder.name=attention", "train.doubly_stochastic=1"),
    "transformer": (
        *("decoder.name=transformer", "decoder.hidden_size=1024", "decoder.num_layers=3", "decoder.dropout=0.3"),
    ),
}


def make_words(captions: int, rng: np.random.Generator, different: int = WORDS) -> Words:
    """Return the words of so many captions, `different` ones at most."""
    lengths = np.clip(rng.normal(LENGTH, SPREAD, captions), 4, 30).astype(int)  # (captions,)
    letters = np.array(list("abcdefghijklmnopqrst"))
    lexicon = ["".join(letters[[rank // 400, rank // 20 % 20, rank % 20]]) for rank in range(different + 1)]
    return Words(lexicon, np.minimum(rng.zipf(EXPONENT, lengths.sum()), different).astype(np.int32), np.cumsum(lengths))


def write_dataset(root: Path, pictures: int, drawn: int) -> list[Path]:
    """Write captions of so many pictures, their split lists, and JPEGs, whose paths are returned.

    The files of pictures with captions but the drawn ones are empty.
    """
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True, exist_ok=True)
    names = [f"{number:06}.jpg" for number in range(pictures)]
    paths = [root / "images" / f"{number:06}.jpg" for number in range(max(pictures, drawn))]
    for path in paths[:drawn]:
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
    for path in paths[drawn:]:
        path.touch()
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for caption, words in enumerate(make_words(pictures * EACH, rng)):
            writer.writerow([names[caption // EACH], " ".join(words)])
    for split, part in (("train", names[VALIDATION:]), ("dev", names[:VALIDATION])):
        (root / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part) + "\n")
    return paths[:drawn]


def make_config(root: Path, *overrides: str) -> Config:
    own = (
        *(f"data.root={root}", f"data.cache={root / 'cache'}", "encoder.weights=null"),
        *("train.log_every=100000", "train.checkpoint_every=100000", f"search.max_length={LONGEST}"),
    )
    return load_config(overrides=[*own, *overrides])


def make_trainer(root: Path, device: torch.device, decoder: str = "lstm") -> tuple[Trainer, Flickr8kDataset]:
    """Return a trainer and its train captions, whose features are random rows of a file."""
    config = make_config(root, *DECODERS[decoder])
    table = annotations.load(config.data)
    words = cut_afresh(table["caption"].tolist(), "en")
    known = make_words(CAPTIONS, np.random.default_rng(0)).count()  # however few captions there are
    model = CaptionModel.build(config, build_vocab(known, config.data.min_count, "en")).to(device)
    names = table["image"].unique().tolist()
    features = Features([random_rows(root, (len(names), *model.encoder.feature_shape))], names)
    features.move(device)
    train, val = (
        Flickr8kDataset(table[here], model.vocab, Path(), model.transform, features, words=words.of(here.to_numpy()))
        for here in (table["split"] == split for split in ("train", "val"))
    )
    model.fit_statistics(features.take(names[:200]))
    return Trainer(model, train, val, {}, root / "run", device), train


def random_rows(root: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return fp16 rows that lie in a file, made where it is not there yet."""
    path = root / f"features-{len(shape)}.npy"
    if not path.is_file():
        rows = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        rng = np.random.default_rng(0)
        for row in rows:
            row[:] = rng.random(row.shape, dtype=np.float32)
        rows.flush()
    return torch.from_numpy(np.load(path, mmap_mode="c"))


class PeakMemory:
    """`with PeakMemory() as peak:` measures the most memory this process has of its own meanwhile, as `peak.gb`.

    Pages of files that it maps, such as features, are not counted. Only Linux tells the two apart: elsewhere None.
    """

    def __init__(self) -> None:
        self.gb: float | None = None
        self.over = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self.watch.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.watch.join()

    def look(self) -> None:
        told = Path("/proc/self/status")
        while told.is_file():
            [now] = re.findall(r"RssAnon:\s+(\d+) kB", told.read_text())
            self.gb = max(self.gb or 0, int(now) * 1024 / 1e9)
            if self.over.wait(0.05):
                return
