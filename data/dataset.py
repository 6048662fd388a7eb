"""Flickr8kDataset: captions as token ids, pictures as cached features or pixels; and the batches they travel in."""

from cli import UserError

import copy
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import distributed
from data.features import Features
from data.tokens import Tokens
from data.transforms import AUGMENTATIONS, WHOLE, Transform, View, open_picture
from data.vocab import EOS, PAD, SOS, Vocabulary


@dataclass
class Batch:
    """N captions of B pictures.

    Attributes:
        features: (B, D) or (B, L, D), or uint8 pixels (B, 3, S, S).
        tokens: `<sos> w1 … wn <eos>`, padded (N, 1 + T).
        image_index: each caption's row in `features` (N,).
        image_ids: the pictures' places in the dataset's `images` (B,).
        mirrored: which pictures are shown mirrored, their captions with left for right (B,).
    """

    features: torch.Tensor
    tokens: torch.Tensor
    image_index: torch.Tensor
    image_ids: torch.Tensor
    mirrored: torch.Tensor

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


class Flickr8kDataset(Dataset):
    """One item per caption, whatever format the captions came from.

    Args:
        images: the names of P pictures.
        image_of: each caption's place in `images` (N,).
        tokens: the captions, with the ids of `vocab`.
        folder, transform: where pictures are read from, and how, when there are no `features`.
        features: of the pictures as they are.
        views: other ways to show the pictures, each with its features where there are `features`.
        augmentations: names of random changes to pictures that are read, from AUGMENTATIONS.

    Attributes:
        lengths: the number of targets of each caption (N,): its words and `<eos>`.
        view_of: how each picture is shown in this epoch (P,): 0 as it is, else one of `views`, counted from 1.
    """

    def __init__(
        self,
        images: Sequence[str],
        image_of: np.ndarray,
        tokens: Tokens,
        vocab: Vocabulary,
        folder: Path,
        transform: Transform,
        features: Features | None = None,
        views: Mapping[View, Features | None] | None = None,
        augmentations: Sequence[str] = (),
    ) -> None:
        self.images, self.image_of, self.tokens = images, image_of.astype(np.int32), tokens
        self.lengths = tokens.lengths.astype(np.int32) + 1
        self.folder, self.transform, self.augmentations = folder, transform, augmentations
        self.set_features({WHOLE: features} | dict(views or {}))
        self.view_of = np.zeros(len(images), dtype=np.int64)
        self.seed = (0, 0)
        self.mirrored_id = torch.tensor(vocab.mirrored())  # (V,): left for right

    def set_features(self, views: Mapping[View, Features | None]) -> None:
        """Show the pictures in these ways from now on, WHOLE first."""
        self.views = dict(views)
        self.places = {view: each.index(self.images) for view, each in self.views.items() if each}  # (P,) for each

    def with_features(self, features: Features) -> "Flickr8kDataset":
        """Return the same captions of pictures with these features."""
        dataset = copy.copy(self)
        dataset.set_features({WHOLE: features})
        return dataset

    @property
    def features(self) -> Features | None:
        """The features of the pictures as they are; None where pictures are read and encoded anew each time."""
        return self.views[WHOLE]

    def start_epoch(self, seed: int, epoch: int, rng: np.random.Generator) -> None:
        """Draw how each picture is shown from now on."""
        self.view_of = rng.integers(len(self.views), size=len(self.images))
        self.seed = (seed, epoch)

    def sample_images(self, most: int) -> list[str]:
        """Return the names of at most so many pictures, evenly spread over all."""
        count = min(most, len(self.images))
        return [self.images[place * len(self.images) // count] for place in range(count)]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Return the captions `indices` as one Batch; each of their pictures is read once."""
        images, places = np.unique(self.image_of[indices], return_inverse=True)
        tokens, image_index = pad([[SOS, *self.tokens[index], EOS] for index in indices]), torch.from_numpy(places)
        is_mirrored = np.array([view.mirrored for view in self.views])  # (views,)
        mirrored = torch.from_numpy(is_mirrored[self.view_of[images]])  # (B,)
        tokens = torch.where(mirrored[image_index, None], self.mirrored_id[tokens], tokens)
        image_ids = torch.from_numpy(images.astype(np.int64))
        return Batch(self.read(images), tokens, image_index, image_ids, mirrored)

    def read(self, images: np.ndarray) -> torch.Tensor:
        """Return the pictures at these places in `images`: their features if there are any, else pixels."""
        shown = self.view_of[images]  # (B,)
        if self.features is None:
            views = list(self.views)
            return torch.stack([self.read_pixels(int(image), views[v]) for image, v in zip(images, shown, strict=True)])
        rows = self.features.take(self.places[WHOLE][images])  # (B, D) or (B, L, D)
        for number, (view, features) in enumerate(self.views.items()):
            here = np.flatnonzero(shown == number)
            if number and features and len(here):
                rows[torch.from_numpy(here)] = features.take(self.places[view][images[here]]).to(rows.device)
        return rows

    def read_pixels(self, image: int, view: View) -> torch.Tensor:
        """Return a view of a picture, augmented by noise of (seed, epoch, image), as uint8 (3, S, S)."""
        picture = open_picture(self.folder / self.images[image])
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


# ---- batches ---------------------------------------------------------------------------------------------------------


def make_batches(
    dataset: Flickr8kDataset, batch_size: int, by_image: bool, rng: np.random.Generator | None
) -> list[np.ndarray]:
    """Return the caption indices of each batch, about `batch_size` captions each.

    Captions of similar length share a batch, or, `by_image`, whole pictures with all their captions, sorted by the
    longest: what is computed of a picture is then computed once. The order is drawn from `rng`; without one it is
    always the same.
    """
    order = np.argsort(dataset.image_of, kind="stable") if by_image else np.arange(len(dataset))
    sizes = np.bincount(dataset.image_of) if by_image else np.ones(len(dataset), dtype=np.int64)  # (groups,)
    starts = np.cumsum(sizes) - sizes
    groups_per_batch = max(1, round(batch_size * len(sizes) / len(dataset)))
    longest = np.maximum.reduceat(dataset.lengths[order], starts)
    groups = rng.permutation(len(sizes)) if rng else np.arange(len(sizes))
    groups = groups[np.argsort(longest[groups], kind="stable")]
    batches = [groups[first : first + groups_per_batch] for first in range(0, len(groups), groups_per_batch)]
    if rng:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return [np.concatenate([order[starts[g] : starts[g] + sizes[g]] for g in batch]) for batch in batches]


@dataclass(frozen=True)
class Share:
    """What of a batch is for one of several processes.

    Attributes:
        indices: its captions.
        words: targets in the whole batch; fraction: how many of them are in this share, from 0 to 1.
    """

    indices: np.ndarray
    words: int
    fraction: float


def share_of(dataset: Flickr8kDataset, batch: np.ndarray, rank: int, size: int) -> Share:
    """Return every `size`-th picture of a batch with its captions, so that each picture is read by one process alone.

    Where no picture is left, a caption stands in with fraction 0, since all processes make each step.
    """
    words = int(dataset.lengths[batch].sum())
    if size == 1:
        return Share(batch, words, 1.0)
    picture = np.unique(dataset.image_of[batch], return_inverse=True)[1]  # (N,)
    mine = batch[picture % size == rank]
    if not len(mine):
        return Share(batch[:1], words, 0.0)
    return Share(mine, words, int(dataset.lengths[mine].sum()) / words)


def read_shares(
    dataset: Flickr8kDataset, batches: Sequence[np.ndarray], workers: int = 0
) -> Iterator[tuple[Share, Batch]]:
    """Yield this process's share of each batch, read by so many further processes where pictures are read.

    Raises UserError for a picture that cannot be read.
    """
    shares = [share_of(dataset, batch, distributed.rank(), distributed.size()) for batch in batches]
    loader = DataLoader(
        ErrorsAsItems(dataset),
        batch_size=None,  # an item is a whole batch
        sampler=[share.indices for share in shares],
        num_workers=workers if dataset.features is None else 0,
        worker_init_fn=ignore_interrupts,
    )
    for share, batch in zip(shares, loader, strict=True):
        if isinstance(batch, UserError):
            raise batch
        yield share, batch


class ErrorsAsItems(Dataset):
    """The dataset, but it returns a UserError: one raised in another process would come with its traceback."""

    def __init__(self, dataset: Flickr8kDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(indices)
        except UserError as error:
            return error


def ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the training one: it ends the readers when it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
