"""What the speed benchmark works on: made-up pictures and captions, as large, as long and as many-worded as Flickr8k's.

Speed does not depend on what they show, so nothing has to be downloaded: pictures are smooth noise, words have Zipf's
frequencies, and the backbone's weights are random. A decoder that has learned nothing may write on and on, so captions
are cut at the length at which a trained model's end. This is the only file here that knows train.py's parts.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import distributed
from config import load_config
from data import annotations
from data.dataset import Batch, Flickr8kDataset, captions_per_step, make_batches
from data.features import Features
from data.folders import ImageFolders
from data.tokens import tokenise
from data.vocab import build_vocab
from models.model import CaptionModel
from train import groups_by_image, train_one_epoch
from training.losses import CrossEntropy
from training.monitor import Monitor
from training.runs import Run
from training.setup import index_images
from training.state import Progress, TrainState
from utils import StopRequest

SIZE = (500, 375)  # pixels, as Flickr gives them
CAPTIONS = 30000  # of Flickr8k's training pictures, from which the vocabulary is made
WORDS, EXPONENT = 7999, 1.24  # some 2,500 of them occur five times in so many captions, as Flickr8k's do
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

BATCH = 64  # captions per step, as for the 30,000 of Flickr8k


def make_captions(number: int, rng: np.random.Generator, different: int = WORDS) -> list[str]:
    """Return so many captions, of at most `different` words."""
    letters = np.array(list("abcdefghijklmnopqrst"))
    words = ["".join(letters[[rank // 400, rank // 20 % 20, rank % 20]]) for rank in range(different + 1)]
    lengths = np.clip(rng.normal(LENGTH, SPREAD, number), 4, 30).astype(int)
    ranks = np.minimum(rng.zipf(EXPONENT, lengths.sum()), different).tolist()
    ends = lengths.cumsum()
    return [" ".join(words[rank] for rank in ranks[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def write_dataset(root: Path, pictures: int, drawn: int) -> list[Path]:
    """Write captions of so many pictures, their split lists, and `drawn` JPEGs, whose paths are returned.

    The other pictures' files are empty: their features are made up.
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
        rows = enumerate(make_captions(pictures * EACH, rng))
        csv.writer(file).writerows([("image", "caption"), *((names[row // EACH], text) for row, text in rows)])
    for split, part in (("train", names[VALIDATION:]), ("dev", names[:VALIDATION])):
        (root / f"Flickr_8k.{split}Images.txt").write_text("\n".join(part) + "\n")
    return paths[:drawn]


class Training:
    """Training as train.py does it, on the dataset in `root` with made-up features.

    Attributes:
        model: with the standardisation that its features ask for.
        batches: the caption indices of each batch of `train_set`, the same ones each time.
    """

    def __init__(self, root: Path, device: torch.device, decoder: str) -> None:
        quiet = ("train.log_every=100000", "train.checkpoint_every=100000", f"search.max_length={LONGEST}")
        own = (f"data.root={root}", f"data.cache={root / 'cache'}", "encoder.weights=null", f"train.batch_size={BATCH}")
        config = load_config(overrides=[*own, *quiet, *DECODERS[decoder]])
        table = annotations.load(config.data)
        vocab = build_vocab(make_captions(CAPTIONS, np.random.default_rng(0)), config.data.min_count, "en")
        self.model, self.device = CaptionModel.build(config, vocab).to(device), device
        names = table["image"].unique().tolist()
        features = Features([random_rows(root, (len(names), *self.model.encoder.feature_shape))], names)
        features.move(device)
        train = table[table["split"] == "train"]
        images, image_of = index_images(train)
        tokens = tokenise(train["caption"].tolist(), "en").numericalize(vocab)
        transform = self.model.transform
        self.train_set = Flickr8kDataset(images, image_of, tokens, vocab, ImageFolders({}), transform, features)
        self.model.fit_statistics(features.take(names[:200]))
        self.state, loss_fn = TrainState(self.model), CrossEntropy(self.model, self.train_set)
        self.loss_fn: nn.Module = distributed.parallel(loss_fn, self.model.precision)
        self.monitor = Monitor(Run(config), self.state)
        self.batches = make_batches(
            self.train_set, captions_per_step(config.train, len(self.train_set)), groups_by_image(self.model), rng=None
        )

    def read(self) -> list[Batch]:
        return [self.train_set[batch].to(self.device) for batch in self.batches]

    def epoch(self) -> None:
        """Train an epoch, validation apart, and not the very first steps of a run."""
        self.state.progress = Progress(step=100)
        train_one_epoch(self.state, self.loss_fn, self.train_set, self.monitor, StopRequest())

    def bare_epoch(self, batches: Sequence[Batch]) -> None:
        """Compute losses and gradients of batches that lie in memory, and do nothing with them."""
        self.model.train()
        for batch in batches:
            with self.model.autocast():
                loss, _ = self.loss_fn(batch)
            loss.backward()
            self.model.zero_grad()


def random_rows(root: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Return fp16 rows that lie in a file, as features do; it is made where it is not there yet."""
    path = root / f"features-{len(shape)}.npy"
    if not path.is_file():
        np.save(path, np.random.default_rng(0).random(shape, dtype=np.float32).astype(np.float16))
    return torch.from_numpy(np.load(path, mmap_mode="c"))
