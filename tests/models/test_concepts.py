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
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint

SAID = ["a dog runs", "a dog sits", "a cat sits", "two boats float on the lake", "one boat floats on the lake"]
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


def test_concepts_are_the_ngrams_that_most_captions_have_weighed_as_by_cider(model: CaptionModel) -> None:
    assert model.consensus
    common = model.consensus.common(3)  # (3, 5)
    dog_sits_lake = [[word in caption.split() for caption in SAID] for word in ("a", "dog", "sits")]
    assert model.consensus.ngrams.rarity[:-1].sort().values[0] == pytest.approx(torch.tensor(5 / 3).log().item())
    assert ((common > 0) == torch.tensor(dog_sits_lake)).sum() >= 13  # "lake", "on", "the" are as common as "dog"
    torch.testing.assert_close(common.sum(1), torch.zeros(3))


def test_they_are_expected_by_what_is_said_of_similar_pictures(model: CaptionModel) -> None:
    assert model.consensus
    expected = model.consensus.concepts(LOOKS, COUNT)  # (5, C)
    known = model.consensus.common(COUNT).T  # (5, up to C)
    assert (expected[:, : known.shape[1]] * known).sum(1).min() > 0
    assert not expected[:, known.shape[1] :].any()  # there are no more n-grams


def test_what_is_said_of_a_training_picture_has_no_part_in_what_it_is_told() -> None:
    changed = TABLE.assign(caption=[SAID[1], *SAID[1:]])  # of the first picture, other words that are known
    told = [remembered(table).expected_of(dataset_of(table), IMAGES, COUNT) for table in (TABLE, changed)]
    number = {table["caption"][0]: remembered(table).ngrams.count for table in (TABLE, changed)}
    assert set(number.values()) == {13}  # the same n-grams, so that concepts can be compared
    rarity = [remembered(table).ngrams.rarity for table in (TABLE, changed)]
    assert not torch.equal(*rarity)  # but how rare they are has changed a little, and so have all weights
    torch.testing.assert_close(told[0][0], told[1][0], atol=0.05, rtol=0.2)
    assert (told[0][1] - told[1][1]).abs().max() > 0.1  # of the second, which the first has something to say of


def test_they_are_added_to_each_cell_alike(tiny_config: Callable[..., Any]) -> None:
    grid = CaptionModel.build(tiny_config(f"decoder.concepts={COUNT}", "decoder.name=attention"), VOCAB).eval()
    assert grid.decoder.concepts
    cells, expected = torch.randn(2, *grid.encoder.feature_shape), torch.randn(2, COUNT)
    added = grid.encode(cells, expected) - grid.standardise(cells)  # (2, L, D)
    told = grid.decoder.concepts(expected).unsqueeze(1).expand_as(added)
    torch.testing.assert_close(added, told, atol=1e-5, rtol=1e-4)


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
    concepts.fit_scale(torch.tensor([[3.0, -4.0], [0.0, 5.0]]))
    assert concepts.scale.item() == pytest.approx((50 / 4) ** 0.5)


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
