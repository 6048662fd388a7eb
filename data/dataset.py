"""Flickr8kDataset: captions as token ids, pictures as cached features or pixels; and the batches they travel in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np
import torch
from torch.utils.data import Dataset

import distributed
from config import TrainConfig
from data.features import Features, read_ahead
from data.folders import ImageFolders
from data.tokens import Tokens
from data.transforms import AUGMENTATIONS, WHOLE, Transform, View, open_picture
from data.vocab import EOS, PAD, SOS, Vocabulary

LEAST_BATCH, MOST_BATCH = 4, 64  # captions of a batch, by train.batch_size=auto
STEPS = 375  # of an epoch, by that: of a set of 24,000 captions or fewer


@dataclass
class Batch:
    """N captions of B pictures."""

    features: torch.Tensor  # (B, D) or (B, L, D), or uint8 pixels (B, 3, S, S)
    tokens: torch.Tensor  # `<sos> w1 … wn <eos>`, padded (N, 1 + T)
    image_index: torch.Tensor  # each caption's row in `features` (N,)
    image_ids: torch.Tensor  # the pictures' places in the dataset's `images` (B,)
    mirrored: torch.Tensor  # which pictures are shown mirrored, their captions with left for right (B,)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on this device; a GPU fetches it from pinned memory while it still computes."""
        parts = list(vars(self).values())
        if device.type == "cuda":
            parts = [part if part.is_cuda else part.pin_memory() for part in parts]
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    @property
    def inputs(self) -> torch.Tensor:
        return self.tokens[:, :-1]  # (N, T): <sos> w1 … wn

    @property
    def targets(self) -> torch.Tensor:
        return self.tokens[:, 1:]  # (N, T): w1 … wn <eos>


@dataclass(eq=False)
class Flickr8kDataset(Dataset):
    """One item per caption, whatever format the captions came from."""

    images: Sequence[str]  # the names of P pictures
    image_of: np.ndarray  # each caption's place in `images` (N,)
    tokens: Tokens  # of the captions, with the ids of `vocab`
    vocab: Vocabulary
    folders: ImageFolders  # where pictures are read from, and how, when there are no `features`
    transform: Transform
    features: Features | None = None  # of the pictures as they are
    views: Mapping[View, Features | None] = field(default_factory=dict)  # other ways to show them, each with features
    augmentations: Sequence[str] = ()  # random changes to pictures that are read, by their names in AUGMENTATIONS
    weights: np.ndarray | None = None  # how often an epoch sees the captions of each picture (P,), None for once

    def __post_init__(self) -> None:
        self.image_of = self.image_of.astype(np.int32)
        self.lengths = self.tokens.lengths.astype(np.int32) + 1  # targets of each caption, words and `<eos>` (N,)
        self.shown = {WHOLE: self.features, **self.views}
        self.places = {view: each.index(self.images) for view, each in self.shown.items() if each}  # (P,) for each
        self.view_of = np.zeros(
            len(self.images), dtype=np.int64
        )  # how each is shown in this epoch, by place in `shown`
        self.seed = (0, 0)
        self.mirrored_id = torch.tensor(self.vocab.mirrored())  # (V,): left for right

    def with_features(self, features: Features) -> "Flickr8kDataset":
        """Return the same captions of pictures with these features."""
        return replace(self, features=features)

    def start_epoch(self, seed: int, epoch: int, rng: np.random.Generator) -> None:
        """Draw how each picture is shown from now on."""
        self.view_of = rng.integers(len(self.shown), size=len(self.images))
        self.seed = (seed, epoch)

    def sample_images(self, most: int) -> list[str]:
        """Return the names of at most `most` pictures, evenly spaced over all."""
        count = min(most, len(self.images))
        return [self.images[place * len(self.images) // count] for place in range(count)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return these captions as one Batch; each of their pictures is read once."""
        images, places = np.unique(self.image_of[indices], return_inverse=True)
        tokens, image_index = pad([[SOS, *self.tokens[index], EOS] for index in indices]), torch.from_numpy(places)
        is_mirrored = np.array([view.mirrored for view in self.shown])  # (views,)
        mirrored = torch.from_numpy(is_mirrored[self.view_of[images]])  # (B,)
        tokens = torch.where(mirrored[image_index, None], self.mirrored_id[tokens], tokens)
        image_ids = torch.from_numpy(images.astype(np.int64))
        return Batch(self.read(images), tokens, image_index, image_ids, mirrored)

    def read(self, images: np.ndarray) -> torch.Tensor:
        """Return the pictures at these places in `images`: their features if there are any, else pixels."""
        view_of, views = self.view_of[images], list(self.shown)  # (B,)
        if self.features is None:
            return torch.stack([self.read_pixels(int(i), views[v]) for i, v in zip(images, view_of, strict=True)])
        rows = self.features.take(self.places[WHOLE][images])  # (B, D) or (B, L, D)
        for number, (view, features) in enumerate(self.shown.items()):
            here = np.flatnonzero(view_of == number)
            if number and features and len(here):
                rows[torch.from_numpy(here)] = features.take(self.places[view][images[here]]).to(rows.device)
        return rows

    def read_pixels(self, image: int, view: View) -> torch.Tensor:
        """Return a view of a picture, augmented by noise of (seed, epoch, image), as uint8 (3, S, S)."""
        picture = open_picture(self.folders.path(self.images[image]), least=self.transform.least)
        rng = np.random.default_rng([*self.seed, image])
        for name in self.augmentations:
            picture = AUGMENTATIONS[name](picture, rng)
        return self.transform.resize(picture, view)


def pad(captions: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    """Return captions as one tensor (N, T), short ones filled up with `<pad>`."""
    tokens = np.full((len(captions), max(map(len, captions))), PAD)
    for row, ids in zip(tokens, captions, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


def captions_per_step(config: TrainConfig, captions: int) -> int:
    """Return how many captions a step has, of a set of so many: `auto` are 64, or fewer where that leaves few steps."""
    if config.batch_size != "auto":
        return config.batch_size * config.accumulate
    return max(LEAST_BATCH, min(MOST_BATCH, captions // STEPS)) * config.accumulate


def make_batches(
    dataset: Flickr8kDataset, batch_size: int, by_image: bool, rng: np.random.Generator | None
) -> list[np.ndarray]:
    """Return the caption indices of each batch, about `batch_size` captions each.

    Captions of similar length share a batch, or, `by_image`, whole pictures with all their captions, so that each is
    encoded once. The order is drawn from `rng`; without one it is always the same. By `dataset.weights` some captions
    come several times, or not in every epoch.
    """
    order = np.argsort(dataset.image_of, kind="stable") if by_image else np.arange(len(dataset))
    sizes = np.bincount(dataset.image_of) if by_image else np.ones(len(dataset), dtype=np.int64)  # (groups,)
    starts = np.cumsum(sizes) - sizes
    groups_per_batch = max(1, round(batch_size * len(sizes) / len(dataset)))
    longest = np.maximum.reduceat(dataset.lengths[order], starts)
    groups = rng.permutation(len(sizes)) if rng else np.arange(len(sizes))
    if dataset.weights is not None:
        groups = repeat(groups, dataset.weights[dataset.image_of[order[starts[groups]]]])
    groups = groups[np.argsort(longest[groups], kind="stable")]
    batches = [groups[first : first + groups_per_batch] for first in range(0, len(groups), groups_per_batch)]
    if rng:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return [np.concatenate([order[starts[g] : starts[g] + sizes[g]] for g in batch]) for batch in batches]


def repeat(groups: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return each group `weights` times; of those with 2.3, the first 30 % come a third time."""
    times = np.floor(weights).astype(np.int64)
    for weight in np.unique(weights):
        same = np.flatnonzero(weights == weight)
        times[same[: round(len(same) * (weight % 1))]] += 1
    return np.repeat(groups, times)


@dataclass(frozen=True)
class Share:
    """The part of a batch that one process computes at once."""

    indices: np.ndarray  # its captions
    batch_words: int  # target words in the whole batch
    fraction: float  # of these in this share, from 0 to 1


def share_of(dataset: Flickr8kDataset, batch: np.ndarray, rank: int, size: int) -> Share:
    """Return every `size`-th picture of a batch with its captions, so that each picture is read by one process alone.

    A process that gets no picture takes a caption with fraction 0, since every process takes part in each step.
    """
    words = int(dataset.lengths[batch].sum())
    if size == 1:
        return Share(batch, words, 1.0)
    picture = np.unique(dataset.image_of[batch], return_inverse=True)[1]  # (N,)
    mine = batch[picture % size == rank]
    if not len(mine):
        return Share(batch[:1], words, 0.0)
    return Share(mine, words, int(dataset.lengths[mine].sum()) / words)


Parts = list[tuple[Share, Batch]]  # of one batch, what a process computes one after the other


def read_shares(
    dataset: Flickr8kDataset, batches: Sequence[np.ndarray], workers: int = 0, parts: int = 1
) -> Iterator[Parts]:
    """Yield this process's share of each batch, in so many parts; where pictures are read from disk, `workers` threads
    do so ahead of the caller.

    Threads are as fast as processes here, since Pillow and PyTorch let each other run, and they need no shared memory,
    no sockets and no second copy of the captions. Raises UserError for a picture that cannot be read.
    """
    first, size = distributed.rank() * parts, distributed.size() * parts
    shares = [share_of(dataset, batch, first + part, size) for batch in batches for part in range(parts)]
    indices = [share.indices for share in shares]
    read: Iterator[Batch]
    if dataset.features is None and workers:
        read = chain.from_iterable(read_ahead(dataset.__getitem__, indices, workers, workers))
    else:
        read = map(dataset.__getitem__, indices)
    step: Parts = []
    for share, batch in zip(shares, read, strict=True):
        step.append((share, batch))
        if len(step) == parts:
            yield step
            step = []
