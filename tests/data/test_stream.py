"""A streamed dataset: an epoch in windows of a few tars, each caption once, gone on with at any batch."""

from cli import run_script

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY

import config
import evaluate
import inference_visualize
import train
from data import stream, tars
from data.stream import StreamedDataset
from data.vocab import PAD
from models.model import CaptionModel
from training.epoch import Epoch
from utils import load_checkpoint

CPU = torch.device("cpu")
SHARDS = "data.shards=tars/{00000..00005}.tar"
WORDS = (
    *TINY,
    SHARDS,
    "train.epochs=2",
    "train.checkpoint_every=1",
    "decoder.dropout=0.3",
    "train.mirror=true",
    "train.batch_size=6",
    "train.lr=1e-2",
    "train.warmup_steps=1",
)


@pytest.fixture(autouse=True)
def six_tars(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pictures in each of six tars; a window has some two of them."""
    tars.export(config.load_config().data, Path("tars"), 2)
    monkeypatch.setattr(stream, "MIXED", 15)


@pytest.fixture
def streamed(tiny_model: CaptionModel) -> StreamedDataset:
    return StreamedDataset(tars.find(config.load_config(overrides=[SHARDS]).data), tiny_model, [], CPU)


def captions(dataset: StreamedDataset, number: int, done: int = 0, by_image: bool = False) -> list[list[int]]:
    """Return the captions of an epoch, each as its first words; the picture says more of which one it is."""
    settings = config.load_config(overrides=["train.batch_size=6"]).train
    epoch = Epoch(dataset, settings, number, by_image)
    read = [
        [hash((tuple(row[row != PAD].tolist()), float(batch.pictures[place].float().sum()))) for row, place in pairs]
        for _, batch, _ in epoch.read(done)
        for pairs in [list(zip(batch.tokens, batch.owner, strict=True))]
    ]
    assert len(read) == len(epoch) - done
    return read


@pytest.mark.parametrize("by_image", [True, False])
def test_an_epoch_has_every_caption_once_in_an_order_of_its_own(streamed: StreamedDataset, by_image: bool) -> None:
    assert len(streamed.windows([0, 0])) > 1
    first, again, other = (captions(streamed, number, by_image=by_image) for number in (0, 0, 1))
    flat = [sorted(caption for batch in epoch for caption in batch) for epoch in (first, other)]
    assert len(flat[0]) == len(streamed) == 40
    assert flat[0] == flat[1] and first == again and first != other


def test_an_epoch_is_gone_on_with_at_any_batch(streamed: StreamedDataset) -> None:
    whole = captions(streamed, 0)
    for done in range(len(whole) + 1):
        assert captions(streamed, 0, done) == whole[done:]


def test_a_batch_that_was_read_can_be_named(streamed: StreamedDataset) -> None:
    epoch = Epoch(streamed, config.load_config(overrides=["train.batch_size=6"]).train, 0, by_image=True)
    for done in (0, len(epoch) // 2):
        for number, (_, batch, _) in enumerate(epoch.read(done), start=done):
            names = epoch.opened[0].images
            assert sorted(epoch.pictures(number)) == sorted(names[place] for place in batch.images)


def test_the_last_batch_of_a_window_is_known_while_it_can_be_named(streamed: StreamedDataset) -> None:
    epoch = Epoch(streamed, config.load_config(overrides=["train.batch_size=6"]).train, 0, by_image=True)
    opened = [epoch.opened[0] for _ in epoch.read(0)]
    changes = [place for place in range(1, len(opened)) if opened[place] is not opened[place - 1]]
    assert epoch.ends == [*changes, len(epoch)]


def test_no_more_than_a_window_is_in_memory(streamed: StreamedDataset) -> None:
    largest = max(tar.captions for tar in streamed.tars)
    for number in range(10):
        windows = streamed.windows([0, number])
        assert sum(window.captions for window in windows) == 40
        assert all(window.captions < stream.MIXED + largest for window in windows)
        assert all(window.captions >= stream.MIXED for window in windows[:-1])


def run(script: Callable[[], int | None], *words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *words])
        return run_script(script)


def test_tars_are_trained_on_scored_and_captioned_and_a_stopped_run_goes_on_digit_for_digit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train.main, *WORDS, "run=whole") == 0
    step, left = train.Trainer.step, [12]

    def step_or_stop(self: train.Trainer, *given: object) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(train.Trainer, "step", step_or_stop)
    assert run(train.main, *WORDS, "run=stopped") == 130
    left[0] = 1000
    assert run(train.main, "--resume", "--run", "stopped") == 0
    logs = [Path(f"runs/{name}/loss_log.txt").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    whole, stopped = (load_checkpoint(f"runs/{name}/last.pth")["decoder"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)

    capsys.readouterr()
    assert run(evaluate.main, "--run", "whole", "--split", "val", "--tokeniser", "words") == 0
    assert run(inference_visualize.main, "--run", "whole", "--split", "test") == 0
    said = capsys.readouterr().out
    assert "encoding" not in said and "cached features" in said
    assert len(list(Path("runs/whole/outputs").glob("*.jpg"))) == 2
    assert run(evaluate.main, "--run", "whole", "--split", "train") == 2
    assert "tars/{00000..00005}.tar has no train pictures" in capsys.readouterr().err


def test_tars_without_validation_pictures_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [tar for tar in tars.find(config.load_config(overrides=[SHARDS]).data) if not tar.held_out]
    assert run(train.main, *TINY, f"data.shards={pictures[0].path}") == 2
    assert "has no val pictures; name val in the JSON of some pictures" in capsys.readouterr().err
