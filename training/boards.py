"""Where curves and captioned pictures are shown while a run trains: TensorBoard, Weights & Biases, or nowhere."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import distributed
from config import TrainConfig
from data.dataset import Flickr8kDataset
from data.transforms import open_picture
from models.model import CaptionModel

TENSORBOARD, WANDB = "tensorboard", "wandb"  # packages, and folders of a run
PROJECT = "image-captioning"  # at Weights & Biases


class Writer(Protocol):
    """One of these places."""

    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None: ...  # uint8 (H, W, 3)

    def flush(self) -> None: ...


class TensorBoard:
    """Writes to runs/<name>/tensorboard/; what it holds from `next_step` on, of a run that was killed, is hidden."""

    def __init__(self, folder: Path, next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(folder / TENSORBOARD, purge_step=next_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()


class Wandb:
    """Sends to Weights & Biases, or, with WANDB_MODE=offline, writes to runs/<name>/wandb/ for `wandb sync`."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: bool) -> None:
        import wandb

        kept = folder / WANDB / "id.txt"
        if not resumed:
            shutil.rmtree(folder / WANDB, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        name = kept.read_text() if kept.is_file() else secrets.token_hex(4)
        kept.write_text(name)
        self.wandb: Any = wandb
        self.run = wandb.init(project=PROJECT, name=folder.name, id=name, dir=folder, config=config, resume="allow")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def flush(self) -> None:
        pass  # it writes by itself


class Boards:
    """All that a run asks for, on the first of several processes."""

    def __init__(self, folder: Path, config: dict[str, Any], train: TrainConfig, step: int) -> None:
        self.writers: list[Writer] = []
        if distributed.rank() == 0:
            self.writers += [TensorBoard(folder, step + 1)] if train.tensorboard else []
            self.writers += [Wandb(folder, config, resumed=step > 0)] if train.wandb else []

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for writer in self.writers:
            writer.scalars(step, values)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def captions(self, step: int, model: CaptionModel, dataset: Flickr8kDataset, images: Sequence[str]) -> None:
        """Show some pictures of a dataset with features, each with its greedy caption and attention."""
        if not self.writers or dataset.features is None:
            return
        from render.attention import AttentionMaps, draw_attention
        from render.caption import draw_caption

        captions = model.generate(dataset.features.take(images), model.config.search.greedy(), keep_attention=True)
        for image, [caption] in zip(images, captions, strict=True):
            picture, attention = open_picture(dataset.folders.path(image)), AttentionMaps.of(caption)
            sheets = {"captions": draw_caption(picture, caption.text)}
            if attention:
                sheets["attention"] = draw_attention(picture, attention)
            for kind, sheet in sheets.items():
                for writer in self.writers:
                    writer.picture(step, f"{kind}/{image}", np.asarray(sheet))
