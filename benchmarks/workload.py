"""What the speed benchmark works on: pictures and captions as large, as long and as many-worded as Flickr8k's.

Speed does not depend on what is in them, so nothing has to be downloaded: colours are smooth noise, words have Zipf's
frequencies, and the backbone's weights are random.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from config import Config, load_config
from data import annotations
from data.dataset import Features, Flickr8kDataset
from data.vocab import build_vocab
from data.words import cut_afresh
from models.model import CaptionModel
from train import Trainer

SIZE = (500, 375)  # pixels, as Flickr gives them
WORDS = 7999  # of which some 2,500 come five times in 30,000 captions
LENGTH, SPREAD = 10.8, 3.8  # mean and standard deviation of the words in a caption of Flickr8k
EACH = 5  # captions of a picture
VALIDATION = 20  # pictures


def write_dataset(root: Path, pictures: int, drawn: int) -> None:
    """Write captions of so many pictures, the first of which are drawn, and the split lists."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True, exist_ok=True)
    names = [f"{number:06}.jpg" for number in range(pictures)]
    for name in names[:drawn]:
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(small).resize(SIZE, Image.Resampling.BICUBIC).save(root / "images" / name, quality=90)
    for name in names[drawn:]:
        (root / "images" / name).touch()
    lengths = np.clip(rng.normal(LENGTH, SPREAD, pictures * EACH), 4, 30).astype(int)
    ranks = np.minimum(rng.zipf(1.3, lengths.sum()), WORDS)
    letters = np.array(list("abcdefghijklmnopqrst"))
    lexicon = ["".join(letters[[rank // 400, rank // 20 % 20, rank % 20]]) for rank in range(WORDS + 1)]
    with open(root / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer, end = csv.writer(file), 0
        writer.writerow(["image", "caption"])
        for caption, length in enumerate(lengths):
            words = [lexicon[rank] for rank in ranks[end : end + length]]
            writer.writerow([names[caption // EACH], " ".join(words)])
            end += length
    for split, part in (("train", names[VALIDATION:]), ("dev", names[:VALIDATION])):
        (root / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part) + "\n")


def make_config(root: Path, *overrides: str) -> Config:
    own = (f"data.root={root}", f"data.cache={root / 'cache'}", "encoder.weights=null", "train.log_every=100000")
    return load_config(overrides=[*own, "train.checkpoint_every=100000", *overrides])


def make_trainer(root: Path, device: torch.device, *overrides: str) -> Trainer:
    """Return a trainer on the train captions, whose features are random rows of a file."""
    config = make_config(root, *overrides)
    table = annotations.load(config.data)
    words = cut_afresh(table["caption"].tolist(), "en")
    model = CaptionModel.build(config, build_vocab(words.count(), config.data.min_count, "en")).to(device)
    names = table["image"].unique().tolist()
    shape = (len(names), *model.encoder.feature_shape)
    path = root / f"features-{len(shape)}.npy"
    if not path.is_file():
        rows = np.lib.format.open_memmap(path, "w+", np.float16, shape)
        rng = np.random.default_rng(0)
        for row in rows:
            row[:] = rng.random(row.shape, dtype=np.float32)
        rows.flush()
    features = Features([torch.from_numpy(np.load(path, mmap_mode="c"))], names)
    features.move(device)
    train, val = (
        Flickr8kDataset(table[here], model.vocab, Path(), model.transform, features, words=words.of(here.to_numpy()))
        for here in (table["split"] == split for split in ("train", "val"))
    )
    model.fit_statistics(features.take(names[:200]))
    return Trainer(model, train, val, {}, root / "run", device)
