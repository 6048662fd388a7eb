"""Checkpoints that are given away: smaller, silent about the machine they are from, and as good."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data.vocab import build_vocab
from models import publish
from models.encoder import file_sha256
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def trained(tiny_config: Callable, tmp_path: Path) -> Path:
    """A checkpoint of a model on a frozen backbone that comes with pip, and settings that are nobody's business."""
    private = ("data.root=/home/private/archive", "data.cache=/home/private/cache", "train.start=/home/private/a.pth")
    lite = ("encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V1", "encoder.image_size=64")
    model = CaptionModel.build(tiny_config(*private, *lite), build_vocab(["a red dog", "two cats run"], 1))
    save_checkpoint(tmp_path / "checkpoints.pth", model.state() | {"scores": {"val_cider": 50.0}})
    return tmp_path / "checkpoints.pth"


def test_what_is_given_away_is_half_as_large_and_knows_no_paths(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.pth"
    monkeypatch.setattr("sys.argv", ["publish.py", str(trained), str(given)])
    publish.main()
    assert file_sha256(given) in capsys.readouterr().out
    assert given.stat().st_size < 0.7 * trained.stat().st_size
    assert b"/home/private" in trained.read_bytes()
    assert b"/home/private" not in given.read_bytes()
    assert b"site-packages" not in given.read_bytes()


def test_what_is_given_away_is_the_same_model(trained: Path, tmp_path: Path) -> None:
    own = CaptionModel.from_checkpoint(trained)
    save_checkpoint(tmp_path / "given.pth", publish.publishable(own.state()))
    given = CaptionModel.from_checkpoint(tmp_path / "given.pth")
    assert given.encoder.identity["sha256"] == own.encoder.identity["sha256"]
    weights = given.decoder.state_dict()
    assert all(
        torch.allclose(weights[name], each, rtol=1e-3, atol=1e-3) for name, each in own.decoder.named_parameters()
    )
    assert all(each.dtype == torch.float32 for each in weights.values())


def test_training_captions_are_not_given_away(trained: Path) -> None:
    saved = load_checkpoint(trained)
    searched = saved["config"]["search"] | {"consensus": 5.0}
    remembering = saved | {
        "consensus": {"words": torch.tensor([4, 5])},
        "config": saved["config"] | {"search": searched},
    }
    given = publish.publishable(remembering)
    assert given["consensus"] is None
    assert given["config"]["search"]["consensus"] == 0


def test_settings_are_refused_since_it_takes_none(
    trained: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    for wrong in ("run=other", "--run"):
        monkeypatch.setattr("sys.argv", ["publish.py", str(trained), "given.pth", wrong])
        with refused(f"there is no {wrong}; --help tells"):
            publish.main()
