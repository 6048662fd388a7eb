"""Captions of a beam are ranked by what people say of similar pictures, which consensus.pth holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset

from data.dataset import pad
from data.vocab import build_vocab
from models import publish
from models.checkpoint import load_model, model_state
from models.compact_consensus import CompactConsensus
from models.consensus import Consensus, KernelRegression, NGrams
from models.ensemble import load_ensemble
from models.model import CaptionModel
from models.search import Hypothesis
from training.losses import CiderReward
from utils import load_checkpoint, save_checkpoint

# What is said of dogs, of cats and of boats, each of two pictures, so that every n-gram is known.
SAID = {
    "dog": ["a brown dog runs over the grass", "the dog is running"],
    "cat": ["two cats sleep on a red sofa", "the cats are asleep"],
    "boat": ["a man in a boat on the lake", "the boat floats"],
}
IMAGES = [f"{kind}{number}.jpg" for kind in SAID for number in (1, 2)]
ROWS = [(image, caption) for image in IMAGES for caption in SAID[image[:-5]]]
VOCAB = build_vocab([caption for _, caption in ROWS], 1)
ALIKE = torch.eye(6, 8).reshape(3, 2, 8).cumsum(1).flatten(0, 1)  # (6, 8): two of a kind have similar features
UNIT = F.normalize(ALIKE)


def remember(features: torch.Tensor, rows: list[tuple[str, str]] = ROWS) -> Consensus:
    dataset = make_dataset(rows, VOCAB, features)
    return Consensus.fit(dataset.features.take, dataset, IMAGES)  # type: ignore[union-attr]


def ids(caption: str) -> list[int]:
    return VOCAB.numericalize(caption)


def hypotheses(*captions: str) -> list[Hypothesis]:
    return [Hypothesis(ids(caption), -1.0, -1.0) for caption in captions]


@pytest.fixture(scope="module")
def consensus() -> Consensus:
    return remember(ALIKE)


# ---- kernel ridge regression -----------------------------------------------------------------------------------------


def test_weights_predict_what_kernel_ridge_regression_on_the_difference_from_the_mean_does() -> None:
    generator = torch.Generator().manual_seed(0)
    known, others = (F.normalize(torch.randn(count, 8, generator=generator)) for count in (6, 3))
    target = torch.randn(6, generator=generator)
    kernel = torch.exp(3 * (known @ known.T - 1)) + 0.5 * torch.eye(6)
    similar = torch.exp(3 * (others @ known.T - 1))
    predicted = target.mean() + similar @ torch.linalg.solve(kernel, target - target.mean())
    torch.testing.assert_close(KernelRegression(known, 3.0, 0.5).weights(others) @ target, predicted)


def test_a_picture_is_left_out_as_if_it_had_never_been_remembered() -> None:
    known = F.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
    whole = KernelRegression(known, 2.0, 0.1)
    weights = whole.weights(known, own=torch.tensor([0, 1, 2, -1, 4, 5]))
    for left_out in (0, 1, 2, 4, 5):
        others = [row for row in range(6) if row != left_out]
        without = KernelRegression(known[others], 2.0, 0.1).weights(known[[left_out]])
        torch.testing.assert_close(weights[left_out, others], without[0], atol=1e-5, rtol=1e-4)
        assert weights[left_out, left_out] == 0
    torch.testing.assert_close(weights[3], whole.weights(known)[3], atol=1e-5, rtol=1e-4)
    assert KernelRegression(UNIT[:1], 2.0, 0.1).weights(UNIT[:1], own=torch.tensor([0])).tolist() == [[0.0]]


# ---- ranking ---------------------------------------------------------------------------------------------------------


def test_the_caption_most_like_those_of_similar_pictures_comes_first(consensus: Consensus) -> None:
    found = [hypotheses(*(captions[0] for captions in SAID.values()))] * 3
    best = [ranked[0].ids for ranked in consensus.rank(ALIKE[[0, 2, 4]], found, weight=1.0)]
    assert best == [ids(captions[0]) for captions in SAID.values()]


def test_the_models_own_score_counts_beside_it(consensus: Consensus) -> None:
    [liked], probable = hypotheses("the dog is running"), Hypothesis(ids("the boat floats"), -0.5, -0.5)
    for weight, first in ((0.01, probable), (1.0, liked)):
        [ranked] = consensus.rank(ALIKE[:1], [[probable, liked]], weight)
        assert ranked[0].ids == first.ids
        assert ranked[0].score > first.score
        assert ranked[0].log_prob == first.log_prob
    smoother, sharper = consensus.ranking, consensus.reward  # search ranks by another regression than training rewards
    assert smoother.sharpness < sharper.sharpness
    weights = smoother.weights(consensus.embed(ALIKE[:1]))
    expected = consensus.expected_cider(*consensus.mean(weights), torch.tensor([liked.ids]), torch.tensor([0]))
    [[ranked_alone]] = consensus.rank(ALIKE[:1], [[liked]], 1.0)
    assert ranked_alone.score == pytest.approx(-1.0 + float(expected))
    assert ranked_alone.cider == pytest.approx(float(expected))


def test_a_caption_without_words_expects_nothing(consensus: Consensus) -> None:
    [ranked] = consensus.rank(ALIKE[:1], [[Hypothesis([], -0.1, -0.1), *hypotheses("a dog")]], weight=5.0)
    assert [len(each.ids) for each in ranked] == [2, 0]
    assert ranked[1].score == pytest.approx(-0.1)


def test_what_is_expected_is_the_cider_that_similar_pictures_would_give() -> None:
    """With all weight on one picture it is CIDEr-D, but for the length, of which the mean counts: so all are equal."""
    captions = ["a brown dog runs over the sofa", "a man in the grass on sofa", "two cats sleep on a lake", "the dog"]
    rows = [(image, SAID[image[:-5]][0]) for image in IMAGES for _ in range(2)]
    reward = CiderReward([[ids(caption) for image, caption in rows if image == each] for each in IMAGES])
    tokens, alone = pad(list(map(ids, captions))), remember(ALIKE, rows)
    for picture in range(6):
        of = torch.full((len(captions),), picture)
        expected = alone.expected_cider(*alone.mean(torch.eye(6)), tokens, of)
        torch.testing.assert_close(expected, torch.tensor(reward(list(map(ids, captions)), picture)))


def test_regions_are_compared_by_their_mean(consensus: Consensus) -> None:
    regions = torch.stack([ALIKE - 1, ALIKE + 1], dim=1)  # (6, 2, 8)
    torch.testing.assert_close(consensus.embed(regions), consensus.embed(ALIKE))


def test_ngrams_of_a_single_picture_and_unknown_words_only_lengthen_a_caption() -> None:
    captions = torch.tensor([[4, 5, 6, 9], [4, 5, 7, 9], [4, 8, 0, 0]])
    ngrams = NGrams.of(captions, torch.tensor([0, 1, 2]))
    assert ngrams.count == NGrams.of(captions * 10**9, torch.arange(3)).count == 1 + 4  # the root; 4, 5, 9, "4 5"
    row, number, weight = ngrams.tf_idf(torch.tensor([[5, 0], [5, 99], [99, 98]]))
    assert row.tolist() == [0, 1]
    assert number[0] == number[1]
    assert weight[0] == 1 > weight[1] > 0


def test_very_long_captions_are_cut() -> None:
    assert remember(ALIKE, [(image, caption + " a dog" * 500) for image, caption in ROWS]).captions.shape == (12, 50)


# ---- consensus.pth ---------------------------------------------------------------------------------------------------

RANKED = ("search.beam=4", "search.consensus=5", "search.no_repeat_ngram=1", "search.max_length=6")
FEATURES = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a model that ranks by consensus, with consensus.pth beside it, of six pictures."""
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(folder / "checkpoints.pth", model_state(CaptionModel.build(tiny_config(*RANKED), VOCAB)))
    remember(torch.randn(6, 512, generator=torch.Generator().manual_seed(0))).save(folder / "consensus.pth")
    return folder / "checkpoints.pth"


@pytest.fixture
def alone(run: Path, tmp_path: Path) -> Path:
    """The same checkpoint without consensus.pth beside it."""
    (tmp_path / "checkpoints.pth").hardlink_to(run)
    return tmp_path / "checkpoints.pth"


def texts(model: CaptionModel) -> list[str]:
    return [each[0].text for each in model.generate(FEATURES)]


def test_it_reorders_what_the_beam_found(run: Path) -> None:
    model = load_model(run)
    plain, narrow = (model.config.search.model_copy(update=each) for each in ({"consensus": 0.0}, {"beam": 1}))
    by_score, ranked = model.generate(FEATURES, plain, num_captions=4), model.generate(FEATURES, num_captions=4)
    for before, after in zip(by_score, ranked, strict=True):
        assert {each.words for each in before} == {each.words for each in after}
        assert [each.score for each in after] == sorted((each.score for each in after), reverse=True)
    assert [each[0].text for each in by_score] != [each[0].text for each in ranked]
    assert texts(model) == texts(load_ensemble([run, run])) == [each[0].text for each in ranked]
    assert model.generate(FEATURES, narrow, num_captions=4) == ranked  # captions asked for are ranked too


def test_a_checkpoint_copied_alone_captions_and_says_that_it_searches_without(
    alone: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load_model(alone)
    missing = f"there is no {alone.with_name('consensus.pth')}, which training writes at its end"
    assert capsys.readouterr().out == f"searching without consensus: {missing}\n"
    assert texts(model) == texts(load_model(run, ["search.consensus=0"]))
    assert not capsys.readouterr().out


def test_consensus_that_is_asked_for_and_not_there_is_refused(alone: Path, refused: Callable[..., Any]) -> None:
    told = ("search.consensus = 5", "no consensus.pth beside", "set it to 0", "--resume --run NAME search.consensus=5")
    with refused(*told):
        load_model(alone, ["search.consensus=5"])
    model = load_model(alone)
    with refused(*told):
        model.generate(FEATURES, model.config.search.model_copy(update={"consensus": 5.0}))
    for changes in ({"beam": 1}, {"temperature": 1.0}):  # greedy search and drawing do without
        assert model.generate(FEATURES, model.config.search.model_copy(update={"consensus": 5.0, **changes}))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("embeddings", torch.zeros(6, 4)),
        ("embeddings", torch.full((6, 512), float("nan"))),
        ("centre", torch.zeros(3)),
        ("words", torch.tensor([9999] * 60)),
        *(("words", value) for value in (torch.zeros(0).int(), torch.tensor([-1]).int(), torch.ones(3), "a dog")),
        *(("lengths", value) for value in (torch.tensor([1]).int(), torch.tensor([-1, 2]).int(), torch.zeros(2, 2))),
        *(("image_index", value) for value in (torch.tensor([99]).int(), torch.zeros(0).int(), torch.zeros(()))),
        *(("embeddings", value) for value in (torch.zeros(()), torch.zeros(6, 512).long())),
        *(("lengths", 5), ("image_index", [0]), ("embeddings", "none")),
        (None, None),  # consensus.pth is another file of this project
    ],
)
def test_one_of_another_checkpoint_is_refused(
    part: str | None, value: object, alone: Path, run: Path, refused: Callable[..., Any]
) -> None:
    content = load_checkpoint(run.with_name("consensus.pth")) | {part: value} if part else {}
    save_checkpoint(alone.with_name("consensus.pth"), content)
    told = ("consensus.pth is damaged", f"python train.py --resume --run {alone.parent.name}", "search.consensus=0")
    with refused(*told):
        load_model(alone)


# ---- compact consensus -----------------------------------------------------------------------------------------------


def test_the_most_frequent_ngrams_have_the_weights_that_they_have_alone() -> None:
    captions, of = torch.tensor([[4, 5, 6], [4, 5, 7], [4, 5, 6], [4, 8, 0], [4, 8, 0]]), torch.arange(5)
    ngrams = NGrams.of(captions, of)
    few, kept = ngrams.most_frequent(5)  # "4" in five; "5" and "4 5" in three; "6", "8", and what ends with them in two
    assert few.count == len(kept) == 1 + 3
    for tokens in ([[4, 5]], [[4, 8, 5]], [[4, 5, 4]]):
        row, number, weight = few.tf_idf(torch.tensor(tokens))
        _, whole, _ = ngrams.tf_idf(torch.tensor(tokens))
        assert set(kept[number].tolist()) <= set(whole.tolist())
        assert not row.any() and bool((weight <= 1).all())
    everything, all_kept = ngrams.most_frequent(100)
    assert torch.equal(everything.codes, ngrams.codes) and all_kept.tolist() == list(range(ngrams.count))


def test_the_compact_one_expects_about_the_same_without_remembering_a_caption(consensus: Consensus) -> None:
    compact = CompactConsensus.fit(consensus)
    assert not {"captions", "words", "embeddings"} & compact.state.keys()
    assert [compact.state["table"].dtype, compact.state["projection"].shape[1]] == [torch.int8, 8]
    found = [hypotheses(*(captions[0] for captions in SAID.values()))] * 3
    for ranked, own in zip(compact.rank(ALIKE[[0, 2, 4]], found, weight=1.0), SAID.values(), strict=True):
        assert ranked[0].ids == ids(own[0])
    whole, lengths = consensus.expect(ALIKE)
    linear, linear_lengths = compact.expect(ALIKE)
    assert float((whole - linear).abs().max()) < 0.1 * float(whole.abs().max())
    torch.testing.assert_close(lengths, linear_lengths, atol=0.3, rtol=0)


def test_a_published_checkpoint_ranks_by_itself(run: Path, tmp_path: Path, call: Callable[..., int]) -> None:
    given = tmp_path / "given.pth"
    assert call(publish.main, run, given) == 0
    saved, model = load_checkpoint(given), load_model(given)
    assert saved["config"]["search"]["consensus"] == 5.0 and isinstance(model.consensus, CompactConsensus)
    by_score = [each[0].text for each in load_model(given, ["search.consensus=0"]).generate(FEATURES)]
    assert texts(model) != by_score
    assert all(each[0].score > each[0].log_prob for each in model.generate(FEATURES))


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("projection", torch.zeros(6, 4)),
        ("centre", torch.full((512,), float("nan"))),
        ("codes", torch.zeros(3, dtype=torch.int64)),
        ("base", torch.tensor(10**9)),
        ("table", None),
    ],
)
def test_a_damaged_consensus_inside_is_refused(
    part: str, value: object, run: Path, tmp_path: Path, call: Callable[..., int], refused: Callable[..., Any]
) -> None:
    given = tmp_path / "given.pth"
    assert call(publish.main, run, given) == 0
    content = load_checkpoint(given)
    save_checkpoint(given, content | {"consensus": content["consensus"] | {part: value}})
    with refused("the consensus inside", "given.pth", "damaged"):
        load_model(given)
