"""Untrained captioners whose captions differ all the same: shared by the tests of whatever captions pictures."""

from pathlib import Path

import torch
from conftest import SCENES

from config import Config
from data import sample
from data.transforms import open_picture
from data.vocab import Vocabulary, build_vocab
from models.checkpoint import model_state
from models.model import CaptionModel
from utils import save_checkpoint


def save_captioner(
    path: Path, config: Config, images: Path, vocab: Vocabulary | None = None, sharper: float = 2.5
) -> CaptionModel:
    """Save a model whose features are standardised for the pictures in `images`, and whose weights are `sharper`."""
    known = build_vocab([caption for scene in SCENES for caption in sample.describe(scene)], min_count=1)
    model = CaptionModel.build(config, vocab or known)
    with torch.no_grad():
        pixels = [model.transform(open_picture(picture)) for picture in sorted(images.iterdir())]
        model.fit_statistics(model.encoder(torch.stack(pixels)))
        for parameter in model.decoder.parameters():
            parameter.mul_(sharper)
    save_checkpoint(path, model_state(model))
    return model
