"""What TensorBoard shows of a run, below runs/<name>/tensorboard/: optional, and in the way of nothing else."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from config import UserError
from data.transforms import open_picture
from models.model import Caption
from render import WordMaps, draw_attention, draw_caption

FOLDER = "tensorboard"


class Board:
    """Curves by step, scores by epoch, and captioned pictures; without a folder it writes nothing.

    What is written at a step is what was so when as many had been made. Resuming drops what lies beyond the checkpoint,
    so that no step is there twice: TensorBoard leaves out what is from `first_step` on.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        self.writer = find_writer()(folder, purge_step=first_step) if folder else None

    def step(self, step: int, loss: float, lr: float) -> None:
        if self.writer:
            self.writer.add_scalar("step/train_loss", loss, step)
            self.writer.add_scalar("step/lr", lr, step)

    def epoch(self, step: int, scores: dict[str, float]) -> None:
        """Write a row of the loss log; `val_cider` and so on."""
        if self.writer:
            for name in scores.keys() - {"epoch", "step", "lr"}:
                self.writer.add_scalar(f"epoch/{name}", scores[name], step)

    def picture(self, step: int, path: Path, caption: Caption) -> None:
        """Show a picture with its caption and, where the decoder has attention, with where it looked for each word."""
        if self.writer:
            picture = open_picture(path)
            self.show(f"captions/{path.name}", step, draw_caption(picture, caption.text))
            looks = WordMaps.of(caption.words, caption.attention)
            if looks:
                self.show(f"attention/{path.name}", step, draw_attention(picture, looks))

    def show(self, name: str, step: int, sheet: Image.Image) -> None:
        self.writer.add_image(name, np.asarray(sheet), step, dataformats="HWC")

    def flush(self) -> None:
        """Have on the disk what was written; to be called before a checkpoint, which training may go on from."""
        if self.writer:
            self.writer.flush()


def find_writer() -> Any:
    """Return TensorBoard's SummaryWriter; raises UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "train.tensorboard needs the package tensorboard; install it: pip install -r requirements-extras.txt, "
            "or train without it: train.tensorboard=false"
        ) from None
    return SummaryWriter
