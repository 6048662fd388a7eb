"""What TensorBoard shows of a run, in runs/<name>/tensorboard/: curves, and captioned pictures. Optional."""

from cli import UserError

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.dataset import Flickr8kDataset
from data.transforms import open_picture
from models.model import CaptionModel

FOLDER = "tensorboard"


class Board:
    """Writes what TensorBoard shows, at the step that was just made; without a folder it writes nothing.

    Args:
        first_step: the first one that is still to be made. What the folder holds of it and later ones, which a resumed
            run makes again, is shown no more.
    """

    def __init__(self, folder: Path | None, first_step: int = 1) -> None:
        self.writer: Any = find_writer()(folder, purge_step=first_step) if folder else None

    def step(self, step: int, loss: float, lr: float) -> None:
        if self.writer:
            self.writer.add_scalar("step/train_loss", loss, step)
            self.writer.add_scalar("step/lr", lr, step)

    def epoch(self, row: dict[str, float]) -> None:
        """Draw a row of loss_log.txt."""
        if self.writer:
            for name in row.keys() - {"epoch", "step", "lr"}:
                self.writer.add_scalar(f"epoch/{name}", row[name], row["step"])

    def pictures(self, step: int, model: CaptionModel, dataset: Flickr8kDataset, images: Sequence[str]) -> None:
        """Show some pictures of a dataset with features, each with its greedy caption and where the decoder looked."""
        if not self.writer or dataset.features is None:
            return
        from render import WordMaps, draw_attention, draw_caption  # not for those who ask for no board

        features = dataset.features.take(images)
        captions = model.describe(features, model.config.search.greedy(), keep_attention=True)
        for image, [caption] in zip(images, captions, strict=True):
            picture, looks = open_picture(dataset.folder / image), WordMaps.of(caption)
            self.show(f"captions/{image}", draw_caption(picture, caption.text), step)
            if looks:
                self.show(f"attention/{image}", draw_attention(picture, looks), step)

    def show(self, name: str, sheet: Image.Image, step: int) -> None:
        self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")

    def flush(self) -> None:
        """Have everything on the disk, before a checkpoint says that training may go on from there."""
        if self.writer:
            self.writer.flush()


def find_writer() -> Any:
    """Return TensorBoard's SummaryWriter; raises UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard=true needs the package tensorboard; run: pip install -r requirements-extras.txt, "
            "or train without it: train.tensorboard=false"
        ) from None
    return SummaryWriter
