"""Captions of a beam are ranked by what people say of pictures that look alike."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from data.dataset import Features, Flickr8kDataset
from data.vocab import build_vocab
from models.consensus import Consensus, NGrams, forget
from models.ensemble import load_ensemble
from models.model import CaptionModel
from models.search import Hypothesis
from training.objectives import CiderReward
from utils import load_checkpoint, save_checkpoint

# What is said of dogs, of cats and of boats, each of two pictures, so that every n-gram is known.
SAID = {
    "dog": ["a brown dog runs over the grass", "the dog is running"],
    "cat": ["two cats sleep on a red sofa", "the cats are asleep"],
    "boat": ["a man in a boat on the lake", "the boat floats"],
}
IMAGES = [f"{kind}{number}.jpg" for kind in SAID for number in (1, 2)]
ROWS = [(image, caption) for image in IMAGES for caption in SAID[image[:-5]]]
TABLE = pd.DataFrame(ROWS, columns=["image", "caption"])
VOCAB = build_vocab(TABLE["caption"].tolist(), 1)
LOOKS = torch.eye(6, 8).reshape(3, 2, 8).cumsum(1).flatten(0, 1)  # (6, 8): two of a kind look alike


def ids(caption: str) -> list[int]:
    return VOCAB.numericalize(caption)


def hypotheses(*captions: str) -> list[Hypothesis]:
    return [Hypothesis(ids(caption), -1.0, -1.0) for caption in captions]


@pytest.fixture
def consensus(tiny_model: CaptionModel) -> Consensus:
    features = Features([LOOKS.half()], IMAGES)
    dataset = Flickr8kDataset(TABLE, VOCAB, Path(), tiny_model.transform, features)
    return Consensus.of(features.take, dataset, IMAGES)


def test_the_caption_most_like_those_of_similar_pictures_comes_first(consensus: Consensus) -> None:
    found = [hypotheses(*(captions[0] for captions in SAID.values()))] * 3
    best = [ranked[0].ids for ranked in consensus.rank(LOOKS[[0, 2, 4]], found, weight=1.0)]
    assert best == [ids(captions[0]) for captions in SAID.values()]


def test_the_regression_that_ranks_is_not_the_one_that_training_goes_by(consensus: Consensus) -> None:
    assert consensus.for_ranking.sharpness < consensus.for_learning.sharpness
    found, weight = [hypotheses(SAID["dog"][0])], 1.0
    [[ranked]] = consensus.rank(LOOKS[:1], found, weight)
    votes = consensus.for_ranking.votes(consensus.looks(LOOKS[:1]))
    expected = consensus.expect(votes, torch.tensor([found[0][0].ids]), torch.tensor([0]))
    assert ranked.score == pytest.approx(-1.0 + float(expected))


def test_the_models_own_score_counts_beside_it(consensus: Consensus) -> None:
    liked, probable = hypotheses("the dog is running", "the boat floats")
    probable = Hypothesis(probable.ids, -0.5, -0.5)
    for weight, first in ((0.01, probable), (1.0, liked)):
        [ranked] = consensus.rank(LOOKS[:1], [[probable, liked]], weight)
        assert ranked[0].ids == first.ids
        assert ranked[0].score > first.score
        assert ranked[0].log_prob == first.log_prob


def test_what_is_expected_is_the_cider_that_voting_pictures_would_give() -> None:
    """With one vote alone it is CIDEr-D itself, but for the length, of which the mean counts: so take equal ones."""
    captions = ["a brown dog runs over the sofa", "a man in the grass on sofa", "two cats sleep on a lake", "the dog"]
    table = TABLE.assign(caption=[caption for image in IMAGES for caption in [SAID[image[:-5]][0]] * 2])
    features = Features([LOOKS.half()], IMAGES)
    dataset = Flickr8kDataset(table, VOCAB, Path(), None, features)  # type: ignore[arg-type]
    alone = Consensus.of(features.take, dataset, IMAGES)
    reward = CiderReward([[ids(caption) for caption in table["caption"][table["image"] == image]] for image in IMAGES])
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids(caption)) for caption in captions], batch_first=True)
    for picture in range(6):
        owner = torch.full((len(captions),), picture)
        expected = alone.expect(torch.eye(6), tokens, owner)
        torch.testing.assert_close(expected, torch.tensor(reward(list(map(ids, captions)), picture)))


def test_grids_are_seen_as_the_mean_of_their_cells(consensus: Consensus) -> None:
    cells = torch.stack([LOOKS - 1, LOOKS + 1], dim=1)  # (6, 2, 8)
    torch.testing.assert_close(consensus.looks(cells), consensus.looks(LOOKS))


def test_ngrams_of_a_single_picture_and_unknown_words_only_lengthen_a_caption() -> None:
    captions = torch.tensor([[4, 5, 6], [4, 5, 7], [4, 8, 0]])
    ngrams = NGrams(captions, torch.tensor([0, 1, 2]))
    assert ngrams.count == 3  # 4, 5 and "4 5"
    row, number, weight = ngrams.weigh(torch.tensor([[5, 0], [5, 99], [99, 98]]))
    assert row.tolist() == [0, 1]
    assert number[0] == number[1]
    assert weight[0] == 1 > weight[1] > 0


def test_a_caption_without_words_expects_nothing(consensus: Consensus) -> None:
    [ranked] = consensus.rank(LOOKS[:1], [[Hypothesis([], -0.1, -0.1), *hypotheses("a dog")]], weight=5.0)
    assert [len(each.ids) for each in ranked] == [2, 0]
    assert ranked[1].score == pytest.approx(-0.1)


# ---- in a checkpoint ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tiny_config: Callable[..., Any]) -> dict[str, Any]:
    """What a model holds that ranks by consensus, of six pictures with features of 512 numbers."""
    model = CaptionModel.build(tiny_config("search.beam=4", "search.consensus=5"), VOCAB)
    features = Features([torch.randn(6, 512, generator=torch.Generator().manual_seed(0)).half()], IMAGES)
    dataset = Flickr8kDataset(TABLE, VOCAB, Path(), model.transform, features)
    model.consensus = Consensus.of(features.take, dataset, IMAGES)
    return model.state()


@pytest.fixture
def trained(state: dict[str, Any], tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "checkpoints.pth", state)
    return tmp_path / "checkpoints.pth"


FEATURES = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))


def test_it_reorders_what_the_beam_found(trained: Path) -> None:
    model = CaptionModel.from_checkpoint(trained)
    plain = model.config.search.model_copy(update={"consensus": 0.0})
    by_score, ranked = model.describe(FEATURES, plain, num_captions=4), model.describe(FEATURES, num_captions=4)
    for before, after in zip(by_score, ranked, strict=True):
        assert {each.words for each in before} == {each.words for each in after}
        assert [each.score for each in after] == sorted((each.score for each in after), reverse=True)
    assert [each[0].text for each in model.describe(FEATURES)] == [each[0].text for each in ranked]


def test_very_long_captions_are_cut(tiny_model: CaptionModel) -> None:
    table = TABLE.assign(caption=TABLE["caption"] + " a dog" * 500)
    dataset = Flickr8kDataset(table, VOCAB, Path(), tiny_model.transform)
    known = Consensus.of(Features([LOOKS.half()], IMAGES).take, dataset, IMAGES)
    assert known.captions.shape == (12, 50)


def test_captions_that_are_asked_for_beside_a_beam_of_one_are_ranked(trained: Path) -> None:
    model = CaptionModel.from_checkpoint(trained)
    narrow = model.config.search.model_copy(update={"beam": 1})
    assert model.describe(FEATURES, narrow, num_captions=4) == model.describe(FEATURES, num_captions=4)


def test_greedy_search_and_drawing_do_without(trained: Path) -> None:
    model = CaptionModel.from_checkpoint(trained)
    model.consensus = None
    for changes in ({"beam": 1}, {"temperature": 1.0}, {"consensus": 0.0}):
        assert model.describe(FEATURES, model.config.search.model_copy(update=changes))


def test_a_checkpoint_without_says_how_to_add_it(trained: Path, refused: Callable[..., Any]) -> None:
    save_checkpoint(trained, load_checkpoint(trained) | {"consensus": None})
    with refused("search.consensus = 5", "set it to 0", "--resume --run NAME search.consensus=5"):
        CaptionModel.from_checkpoint(trained).describe(FEATURES)


def test_a_checkpoint_gives_back_what_it_was_given(trained: Path) -> None:
    one, other = CaptionModel.from_checkpoint(trained), CaptionModel.from_checkpoint(trained)
    save_checkpoint(trained, other.state())
    again = CaptionModel.from_checkpoint(trained)
    assert one.describe(FEATURES) == again.describe(FEATURES)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("pictures", torch.zeros(6, 4)),
        ("pictures", torch.full((6, 512), float("nan"))),
        ("pictures", torch.zeros(0, 512)),
        ("pictures", torch.ones(8001, 512)),
        ("centre", torch.zeros(3)),
        ("words", torch.tensor([9999] * 60)),
        ("lengths", torch.tensor([1] * 12)),
        ("lengths", torch.tensor([-1] * 12)),
        ("owner", torch.tensor([6] * 12)),
        ("owner", torch.tensor([0] * 11)),
        ("owner", torch.tensor(3)),
    ],
)
def test_a_damaged_one_is_refused(
    state: dict[str, Any], part: str, value: torch.Tensor, refused: Callable[..., Any]
) -> None:
    with refused("a.pth is damaged", "consensus"):
        Consensus.from_state(state["consensus"] | {part: value}, 512, len(VOCAB), "a.pth")


def test_looks_without_measure_are_brought_to_it(state: dict[str, Any]) -> None:
    for pictures in (torch.full((6, 512), 1e30), torch.zeros(6, 512)):
        known = Consensus.from_state(state["consensus"] | {"pictures": pictures}, 512, len(VOCAB), "a.pth")
        assert known.for_ranking.votes(known.looks(FEATURES)).isfinite().all()


def test_several_captioners_are_ranked_by_what_the_first_remembers(trained: Path) -> None:
    together = load_ensemble([trained, trained])
    assert [each[0].text for each in together.describe(FEATURES)] == [
        each[0].text for each in CaptionModel.from_checkpoint(trained).describe(FEATURES)
    ]


def test_forgetting_leaves_the_same_model_without_anybodys_captions(trained: Path) -> None:
    model = CaptionModel.from_state(forget(load_checkpoint(trained)), "forgotten").eval()
    assert model.consensus is None
    assert model.config.search.consensus == 0
    assert model.describe(FEATURES)
