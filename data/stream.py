"""Training on more captions than memory holds: feature shards are read a few at a time, in an order drawn anew."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from data.dataset import Features, Flickr8kDataset, Window
from data.features import Shard, Shards, cache_place, identity
from data.tars import Tar
from data.transforms import WHOLE, View
from data.words import join
from models.model import CaptionModel

MIXED = 50_000  # captions that are shuffled with each other, and in memory, at least


class StreamedDataset:
    """The train captions of many tars, each with the features of its pictures in a shard of the cache.

    An epoch goes through the tars in an order drawn for it, in windows of a few: within one, captions are shuffled
    and batched as those of any `Flickr8kDataset`. In memory are the captions of one window; features stay on disk.

    Args:
        views: other ways to show the pictures, as of `Flickr8kDataset`.
    """

    def __init__(self, tars: Sequence[Tar], model: CaptionModel, views: Sequence[View], device: torch.device) -> None:
        self.tars = [tar for tar in tars if tar.captions]
        self.model, self.device = model, device
        self.shards = {view: encoded(self.tars, model, view, device) for view in (WHOLE, *views)}

    def __len__(self) -> int:
        return sum(tar.captions for tar in self.tars)

    def windows(self, seed: Sequence[int]) -> list[Window]:
        """Return the parts in which an epoch is read, drawn from `seed`."""
        chosen: list[list[int]] = [[]]
        for place in np.random.default_rng(seed).permutation(len(self.tars)).tolist():
            if sum(self.tars[i].captions for i in chosen[-1]) >= MIXED:
                chosen.append([])
            chosen[-1].append(place)
        return [
            Window(
                sum(self.tars[i].pictures for i in places),
                sum(self.tars[i].captions for i in places),
                [*seed, number],
                partial(self.open, places),
            )
            for number, places in enumerate(chosen)
        ]

    def open(self, places: Sequence[int]) -> Flickr8kDataset:
        """Bring the captions of the tars in these places into memory."""
        tars = [self.tars[place] for place in places]
        names = [f"{tar.place.name}/{name}" for tar in tars for name in tar.names()]
        repeats = np.concatenate([tar.repeats() for tar in tars])  # (pictures,)
        table = pd.DataFrame({"image": np.repeat(np.array(names, dtype=object), repeats)})
        features = {
            view: Features([shards[place].open() for place in places], names) for view, shards in self.shards.items()
        }
        for each in features.values():
            each.move(self.device)
        vocab, transform, whole = self.model.vocab, self.model.transform, features.pop(WHOLE)
        return Flickr8kDataset(
            table, vocab, Path(), transform, whole, features, words=join([tar.read_words() for tar in tars])
        )


def encoded(tars: Sequence[Tar], model: CaptionModel, view: View, device: torch.device) -> list[Shard]:
    """Return a feature shard for each tar, encoded where it is not yet; several processes share the work."""
    made_by = identity(model, device, view)
    place = cache_place(model, made_by)
    shards = [Shard(place / tar.place.name, tar, model.encoder.feature_shape, made_by) for tar in tars]
    Shards(model, device, view, place, shards).complete()
    return shards
