"""Sets up training: the captions, the model, and the datasets."""

import hashlib
import importlib.util
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from captioning import describe_names, encode_dataset, feature_cache
from cli import UserError, say
from config import Config, DataConfig, pick
from data import annotations, formats, splits, tars
from data.dataset import Flickr8kDataset
from data.features import Features, find_broken
from data.folders import caption_files, datasets, image_folders
from data.splits import SPLITS
from data.tars import Tar
from data.tokens import Tokens, join, tokenise_once
from data.transforms import AUGMENTATIONS, WHOLE, View, other_views
from data.vocab import SPECIALS, TOKENISERS, Vocabulary, build_vocab
from models.checkpoint import model_from_start, model_from_state
from models.encoder import transform_for
from models.model import CaptionModel, decoder_class_of
from training.losses import LOSSES
from training.runs import Run
from utils import pick_device

KNOWN = 0.75  # of the words in training captions a vocabulary should have
FEW = 30  # val pictures: an interval of 3.4 CIDEr-D to either side for 1,000 is one of some 20 for so many


class Captions:
    """The captions of a run as a `table`, see `data.annotations`, and as `tokens`; not those of train in tar shards."""

    def __init__(self, run: Run) -> None:
        config = run.config
        check_config(config)
        self.config = config.data
        self.table = annotations.load(config.data, run.saved_splits())
        self.shards = tars.find(config.data)
        self.report()
        self.tokens = tokenise_once(self.table["caption"].tolist(), config.data.language, Path(config.data.cache))

    def of(self, split: str) -> tuple[pd.DataFrame, Tokens]:
        chosen = (self.table["split"] == split).to_numpy()  # (N,)
        return self.table[chosen], self.tokens.select(chosen)

    def references(self, split: str) -> dict[str, list[str]]:
        return annotations.references(self.of(split)[0])

    def keep(self, images: Sequence[str]) -> None:
        """Leave out the captions of all pictures but these: of those that cannot be read."""
        if len(images) < self.table["image"].nunique():
            kept = self.table["image"].isin(images).to_numpy()  # (N,)
            self.table, self.tokens = self.table[kept], self.tokens.select(kept)

    def digests(self) -> dict[str, str]:
        """Return a hash of the captions of each split and of the names of their pictures."""
        found = splits.digests_of(self.table)
        if self.shards:
            digest = hashlib.sha256()
            for tar in self.shards:
                tokens = tar.tokens()
                names = [name.partition("/")[2] for name in tar.names]
                digest.update(json.dumps([names, tar.captions_per_image.tolist(), tokens.types]).encode())
                digest.update(tokens.ids.tobytes() + tokens.offsets.tobytes())
            found["train"] = digest.hexdigest()
        return found

    def report(self) -> None:
        """Print how much there is of each split; raises UserError where there is nothing to train or to validate on."""
        parts = datasets(self.config)
        if len(parts) > 1:
            for prefix, part in parts:
                files = " and ".join(map(str, caption_files(part)))
                rows = self.table[self.table["image"].str.startswith(prefix)]
                say(f"data: {files}: {describe(count(rows))}")
        counts = count(self.table)
        if self.shards:
            counts["train"] = sum(len(tar.names) for tar in self.shards), sum(tar.captions for tar in self.shards)
        for split in ("train", "val"):
            if counts.get(split, (0, 0)) == (0, 0):
                remedy = "fix its split lists, or add pictures: it takes three at least"
                if self.shards:
                    remedy = f"name {split} in the JSON of some pictures"
                raise UserError(f"{self.config.source} has no {split} pictures; {remedy}")
        if len(parts) > 1:
            say(f"data: together: {describe(counts)}")
        else:
            source = self.config.shards or " and ".join(map(str, caption_files(self.config)))
            say(f"data: {source}: {describe(counts)}")
        if counts["val"][0] < FEW:
            say(f"scores of fewer than {FEW} val pictures are mostly chance")


def count(table: pd.DataFrame) -> dict[str, tuple[int, int]]:
    """Return how many pictures and captions each split has."""
    return {split: (rows["image"].nunique(), len(rows)) for split, rows in table.groupby("split")}


def describe(counts: dict[str, tuple[int, int]]) -> str:
    known = [(split, *counts[split]) for split in SPLITS if split in counts]
    return ", ".join(f"{split} {pictures:,} pictures with {captions:,} captions" for split, pictures, captions in known)


def check_config(config: Config) -> None:
    """Raise UserError, before any data is read, for unknown names and for settings that do not go together."""
    decoder_class_of(config)
    pick(LOSSES, config.train.loss, "train.loss")
    pick({"auto": None, **formats.READERS}, config.data.format, "data.format")
    pick(TOKENISERS, config.data.language, "data.language")
    transform_for(config.encoder)
    for name in config.train.augment:
        pick(AUGMENTATIONS, name, "train.augment")
    if config.data.shards and config.data.broken == "skip":
        raise UserError(
            "data.broken=skip is for pictures in folders, and data.shards are tars; write these anew without broken "
            "pictures, and leave data.broken out"
        )
    if config.train.mirror and config.data.language == "unicode":
        raise UserError(
            "train.mirror swaps left and right in captions, which it knows in English and Chinese alone; set "
            "train.mirror=false"
        )
    if config.data.weights and (config.data.shards or len(config.data.weights) != len(config.data.roots)):
        raise UserError(
            f"data.weights has {len(config.data.weights)} numbers for {config.data.source}; give one for each folder "
            "of data.root, or null"
        )
    if config.train.loss == "self_critical" and not config.train.start:
        raise UserError(
            "train.loss=self_critical improves a captioner that can write already; name it with "
            "train.start=runs/NAME/checkpoints.pth"
        )
    for name in ("tensorboard", "wandb"):
        if getattr(config.train, name) and not importlib.util.find_spec(name):
            raise UserError(
                f"train.{name}=true needs the package {name}; run: pip install -r requirements-extras.txt, "
                f"or train without it: train.{name}=false"
            )


def make_model(run: Run, captions: Captions) -> CaptionModel:
    """Return the model: restored from last.pth, started from `train.start`, or new with its own vocabulary."""
    config = run.config
    if run.saved:
        model = model_from_state(run.saved | {"config": config.model_dump()}, str(run.last))
    elif config.train.start:
        model = model_from_start(config)
        if not captions.shards:
            check_words(captions.of("train")[1].count(), model.vocab, str(config.train.start))
    else:
        shards = captions.shards
        tokens = join([tar.tokens() for tar in shards]) if shards else captions.of("train")[1]
        counts = tokens.count()
        vocab = build_vocab(counts, config.data.min_count, config.data.language)
        warn_of_unknown(counts, vocab, config.data.min_count)
        model = CaptionModel.build(config, vocab)
    return model.to(pick_device())


def check_words(counts: Counter[str], vocab: Vocabulary, start: str) -> None:
    """Raise UserError where a captioner goes on with captions that it has no words for, as in another language."""
    known = sum(counts[word] for word in vocab.words) / max(1, counts.total())
    if known < 0.5:
        raise UserError(
            f"{start} knows only {known:.0%} of the words in these captions, and learns no new ones; train from "
            "nothing: train.start=null"
        )
    if known < KNOWN:
        say(f"warning: {start} knows {known:.0%} of the words in these captions, and learns no new ones")


def warn_of_unknown(counts: Counter[str], vocab: Vocabulary, min_count: int) -> None:
    """Say so where `data.min_count` leaves out much of what the captions say."""
    known = sum(counts[word] for word in vocab.words) / max(1, counts.total())
    if known < KNOWN and min_count > 1:
        say(
            f"warning: data.min_count={min_count} leaves {len(vocab) - len(SPECIALS):,} of {len(counts):,} different "
            f"words, {known:.0%} of what the captions say; data.min_count=1 keeps them all"
        )


def make_datasets(model: CaptionModel, captions: Captions) -> tuple[Flickr8kDataset, Flickr8kDataset]:
    """Return the train and val datasets, with cached features where the encoder is frozen."""
    config, folders = model.config, image_folders(model.config.data)
    val_features: Features | None = None
    names = captions.table["image"].unique().tolist()
    if config.encoder.frozen:
        val_features = encode_dataset(model, names, folders)
        captions.keep(val_features.names)
    elif config.data.broken == "skip":
        broken = find_broken(names, folders)
        if broken:
            say(f"left out {describe_names(list(broken))} that cannot be read")
        captions.keep([name for name in names if name not in broken])
    (train, train_tokens), (val, val_tokens) = captions.of("train"), captions.of("val")
    if captions.shards:
        images, image_of, train_tokens = tar_captions(captions.shards)
    else:
        images, image_of = index_images(train)
    views = [WHOLE, *other_views(config.train.mirror, config.train.corners)]
    train_views: dict[View, Features | None] = dict.fromkeys(views)
    if config.encoder.frozen:
        for number, view in enumerate(views, start=1):
            note = f", view {number} of {len(views)}" if number > 1 else ""
            if captions.shards:
                sources = [tar for tar in captions.shards if tar.captions]
                train_views[view] = feature_cache(model, view).fill(*sources, note=note)
            else:
                train_views[view] = val_features if number == 1 else encode_dataset(model, images, folders, view, note)
        for features in (val_features, *train_views.values()):
            if features:
                features.move(model.device)
    tokens, transform, augment = train_tokens.numericalize(model.vocab), model.transform, config.train.augment
    whole = train_views.pop(WHOLE)
    weights = image_weights(images, config.data)
    train_set = Flickr8kDataset(
        images, image_of, tokens, model.vocab, folders, transform, whole, train_views, augment, weights
    )
    images, image_of = index_images(val)
    tokens = val_tokens.numericalize(model.vocab)
    return train_set, Flickr8kDataset(images, image_of, tokens, model.vocab, folders, transform, val_features)


def image_weights(images: list[str], config: DataConfig) -> np.ndarray | None:
    """Return how often each epoch is to see each picture (P,), by `data.weights`; None for once."""
    if not config.weights:
        return None
    weight_of = {prefix: weight for (prefix, _), weight in zip(datasets(config), config.weights, strict=True)}
    return np.array([weight_of[image.partition("/")[0] + "/" if len(weight_of) > 1 else ""] for image in images])


def index_images(table: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Return the pictures of a table, and the index among them of each caption's picture (N,)."""
    image_of, images = pd.factorize(table["image"])
    return images.tolist(), image_of.astype(np.int32)


def tar_captions(shards: list[Tar]) -> tuple[list[str], np.ndarray, Tokens]:
    """Return the training pictures of tars, the index of each caption's picture (N,), and the captions' tokens."""
    shards = [tar for tar in shards if tar.captions]
    images = [name for tar in shards for name in tar.names]
    captions_per_image = np.concatenate([tar.captions_per_image for tar in shards])  # (P,)
    image_of = np.repeat(np.arange(len(images), dtype=np.int32), captions_per_image)
    return images, image_of, join([tar.tokens() for tar in shards])


def features_of(model: CaptionModel, dataset: Flickr8kDataset, images: list[str]) -> torch.Tensor:
    """Return raw features (b, D) or (b, L, D) of some of a dataset's pictures."""
    features = dataset.features or encode_dataset(model, images, dataset.folders)
    return features.take(images)
