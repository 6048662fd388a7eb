"""Small models as `models.export` writes them: tracing one takes seconds, so that all tests share them."""

import os
from pathlib import Path

import pytest
import torch
from conftest import SCENES, load_tiny_config
from dataset_files import run
from filelock import FileLock

from data import sample
from data.vocab import build_vocab
from models import export
from models.checkpoint import model_state
from models.model import CaptionModel
from utils import save_checkpoint

ALEXNET = ("encoder.name=alexnet", "encoder.image_size=96", "search.max_length=7")  # few layers, four regions
DEEP = {
    "lstm": ["decoder.num_layers=2"],
    "attention": [],
    "transformer": ["decoder.num_layers=2", "decoder.encoder_layers=1", "decoder.num_heads=4"],
}
SCALE, NOISE = {"lstm": 2, "attention": 2, "transformer": 1}, {"lstm": 0, "attention": 0, "transformer": 0.3}


def save_small(path: Path, name: str) -> None:
    """Write the checkpoint of a small model with this decoder, whose captions differ from picture to picture."""
    vocab = build_vocab([caption for scene in SCENES for caption in sample.describe(scene)], min_count=1)
    model = CaptionModel.build(load_tiny_config(*ALEXNET, f"decoder.name={name}", *DEEP[name]), vocab).eval()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.copy_(parameter.half())  # as in what is given away, so that halves lose nothing
        model.fit_statistics(model.encoder(torch.randn(8, 3, 96, 96)))
        for parameter in model.decoder.parameters():
            parameter.mul_(SCALE[name]).add_(torch.randn(parameter.shape), alpha=NOISE[name])
            parameter.copy_(parameter.half())
    save_checkpoint(path, model_state(model) | {"scores": {"val_cider": 12.5}, "optimiser": {}})


def exported(name: str, factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the checkpoint of a small model with this decoder, and the folder into which `models.export` wrote it,
    with a beam of 4: to read, not to change.
    """
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # one for all processes
    path, out = root / f"exported-{name}" / "checkpoints.pth", root / f"exported-{name}" / "export"
    with FileLock(root / f"exported-{name}.lock"):
        if not out.is_dir():
            save_small(path, name)
            assert run(export.main, "--checkpoint", path, "search.beam=4") == 0
    return path, out
