"""From pictures to features to captions: shared by the scripts, the demo, validation and your own code.

captioner = Captioner.load("pretrained/captioner.pth")
captioner.caption(["photo.jpg", "other.jpg"], beam=3)
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from tqdm import tqdm

import distributed
from cli import UserError, say
from config import SearchConfig, change_search
from data.features import (
    SHOWN,
    Extractor,
    FeatureCache,
    Features,
    Files,
    Opener,
    encode_files,
    read_ahead,
    stack,
)
from data.folders import ImageFolders, plural
from data.transforms import WHOLE, View, open_picture, upright
from models.confidence import UNSURE
from models.ensemble import load_ensemble
from models.model import Caption, CaptionModel
from utils import pick_device

SEARCH_BATCH = 160  # pictures per search: fewer cost more overhead, more overflow a processor's cache
LONGEST_SIDE = 800  # pixels of the copy of a picture that is kept for drawing
DRAWN_SIDE = 600  # pixels of its shorter side that are enough for that

Item = TypeVar("Item")


@dataclass(frozen=True)
class Picture:
    """A picture to caption: a file, or what a file holds."""

    path: Path
    name: str
    image_id: str | int  # names it in predictions.json
    references: tuple[str, ...] = ()  # human captions, if known
    content: bytes | None = None  # of the file, if it is not on disk

    def open(self, least: int = DRAWN_SIDE) -> Image.Image:
        return open_picture(self.path, self.content, max(least, DRAWN_SIDE))


@dataclass(frozen=True)
class Encoded:
    """A picture with its features (D,) or (L, D); `shown` is the picture, upright, and shrunk to be drawn."""

    picture: Picture
    shown: Image.Image
    features: torch.Tensor


class Captioner:
    """A trained model, and a fast copy of its encoder, made when the first picture is encoded."""

    def __init__(self, model: CaptionModel) -> None:
        self.model = model

    @classmethod
    def load(cls, paths: str | Path | Sequence[str | Path], overrides: list[str] | None = None) -> "Captioner":
        """Load a captioner from one checkpoint, or an ensemble from several, onto the best available device.

        A checkpoint is a file, or hf://user/name on the Hugging Face Hub. `overrides` are settings such as
        "search.beam=3". Raises UserError for files that cannot be used.
        """
        several = [paths] if isinstance(paths, str | Path) else paths
        return cls(load_ensemble(list(several), overrides).to(pick_device()))

    @cached_property
    def extractor(self) -> Extractor:
        return make_extractor(self.model)

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
        for batch in batched(self.encode(openers)):
            features = stack(batch)  # (B, D) or (B, L, D)
            captions += [best.text for best, *_ in self.model.generate(features, options)]
        return captions

    def encode(self, openers: Iterable[Opener]) -> Iterator[torch.Tensor | UserError]:
        """Yield the features (D,) or (L, D) of each picture, or the error of one that cannot be read."""
        return chain.from_iterable(self.extractor.encode(openers))

    def read(self, pictures: Sequence[Picture], known: Features | None = None) -> Iterator[Encoded | UserError]:
        """Yield each picture with its features, taken from `known`, by name, or else encoded; or its error."""
        if known is not None:
            yield from chain.from_iterable(read_ahead(partial(look_up, features=known), pictures, SEARCH_BATCH))
            return
        shown: dict[Picture, Image.Image] = {}  # of the pictures that were opened but not yet yielded

        def open_and_keep_copy(picture: Picture, least: int) -> Image.Image:
            opened = picture.open(least)
            shown[picture] = shrink(opened)
            return opened

        encoded = self.encode(partial(open_and_keep_copy, picture) for picture in pictures)
        for picture, features in zip(pictures, encoded, strict=True):
            yield features if isinstance(features, UserError) else Encoded(picture, shown.pop(picture), features)

    def caption_pictures(
        self,
        pictures: Sequence[Picture],
        known: Features | None,
        num_captions: int = 1,
        keep_attention: bool = False,
        each_read: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[list[tuple[Encoded, list[Caption]]], list[UserError]]]:
        """Yield, in batches, pictures with their captions, the best first, and the errors of those without.

        `each_read` is called whenever a picture has been read.
        """

        def read() -> Iterator[Encoded | UserError]:
            for item in self.read(pictures, known):
                each_read()
                yield item

        for batch in batched(read()):
            good = [item for item in batch if isinstance(item, Encoded)]
            captions: list[list[Caption]] = []
            if good:
                features = torch.stack([item.features for item in good])  # (B, D) or (B, L, D)
                captions = self.model.generate(features, None, num_captions, keep_attention)
            yield list(zip(good, captions, strict=True)), [item for item in batch if isinstance(item, UserError)]


def look_up(picture: Picture, features: Features) -> Encoded | UserError:
    try:
        return Encoded(picture, shrink(picture.open()), features.take([picture.name])[0])
    except UserError as error:
        return error


def doubt(caption: Caption) -> str:
    """Return what is to be said of a caption that is probably not right, such as "unsure; perhaps: school bus"; nothing
    of one that probably is, and of those of a model that was never calibrated.
    """
    if caption.confidence is None or caption.confidence >= UNSURE:
        return ""
    return f"unsure; perhaps: {', '.join(caption.perhaps)}" if caption.perhaps else "unsure"


def prediction(image_id: str | int, captions: list[Caption], num_captions: int) -> dict[str, Any]:
    """Return an entry in COCO's results format, with how sure the model is of the caption, where it was
    calibrated, and with all captions, where more than one was asked for.
    """
    row: dict[str, Any] = {"image_id": image_id, "caption": captions[0].text}
    if captions[0].confidence is not None:
        row |= {"confidence": round(captions[0].confidence, 3), "perhaps": list(captions[0].perhaps)}
    if num_captions > 1:
        row["captions"] = [{"caption": each.text, "log_prob": round(each.log_prob, 4)} for each in captions]
    return row


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    left = iter(items)
    while batch := list(islice(left, SEARCH_BATCH)):
        yield batch


def shrink(picture: Image.Image) -> Image.Image:
    """Return a picture whose longer side has at most LONGEST_SIDE pixels."""
    factor = LONGEST_SIDE / max(picture.size)
    if factor >= 1:
        return picture
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    return picture.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def make_extractor(model: CaptionModel) -> Extractor:
    """Return what makes features of pictures as the model's settings say; its fast encoder is made when it is used."""
    folder = Path(model.config.data.cache)
    return Extractor(model.encoder, model.transform, model.encoder_precision, model.device, folder)


def feature_cache(model: CaptionModel, view: View = WHOLE) -> FeatureCache:
    """Return the feature cache of the model's frozen encoder."""
    data = model.config.data
    return FeatureCache(Path(data.cache), make_extractor(model), data.shard_rows, view)


def encode_dataset(
    model: CaptionModel, names: Sequence[str], folders: ImageFolders, view: View = WHOLE, note: str = ""
) -> Features:
    """Return the features of a dataset's pictures: from the cache, where missing ones are encoded first, or freshly
    encoded while the backbone is being fine-tuned.

    Pictures that cannot be read are left out where `data.broken` says so; else raises UserError, which names them.
    """
    skip = model.config.data.broken == "skip"
    if model.config.encoder.frozen:
        features = feature_cache(model, view).fill(*Files.group(names, folders), note=note, skip_broken=skip)
    else:
        features = encode_files(Captioner(model).extractor, names, folders, skip)
    if len(features.names) < len(names):
        known = set(features.names)
        say(f"left out {describe_names([name for name in names if name not in known])} that cannot be read")
    return features


def describe_names(names: Sequence[str]) -> str:
    """Return how many pictures these are, and what the first of them are called."""
    shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
    return f"{plural(len(names), 'picture', 'pictures')} ({shown})"


def caption_dataset(
    model: CaptionModel, features: Features, names: Sequence[str], options: SearchConfig | None = None
) -> dict[str, str]:
    """Return a caption for each of the pictures `names` among `features`; several processes share the work."""
    mine, captions = distributed.share(names), dict[str, str]()
    with tqdm(total=len(mine), desc="captioning", unit="img", disable=distributed.bar_hidden()) as bar:
        for batch in batched(mine):
            best = model.generate(features.take(batch), options)
            captions |= {name: each[0].text for name, each in zip(batch, best, strict=True)}
            bar.update(len(batch))
    found = dict(distributed.gather(list(captions.items())))
    return {name: found[name] for name in names}
