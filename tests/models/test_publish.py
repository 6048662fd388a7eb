"""Checkpoints that are given away: smaller, silent about the machine they are from, and as good."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from data.vocab import build_vocab
from models import publish
from models.checkpoint import load_model, model_state
from models.encoder import file_sha256
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint


@pytest.fixture
def trained(tiny_config: Callable, tmp_path: Path) -> Path:
    """A checkpoint of a model on a frozen backbone that comes with pip, and settings that are nobody's business."""
    private = ("data.root=/home/private/archive", "data.cache=/home/private/cache", "train.start=/home/private/a.pth")
    lite = ("encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V1", "encoder.image_size=64")
    config = tiny_config(*private, *lite, "search.consensus=5")
    model = CaptionModel.build(config, build_vocab(["a red dog", "two cats run"], 1))
    save_checkpoint(tmp_path / "checkpoints.pth", model_state(model) | {"scores": {"val_cider": 50.0}})
    return tmp_path / "checkpoints.pth"


def test_what_is_given_away_is_the_same_model_in_half_the_space_and_knows_no_paths(
    trained: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    given = trained.with_name("given.pth")
    assert call(publish.main, trained, given) == 0
    assert file_sha256(given) in capsys.readouterr().out
    assert given.stat().st_size < 0.7 * trained.stat().st_size
    assert b"/home/private" in trained.read_bytes()
    assert not any(path in given.read_bytes() for path in (b"/home/private", b"site-packages"))
    own, other = load_model(trained), load_model(given)
    assert other.encoder.identity["sha256"] == own.encoder.identity["sha256"]
    torch.testing.assert_close(other.decoder.state_dict(), own.decoder.state_dict(), rtol=1e-3, atol=1e-3)
    saved = load_checkpoint(given)
    assert saved["scores"] == {"val_cider": 50.0}
    assert saved["config"]["search"]["consensus"] == 0  # training captions are not given away
    assert {path.name for path in trained.parent.iterdir()} == {"checkpoints.pth", "given.pth", "given.md"}


def test_a_card_tells_what_is_known_of_the_run_and_asks_for_the_rest(
    folder: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(publish.main, "runs/flickr8k/checkpoints.pth", "mine.pth") == 0
    assert "wrote mine.md, a model card" in capsys.readouterr().out
    card = Path("mine.md").read_text(encoding="utf-8")
    about = yaml.safe_load(card.split("---\n")[1])
    scores = json.loads(Path("runs/flickr8k/scores-test.json").read_text())
    [result] = about["model-index"][0]["results"]
    assert {"type": "bleu-4", "name": "BLEU-4", "value": round(scores["bleu4"], 2)} in result["metrics"]
    told = ["| archive | 8 | 2 | 2 |", f"`{scores['signature']}`", '`encoder.name` | `"resnet18"`', "mine.pth", "?"]
    assert all(each in card for each in told)
    assert str(folder) not in card
    Path("mine.md").write_text("my own words")
    assert call(publish.main, "runs/flickr8k/checkpoints.pth", "mine.pth") == 0
    assert Path("mine.md").read_text() == "my own words" and "left mine.md as it is" in capsys.readouterr().out


def test_nothing_but_a_checkpoint_is_written_over(
    trained: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("photo.jpg", "README.md"):
        trained.with_name(name).write_text("somebody's")
        assert call(publish.main, trained, trained.with_name(name)) == 2
        assert "is not a checkpoint of this project" in capsys.readouterr().err
        assert trained.with_name(name).read_text() == "somebody's"


def test_a_card_says_that_a_captioner_began_from_another_one(trained: Path, call: Callable[..., int]) -> None:
    assert call(publish.main, trained, trained.with_name("given.pth")) == 0
    card = trained.with_name("given.md").read_text(encoding="utf-8")
    assert "It began from `a.pth`, whose words it has" in card and "/home/private" not in card
