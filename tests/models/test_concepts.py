"""The decoder is told what captions of similar pictures let expect."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from data.dataset import Features, Flickr8kDataset
from data.vocab import build_vocab
from models import export, publish
from models.consensus import Consensus
from models.ensemble import load_ensemble
from models.model import DECODERS, CaptionModel
from utils import load_checkpoint, save_checkpoint

SAID = ["a dog runs", "a dog sits", "the dog sits", "a cat sits on the mat", "one cat sits on the mat"]
IMAGES = [f"{number}.jpg" for number in range(5)]
TABLE = pd.DataFrame({"image": IMAGES, "caption": SAID})
VOCAB = build_vocab(SAID, 1)
LOOKS = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).abs()
COUNT = 30


def dataset_of(table: pd.DataFrame) -> Flickr8kDataset:
    return Flickr8kDataset(table, VOCAB, Path(), None, Features([LOOKS.half()], IMAGES))  # type: ignore[arg-type]


def remembered(table: pd.DataFrame) -> Consensus:
    dataset = dataset_of(table)
    return Consensus.of(Features([LOOKS], IMAGES).take, dataset, IMAGES)


@pytest.fixture
def model(tiny_config: Callable[..., Any]) -> CaptionModel:
    model = CaptionModel.build(tiny_config(f"decoder.concepts={COUNT}", "search.beam=3"), VOCAB).eval()
    model.consensus = remembered(TABLE)
    return model


def test_concepts_are_the_words_and_pairs_that_weigh_most(model: CaptionModel) -> None:
    """Of words "cat", "on" and "mat", since "a" and "sits" are too common, and "runs" only said of one picture."""
    assert model.consensus
    known = model.consensus.weighty(6)  # (6, 5): three words and three pairs
    has = known > 0
    assert has[:3].tolist() == [[word in caption.split() for caption in SAID] for word in ("cat", "on", "mat")]
    assert (has[3:].sum(1) == 2).all()
    assert len(model.consensus.weighty(1000)) < 1000


def test_they_are_expected_by_what_is_said_of_similar_pictures(model: CaptionModel) -> None:
    assert model.consensus
    expected = model.consensus.concepts(LOOKS, COUNT)  # (5, C)
    known = model.consensus.weighty(COUNT).T  # (5, up to C)
    assert (expected[:, : known.shape[1]] * (known - known.mean(0))).sum(1).min() > 0
    assert not expected[:, known.shape[1] :].any()  # no more are known


def test_what_is_said_of_a_training_picture_has_no_part_in_what_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    known = remembered(TABLE)
    before = known.concepts_of(dataset_of(TABLE), COUNT)
    changed = known.weighty(COUNT).clone()
    changed[:, 0] = 7.0  # what is said of the first
    monkeypatch.setattr(known, "weighty", lambda count: changed)
    after = known.concepts_of(dataset_of(TABLE), COUNT)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("name", DECODERS)
def test_they_are_added_to_each_cell_alike(name: str, tiny_config: Callable[..., Any]) -> None:
    model = CaptionModel.build(tiny_config(f"decoder.concepts={COUNT}", f"decoder.name={name}"), VOCAB).eval()
    decoder = model.decoder
    assert decoder.concepts
    features, expected = torch.randn(2, *model.encoder.feature_shape), torch.randn(2, COUNT)
    added = decoder.look(model.encode(features, expected)) - decoder.project(model.standardise(features))
    told = decoder.concepts(expected)  # (2, H)
    told = told.unsqueeze(1) if decoder.grid else told
    torch.testing.assert_close(added, told.expand_as(added), atol=1e-5, rtol=1e-4)


def test_there_are_no_more_than_features_have_numbers(tiny_config: Callable[..., Any], refused: Callable) -> None:
    with refused("decoder.concepts = 513", "room for 512"):
        CaptionModel.build(tiny_config("decoder.concepts=513"), VOCAB)


def test_some_are_dropped_in_training_alone(model: CaptionModel) -> None:
    concepts = model.decoder.concepts
    assert concepts
    expected = torch.ones(1, COUNT)
    assert torch.equal(concepts(expected), concepts(expected))
    concepts.train()
    assert not torch.equal(concepts(expected), concepts(expected))


def test_their_scale_is_that_of_training_pictures(model: CaptionModel) -> None:
    concepts = model.decoder.concepts
    assert concepts
    expected = torch.randn(5, COUNT, generator=torch.Generator().manual_seed(0))
    before = concepts(expected)
    concepts.fit_scale(7 * expected)
    torch.testing.assert_close(concepts(7 * expected), before / expected.square().mean().sqrt())


def test_captions_depend_on_what_is_expected(model: CaptionModel) -> None:
    assert model.decoder.concepts
    with torch.no_grad():
        model.decoder.concepts.told.weight.mul_(100)
    scores = [each[0].score for each in model.describe(LOOKS)]
    model.consensus = remembered(TABLE.assign(caption=SAID[::-1]))
    assert scores != [each[0].score for each in model.describe(LOOKS)]


def test_a_checkpoint_gives_back_what_it_was_given(model: CaptionModel, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", model.state())
    again = CaptionModel.from_checkpoint(tmp_path / "a.pth")
    texts = [each[0].text for each in model.describe(LOOKS)]
    assert [each[0].text for each in again.describe(LOOKS)] == texts
    assert [each[0].text for each in load_ensemble([tmp_path / "a.pth"] * 2).describe(LOOKS)] == texts


def test_a_checkpoint_that_lacks_what_expects_them_is_refused(model: CaptionModel, refused: Callable[..., Any]) -> None:
    with refused("a.pth lacks", "consensus"):
        CaptionModel.from_state(model.state() | {"consensus": None}, "a.pth")


def test_a_captioner_that_needs_training_captions_is_not_given_away_without_them(
    model: CaptionModel, tmp_path: Path, refused: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "a.pth", model.state())
    with refused("decoder.concepts", "training captions"):
        publish.publishable(load_checkpoint(tmp_path / "a.pth"))
    monkeypatch.setattr("sys.argv", ["export", "--checkpoint", str(tmp_path / "a.pth")])
    with refused("decoder.concepts", "training captions"):
        export.main()


def test_they_need_a_frozen_backbone(tiny_config: Callable[..., Any], refused: Callable[..., Any]) -> None:
    with refused("decoder.concepts", "encoder.frozen"):
        tiny_config("decoder.concepts=8", "encoder.frozen=false")
