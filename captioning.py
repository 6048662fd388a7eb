"""From pictures to features to captions: the one way there, for scripts, the demo, validation and your own code.

captioner = Captioner.load("pretrained/captioner.pth")
captioner.caption(["photo.jpg", "other.jpg"], beam=3)
"""

from cli import UserError

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

import distributed
from config import SearchConfig, change_search
from data.features import Extractor, FeatureCache, Features, Files, Opener, encode_files, read_ahead
from data.transforms import WHOLE, View, open_picture, upright
from models.ensemble import load_ensemble
from models.model import Caption, CaptionModel
from utils import pick_device

SEARCH_BATCH = 160  # pictures per search: fewer cost more overhead, more overflow a processor's cache
LONGEST_SIDE = 800  # pixels of a picture kept to be drawn


@dataclass(frozen=True)
class Picture:
    """A picture to caption: a file, or what a file holds.

    Attributes:
        image_id: names it in predictions.json; references: human captions, if known.
        content: the bytes of the file, if it is not a file on disk.
    """

    path: Path
    name: str
    image_id: str | int
    references: tuple[str, ...] = ()
    content: bytes | None = None

    def open(self) -> Image.Image:
        return open_picture(self.path, self.content)


@dataclass(frozen=True)
class Encoded:
    """A picture with its features (D,) or (L, D); `shown` is the picture, upright, and shrunk to be drawn."""

    picture: Picture
    shown: Image.Image
    features: torch.Tensor


@dataclass(frozen=True)
class Captioned:
    """A picture with its captions, the best first."""

    picture: Picture
    shown: Image.Image
    captions: list[Caption]


class Captioner:
    """A trained model, and a fast copy of its encoder, made when the first picture is encoded."""

    def __init__(self, model: CaptionModel) -> None:
        self.model = model

    @classmethod
    def load(cls, paths: str | Path | Sequence[str | Path], overrides: list[str] | None = None) -> "Captioner":
        """Load a captioner from one checkpoint, or an ensemble from several, onto the best available device.

        `overrides` are settings such as "search.beam=3". Raises UserError for files that cannot be used.
        """
        several = [paths] if isinstance(paths, str | Path) else paths
        return cls(load_ensemble([Path(path) for path in several], overrides).to(pick_device()))

    @cached_property
    def extractor(self) -> Extractor:
        model = self.model
        return Extractor(model.encoder, model.transform, model.precision, model.device)

    def caption(self, images: str | os.PathLike | Image.Image | Iterable, **settings: Any) -> list[str]:
        """Return one caption per picture; takes one path or PIL image, or several, and always returns a list.

        `settings` are those of `search` in config.yaml, such as beam=3 or length_penalty=1, in place of the model's
        own. Raises UserError for an unknown setting, and for a file that cannot be read.
        """
        options = change_search(self.model.config, settings).search
        several = [images] if isinstance(images, str | os.PathLike | Image.Image) else images
        openers = (
            partial(upright, each) if isinstance(each, Image.Image) else partial(open_picture, Path(each))
            for each in several
        )
        captions = []
        for features in batched(self.encode(openers)):
            for item in features:
                if isinstance(item, UserError):
                    raise item
            captions += [best.text for best, *_ in self.model.generate(torch.stack(features), options)]
        return captions

    def encode(self, openers: Iterable[Opener]) -> Iterator[torch.Tensor | UserError]:
        """Yield the features (D,) or (L, D) of each picture, or the error of one that cannot be read."""
        for batch in self.extractor.encode(openers):
            yield from batch

    def read(self, pictures: Sequence[Picture], known: Features | None = None) -> Iterator[Encoded | UserError]:
        """Yield each picture with its features, taken from `known`, by name, or else encoded; or its error."""
        shown: dict[int, Image.Image] = {}  # of the pictures that were opened but not yet yielded

        def open_and_show(number: int) -> Image.Image:
            picture = pictures[number].open()
            shown[number] = shrink(picture)
            return picture

        def look_up(number: int, features: Features) -> torch.Tensor | UserError:
            try:
                open_and_show(number)
            except UserError as error:
                return error
            return features.take([pictures[number].name])[0]

        numbers = range(len(pictures))
        if known is None:
            found = self.encode(partial(open_and_show, number) for number in numbers)
        else:
            batches = read_ahead(partial(look_up, features=known), numbers, SEARCH_BATCH)
            found = (each for batch in batches for each in batch)
        for number, features in enumerate(found):
            if isinstance(features, UserError):
                yield features
            else:
                yield Encoded(pictures[number], shown.pop(number), features)

    def caption_pictures(
        self,
        pictures: Sequence[Picture],
        known: Features | None = None,
        num_captions: int = 1,
        keep_attention: bool = False,
    ) -> Iterator[list[Captioned | UserError]]:
        """Yield, in batches, each picture with its captions, or its error; no picture is kept."""
        for batch in batched(self.read(pictures, known)):
            good = [item for item in batch if isinstance(item, Encoded)]
            found: Iterator[list[Caption]] = iter([])
            if good:
                features = torch.stack([item.features for item in good])  # (B, D) or (B, L, D)
                options = self.model.config.search
                found = iter(self.model.generate(features, options, num_captions, keep_attention))
            yield [
                item if isinstance(item, UserError) else Captioned(item.picture, item.shown, next(found))
                for item in batch
            ]


def probability_per_word(caption: Caption, max_length: int) -> float:
    """Return the geometric mean of the probabilities of a caption's words and of its end, where it has one."""
    return math.exp(caption.log_prob / min(len(caption.words) + 1, max_length))


def prediction(image_id: str | int, captions: list[Caption], num_captions: int) -> dict[str, Any]:
    """Return a row of COCO's results form, with all captions where more than one was asked for."""
    row: dict[str, Any] = {"image_id": image_id, "caption": captions[0].text}
    if num_captions > 1:
        row["captions"] = [{"caption": each.text, "log_prob": round(each.log_prob, 4)} for each in captions]
    return row


def batched(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == SEARCH_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def shrink(picture: Image.Image) -> Image.Image:
    """Return a picture whose longer side has at most LONGEST_SIDE pixels."""
    factor = LONGEST_SIDE / max(picture.size)
    if factor >= 1:
        return picture
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


# ---- whole datasets --------------------------------------------------------------------------------------------------


def feature_cache(model: CaptionModel, view: View = WHOLE) -> FeatureCache:
    """Return the cache of what the model's frozen encoder makes of pictures."""
    data = model.config.data
    extractor = Extractor(model.encoder, model.transform, model.precision, model.device)
    return FeatureCache(Path(data.cache), extractor, data.shard_rows, view)


def encode_dataset(
    model: CaptionModel, names: Sequence[str], folder: Path, view: View = WHOLE, note: str = ""
) -> Features:
    """Return the features of pictures in a folder: from the cache, where missing ones are encoded first, or freshly
    encoded if the backbone is trained.

    Raises UserError for a picture that cannot be read.
    """
    if model.config.encoder.frozen:
        return feature_cache(model, view).fill(Files(sorted(names), folder), note=note)
    return encode_files(Extractor(model.encoder, model.transform, model.precision, model.device), names, folder)


def caption_dataset(
    model: CaptionModel, features: Features, names: Sequence[str], options: SearchConfig | None = None
) -> dict[str, str]:
    """Return a caption for each of the pictures `names` among `features`; several processes share the work."""
    mine, captions = distributed.share(names), dict[str, str]()
    with tqdm(total=len(mine), desc="captioning", unit="img", disable=distributed.bar_hidden()) as bar:
        for first in range(0, len(mine), SEARCH_BATCH):
            batch = mine[first : first + SEARCH_BATCH]
            best = model.generate(features.take(batch), options)
            captions |= {name: each[0].text for name, each in zip(batch, best, strict=True)}
            bar.update(len(batch))
    found = dict(distributed.gather(list(captions.items())))
    return {name: found[name] for name in names}
