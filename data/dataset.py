"""Flickr8kDataset: captions as word ids, pictures as cached features or pixels; and the batches they travel in."""

from cli import UserError

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from data.transforms import WHOLE, Transform, View, open_picture
from data.vocab import EOS, PAD, SOS, Vocabulary
from data.words import Words, cut_afresh


class Features:
    """Encoded pictures in the order of `names`.

    Args:
        shards: fp16 rows (P, D) or (P, L, D), usually of files on disk.
    """

    def __init__(self, shards: Sequence[torch.Tensor], names: Sequence[str]) -> None:
        self.shards = shards
        self._row_of = {name: row for row, name in enumerate(names)}
        self._ends = np.cumsum([len(shard) for shard in shards])  # (shards,)

    def take(self, names: Sequence[str]) -> torch.Tensor:
        """Return the features of these pictures (B, D) or (B, L, D), where the shards are."""
        place = [self._row_of[name] for name in names]  # (B,)
        shard = np.searchsorted(self._ends, place, side="right").tolist()  # (B,)
        rows = [self.shards[number][row - self._ends[number]] for row, number in zip(place, shard, strict=True)]
        return torch.stack(rows)  # much faster than indexing for rows as large as grids

    def move(self, device: torch.device) -> None:
        """Hold all of them on a GPU from now on, where they take no more than half of what is free there."""
        if (
            device.type == "cuda"
            and 2 * sum(shard.nbytes for shard in self.shards) < torch.cuda.mem_get_info(device)[0]
        ):
            self.shards = [shard.to(device) for shard in self.shards]


@dataclass
class Batch:
    """N captions of B pictures.

    Attributes:
        pictures: features (B, D) or (B, L, D), or uint8 pixels (B, 3, S, S).
        tokens: `<sos> w1 … wn <eos>`, padded (N, 1 + T).
        owner: each caption's row in `pictures` (N,).
        images: the pictures' places in the dataset's `images` (B,).
        mirrored: which of them are shown mirrored, their captions with left for right (B,).
    """

    pictures: torch.Tensor
    tokens: torch.Tensor
    owner: torch.Tensor
    images: torch.Tensor
    mirrored: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on this device; a GPU fetches it from pinned memory while it still computes."""
        parts = [self.pictures, self.tokens, self.owner, self.images, self.mirrored]
        if device.type == "cuda":
            parts = [part if part.is_cuda else part.pin_memory() for part in parts]
        return Batch(*(part.to(device, non_blocking=True) for part in parts))

    @property
    def words(self) -> int:
        """Number of targets that are not padding."""
        return int((self.targets != PAD).sum())

    @property
    def inputs(self) -> torch.Tensor:
        return self.tokens[:, :-1]  # (N, T): <sos> w1 … wn

    @property
    def targets(self) -> torch.Tensor:
        return self.tokens[:, 1:]  # (N, T): w1 … wn <eos>


@dataclass(frozen=True)
class Window:
    """Captions that are in memory together while an epoch is read: all, or, of a `StreamedDataset`, some.

    Attributes:
        pictures, captions: how many there are.
        seed: what the order of its captions is drawn from.
        open: brings them into memory.
    """

    pictures: int
    captions: int
    seed: list[int]
    open: Callable[[], "Flickr8kDataset"]


class Flickr8kDataset(Dataset):
    """One item per caption, whatever format the captions came from.

    Args:
        table: rows of one split, as `annotations.load` gives them.
        vocab: turns captions into ids.
        folder, transform: where pictures are read from, and how, when there are no `features`.
        views: other ways to show the pictures, each with its features where there are `features`.
        words: those of the captions, where they are cut already.

    Attributes:
        shown: how each picture is shown now (images,): 0, whole, or one of `views`, counted from 1.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        vocab: Vocabulary,
        folder: Path,
        transform: Transform,
        features: Features | None = None,
        views: Mapping[View, Features | None] | None = None,
        words: Words | None = None,
    ) -> None:
        self.images = table["image"].drop_duplicates().tolist()
        place = {image: i for i, image in enumerate(self.images)}
        self.image_of = table["image"].map(place).to_numpy()  # (captions,)
        words = words or cut_afresh(table["caption"].tolist(), vocab.language)
        self.tokens = encode(words, vocab)
        self.lengths = np.array([len(ids) for ids in self.tokens])
        self.folder, self.transform = folder, transform
        self.features, self.views = features, views or {}
        self.shown = np.zeros(len(self.images), dtype=np.int64)
        self.other_side = torch.tensor(vocab.mirrored())  # (V,): left for right

    def spread(self, most: int) -> list[str]:
        """Return the names of at most so many pictures, evenly spread over all."""
        count = min(most, len(self.images))
        return [self.images[place * len(self.images) // count] for place in range(count)]

    def windows(self, seed: Sequence[int]) -> list[Window]:
        """Return the parts in which an epoch is read: here one."""
        return [Window(len(self.images), len(self), list(seed), lambda: self)]

    def choose_views(self, rng: np.random.Generator) -> None:
        """Draw how each picture is shown from now on."""
        self.shown = rng.integers(1 + len(self.views), size=len(self.images))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return the captions `indices` as one Batch; each picture in it is read once."""
        images, places = np.unique(self.image_of[indices], return_inverse=True)
        tokens, owner = padded([self.tokens[index] for index in indices]), torch.from_numpy(places)
        mirrored_views = np.array([view.mirrored for view in (WHOLE, *self.views)])  # (1 + views,)
        mirrored = torch.from_numpy(mirrored_views[self.shown[images]])  # (B,)
        tokens = torch.where(mirrored[owner, None], self.other_side[tokens], tokens)
        return Batch(self.read(images), tokens, owner, torch.from_numpy(images), mirrored)

    def read(self, images: np.ndarray) -> torch.Tensor:
        """Return the pictures with these places in `self.images`: features if there are any, else pixels."""
        names, shown = [self.images[image] for image in images], self.shown[images]
        if self.features is None:
            views = [WHOLE, *self.views]
            opened = [open_picture(self.folder / name) for name in names]
            return torch.stack(
                [self.transform.resize(*pair) for pair in zip(opened, (views[i] for i in shown), strict=True)]
            )
        rows = self.features.take(names)
        for number, features in enumerate(self.views.values(), start=1):
            here = np.flatnonzero(shown == number)
            if features and len(here):
                rows[torch.from_numpy(here)] = features.take([names[place] for place in here]).to(rows.device)
        return rows


def read_batches(dataset: Flickr8kDataset, batches: list[list[int]], workers: int) -> Iterator[Batch]:
    """Yield the captions of each batch, read by so many processes, or by this one.

    Raises UserError for a picture that cannot be read.
    """
    loader = DataLoader(
        ErrorsAsItems(dataset),
        batch_sampler=batches,
        collate_fn=unchanged,
        num_workers=workers,
        worker_init_fn=leave_interrupts,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class ErrorsAsItems(Dataset):
    """The dataset, but it returns a UserError: one raised in another process would come with its traceback."""

    def __init__(self, dataset: Flickr8kDataset) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> Batch | UserError:
        try:
            return self.dataset.__getitems__(indices)
        except UserError as error:
            return error


def leave_interrupts(worker: int) -> None:
    """Let Ctrl-C, which a terminal sends to all processes, end the reading ones only when the training one says so."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def unchanged(batch: Any) -> Any:
    return batch


def encode(words: Words, vocab: Vocabulary) -> list[np.ndarray]:
    """Return the ids `<sos> w1 … wn <eos>` of each caption."""
    lengths = 2 + np.diff(words.ends, prepend=0)  # (N,)
    ends = lengths.cumsum()
    ids = np.full(lengths.sum(), -1)
    ids[ends - lengths], ids[ends - 1] = SOS, EOS
    ids[ids < 0] = np.array(vocab.look_up(words.lexicon), dtype=np.int64)[words.ids]
    return [ids[end - length : end] for length, end in zip(lengths, ends, strict=True)]


def padded(captions: Sequence[Sequence[int] | np.ndarray]) -> torch.Tensor:
    """Return captions as one tensor (N, T), short ones filled up with `<pad>`."""
    tokens = np.full((len(captions), max(map(len, captions))), PAD)
    for row, ids in zip(tokens, captions, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(tokens)


def batch_indices(
    dataset: Flickr8kDataset, batch_size: int, by_image: bool, rng: np.random.Generator | None
) -> list[list[int]]:
    """Return caption indices of each batch, about `batch_size` captions each.

    Captions of similar length stand together, or, `by_image`, whole pictures with all their captions, sorted by the
    longest. The order is drawn from `rng`, or, without one, is the same each time.
    """
    order = np.argsort(dataset.image_of, kind="stable") if by_image else np.arange(len(dataset))
    sizes = np.bincount(dataset.image_of) if by_image else np.ones(len(dataset), dtype=np.int64)  # (groups,)
    starts = np.cumsum(sizes) - sizes
    per_batch = groups_per_batch(len(sizes), len(dataset), batch_size)
    longest = np.maximum.reduceat(dataset.lengths[order], starts)
    shuffle = rng.permutation(len(sizes)) if rng else np.arange(len(sizes))
    shuffle = shuffle[np.argsort(longest[shuffle], kind="stable")]
    batches = [shuffle[first : first + per_batch] for first in range(0, len(shuffle), per_batch)]
    if rng:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return [np.concatenate([order[starts[g] : starts[g] + sizes[g]] for g in batch]).tolist() for batch in batches]


def groups_per_batch(groups: int, captions: int, batch_size: int) -> int:
    return max(1, round(batch_size * groups / captions))


def batch_count(window: Window, batch_size: int, by_image: bool) -> int:
    """Return how many batches `batch_indices` makes of a window, without opening it."""
    groups = window.pictures if by_image else window.captions
    return -(-groups // groups_per_batch(groups, window.captions, batch_size))


@dataclass(frozen=True)
class Share:
    """What of a batch is for one of several processes.

    Attributes:
        indices: its captions.
        words: real words in the whole batch; part: how many of them are here, from 0 to 1.
    """

    indices: list[int]
    words: int
    part: float


def share_of(dataset: Flickr8kDataset, batch: Sequence[int], rank: int, size: int) -> Share:
    """Return every `size`-th picture of a batch with its captions: each picture is read by one process alone.

    Where no picture is left, a caption stands in whose part is 0, since all processes make each step.
    """
    words = int(dataset.lengths[batch].sum()) - len(batch)
    if size == 1:
        return Share(list(batch), words, 1.0)
    picture = np.unique(dataset.image_of[batch], return_inverse=True)[1]  # (N,)
    mine = np.asarray(batch)[picture % size == rank]
    if not len(mine):
        return Share(list(batch[:1]), words, 0.0)
    return Share(mine.tolist(), words, (int(dataset.lengths[mine].sum()) - len(mine)) / words)
