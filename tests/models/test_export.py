"""What is exported writes the captions of the checkpoint, with PyTorch and without; else nothing is written."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import exported, save_small
from PIL import Image

from captioning import Captioner
from data.transforms import Transform
from models import export, hub
from models.checkpoint import model_from_state
from models.decoder import Decoder, State
from models.model import DECODERS, CaptionModel
from utils import load_checkpoint, save_checkpoint

for package in ("safetensors", "onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
DOCS = str(Path(export.__file__).parents[1] / "docs")


@pytest.fixture
def small(tmp_path: Path) -> Callable[[str], Path]:
    """Write the checkpoint of a small model with this decoder; returns its path."""

    def save(name: str) -> Path:
        save_small(tmp_path / "checkpoints.pth", name)
        return tmp_path / "checkpoints.pth"

    return save


@pytest.mark.parametrize("name", DECODERS)
def test_captions_without_pytorch_are_those_with_it(
    name: str, drawn: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = exported(name, tmp_path_factory)
    monkeypatch.syspath_prepend(DOCS)
    import caption_with_onnx

    captioner = caption_with_onnx.Captioner(out)
    pictures = sorted((drawn / "images").iterdir())[:6]
    expected = Captioner.load(path).caption(pictures, beam=4)
    assert [captioner(Image.open(picture)) for picture in pictures] == expected
    assert len(set(expected)) > 2


@pytest.mark.parametrize("size", [(500, 375), (31, 70), (96, 200)])
def test_pictures_are_resized_without_pytorch_as_in_training(
    size: tuple[int, int], drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DOCS)
    from caption_with_onnx import squeeze

    picture = Image.open(drawn / "images/00.jpg").resize(size)
    trained_on = Transform(96).resize(picture).permute(1, 2, 0).numpy()
    off = np.abs(squeeze(np.asarray(picture), 96).astype(int) - trained_on)
    assert off.max() <= (0 if "AVX" in torch.backends.cpu.get_cpu_capability() else 1)  # its integers are of 16 bits


def test_safetensors_and_json_are_the_checkpoint(drawn: Path, tmp_path: Path, small: Callable) -> None:
    path = small("attention")
    saved = load_checkpoint(path)
    del saved["optimiser"]
    for name, content in hub.separate(saved).items():
        (tmp_path / name).write_bytes(content)
    again = hub.read_folder(tmp_path, "here")
    assert again.keys() == saved.keys()
    for part in ("decoder", "backbone"):
        assert again[part].keys() == saved[part].keys()
        assert all(torch.equal(again[part][name], saved[part][name]) for name in saved[part])
    assert (again["scores"], again["vocabulary"]) == (saved["scores"], saved["vocabulary"])
    picture = drawn / "images/00.jpg"
    model = model_from_state(again, "here").eval()
    assert Captioner(model).caption(picture) == Captioner.load(path).caption(picture)


class Off(Decoder):
    """A decoder as it is, but for logits that are a little off."""

    def __init__(self, model: CaptionModel, by: float) -> None:
        super().__init__()
        self.model, self.by = model, by

    def prepare(self, features: torch.Tensor) -> State:
        return self.model.decoder.prepare(self.model.encode(features))

    def start(self, memory: State) -> State:
        return self.model.decoder.start(memory)

    def step(self, token: torch.Tensor, state: State, memory: State) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        logits, state, attention = self.model.decoder.step(token, state, memory)
        return logits + self.by * torch.arange(logits.shape[1]), state, attention


@pytest.mark.parametrize(("by", "differ"), [(0.01, "captions"), (float("nan"), "logits by nan")])
def test_graphs_that_differ_are_not_written(
    by: float, differ: str, call: Callable, small: Callable, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    path = small("lstm")
    monkeypatch.setattr(export, "trace", lambda model: (model, by))
    monkeypatch.setattr(export, "OnnxDecoder", Off)
    assert call(export.main, "--checkpoint", path) == 2
    assert re.search(f"{differ}.* nothing was written", capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoints.pth"]


def test_what_cannot_be_exported_is_refused(
    call: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "a.pth", {"config": {}})
    assert call(export.main, "--checkpoint", tmp_path / "a.pth") == 2
    assert re.search("error: .*a.pth lacks .*; take another one", capsys.readouterr().err)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert call(export.main, "--checkpoint", tmp_path / "a.pth") == 2
    assert "onnxscript; run: pip install -r requirements-extras.txt" in capsys.readouterr().err
