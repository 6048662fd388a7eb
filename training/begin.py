"""What training begins with: a report of the data, the model, and the datasets."""

from cli import UserError

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch

from config import Config
from data import annotations
from data.dataset import Features, Flickr8kDataset
from data.features import encode_pictures
from data.stream import StreamedDataset
from data.tars import Tar
from data.transforms import View, other_views
from data.vocab import build_vocab
from data.words import Words
from models.model import CaptionModel

CONFIGS = Path(__file__).parents[1] / "configs"


def report_data(table: pd.DataFrame, shards: list[Tar], config: Config) -> None:
    """Print how much there is of each split; raises UserError where there is nothing to train or to validate on."""
    parts = []
    for split in annotations.SPLITS:
        rows = table[table["split"] == split]
        pictures, captions = rows["image"].nunique(), len(rows)
        if shards and split == "train":
            pictures, captions = sum(tar.pictures for tar in shards), sum(tar.captions for tar in shards)
        if not captions and split != "test":
            remedy = (
                f"name {split} in the JSON of some pictures"
                if shards
                else "fix its split lists, or add pictures: it takes three at least"
            )
            raise UserError(f"{config.data.source} has no {split} pictures; {remedy}")
        if captions:
            parts.append(f"{split} {pictures:,} pictures with {captions:,} captions")
    files = [config.data.shards] if shards else annotations.caption_files(config.data)
    print(f"data: {' and '.join(map(str, files))}: {', '.join(parts)}")


def build_model(config: Config, count_words: Callable[[], Counter[str]]) -> CaptionModel:
    """Return a new model with a vocabulary of these words, or, with `train.start`, all that one has learned."""
    data = config.data
    if not config.train.start:
        return CaptionModel.build(config, build_vocab(count_words(), data.min_count, data.language))
    if not Path(config.train.start).is_file():
        run = Path(config.train.start).parent.name
        recipe = f"configs/{run}.yaml" if (CONFIGS / f"{run}.yaml").is_file() else "RECIPE"
        raise UserError(
            f"there is no checkpoint at train.start = {config.train.start}; "
            f"train it first (python train.py --config {recipe}) or name another"
        )
    return CaptionModel.from_start(config, config.train.start)


def make_datasets(
    model: CaptionModel, table: pd.DataFrame, words: Words, shards: list[Tar], device: torch.device
) -> tuple[Flickr8kDataset | StreamedDataset, Flickr8kDataset]:
    """Return the train and val datasets, with cached features where the encoder is frozen."""
    folder = annotations.image_folder(model.config.data)
    features: Features | None = None
    views: dict[View, Features | None] = dict.fromkeys(
        other_views(model.config.train.mirror, model.config.train.corners)
    )
    in_train, in_val = ((table["split"] == split).to_numpy() for split in ("train", "val"))
    train, val = table[in_train], table[in_val]
    if model.config.encoder.frozen:
        features = encode_pictures(model, table["image"].unique().tolist(), folder, device)
    if model.config.encoder.frozen and not shards:
        views = {view: encode_pictures(model, train["image"].unique().tolist(), folder, device, view) for view in views}
    for known in (features, *views.values()):
        if known:
            known.move(device)
    val_set = Flickr8kDataset(val, model.vocab, folder, model.transform, features, words=words.of(in_val))
    if shards:
        return StreamedDataset(shards, model, list(views), device), val_set
    return Flickr8kDataset(train, model.vocab, folder, model.transform, features, views, words.of(in_train)), val_set
