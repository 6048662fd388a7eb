"""One epoch of batches: which captions stand together, in which order, and what of them is for this process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from config import TrainConfig
from data.dataset import Batch, Flickr8kDataset, Share, Window, batch_count, batch_indices, share_of
from data.stream import StreamedDataset
from training import distributed


class Epoch:
    """The batches of epoch `number` (from 0), drawn from (seed, number).

    Args:
        by_image: whether pictures stay whole, with all their captions; see `data.dataset.batch_indices`.
    """

    def __init__(
        self, dataset: Flickr8kDataset | StreamedDataset, config: TrainConfig, number: int, by_image: bool
    ) -> None:
        self.config, self.by_image = config, by_image
        self.windows = dataset.windows([config.seed, number])

    def __len__(self) -> int:
        return sum(map(self.count, self.windows))

    def count(self, window: Window) -> int:
        return batch_count(window, self.config.batch_size, self.by_image)

    def read(self, done: int) -> Iterator[tuple[Share, Batch, int]]:
        """Yield this process's part of each batch but the first `done`, and how many captions there were by its end."""
        before = 0
        for window in self.windows:
            if done < self.count(window):
                yield from self.read_window(window, done, before)
            done, before = max(0, done - self.count(window)), before + window.captions

    def read_window(self, window: Window, done: int, before: int) -> Iterator[tuple[Share, Batch, int]]:
        dataset, rng = window.open(), np.random.default_rng(window.seed)
        batches = batch_indices(dataset, self.config.batch_size, self.by_image, rng)
        dataset.choose_views(rng)
        shares = [share_of(dataset, batch, distributed.rank(), distributed.size()) for batch in batches[done:]]
        loader = DataLoader(
            dataset,
            batch_sampler=[share.indices for share in shares],
            collate_fn=as_it_is,
            num_workers=self.config.num_workers if dataset.features is None else 0,
        )
        captions = before + np.cumsum([len(batch) for batch in batches])
        yield from zip(shares, loader, captions[done:].tolist(), strict=True)


def as_it_is(batch: Any) -> Any:
    return batch
