"""One epoch of batches: which captions stand together, in which order, and what of them is for this process."""

from collections.abc import Iterator
from itertools import accumulate

import numpy as np

import distributed
from config import TrainConfig
from data.dataset import Batch, Flickr8kDataset, Share, Window, batch_count, batch_indices, read_batches, share_of
from data.stream import StreamedDataset


class Epoch:
    """The batches of epoch `number` (from 0), drawn from (seed, number).

    Args:
        by_image: whether pictures stay whole, with all their captions; see `data.dataset.batch_indices`.

    Attributes:
        ends: how many batches there have been at the end of each window.
    """

    def __init__(
        self, dataset: Flickr8kDataset | StreamedDataset, config: TrainConfig, number: int, by_image: bool
    ) -> None:
        self.config, self.by_image = config, by_image
        self.windows = dataset.windows([config.seed, number])
        self.ends = list(accumulate(map(self.count, self.windows)))

    def __len__(self) -> int:
        return self.ends[-1]

    def count(self, window: Window) -> int:
        return batch_count(window, self.config.batch_size, self.by_image)

    def read(self, done: int) -> Iterator[tuple[Share, Batch, int]]:
        """Yield this process's part of each batch but the first `done`, and how many captions there were by its end."""
        first = captions = 0
        for window in self.windows:
            count = self.count(window)
            if done < first + count:
                yield from self.read_window(window, max(0, done - first), first, captions)
            first, captions = first + count, captions + window.captions

    def read_window(self, window: Window, done: int, first: int, before: int) -> Iterator[tuple[Share, Batch, int]]:
        """Read a window but for its batches `done`; `first` batches and `before` captions of the epoch precede it."""
        dataset, rng = window.open(), np.random.default_rng(window.seed)
        batches = batch_indices(dataset, self.config.batch_size, self.by_image, rng)
        self.opened = dataset, batches, first
        dataset.choose_views(rng)
        shares = [share_of(dataset, batch, distributed.rank(), distributed.size()) for batch in batches[done:]]
        workers = self.config.num_workers if dataset.features is None else 0
        reader = read_batches(dataset, [share.indices for share in shares], workers)
        captions = before + np.cumsum([len(batch) for batch in batches])
        yield from zip(shares, reader, captions[done:].tolist(), strict=True)

    def pictures(self, number: int) -> list[str]:
        """Return the names of the pictures in batch `number`, which is of the window that is read."""
        dataset, batches, first = self.opened
        return list(dict.fromkeys(dataset.images[dataset.image_of[caption]] for caption in batches[number - first]))
