"""What training minimises: cross-entropy over real words, and the negative of captions' expected CIDEr-D."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import make_dataset
from pycocoevalcap.cider.cider import Cider
from torch import nn

from data.dataset import Batch, Flickr8kDataset, pad
from data.vocab import EOS, PAD, SOS, UNK, build_vocab
from models.model import CaptionModel
from training.losses import CiderReward, CrossEntropy, SelfCritical, cross_entropy, doubly_stochastic_penalty

IDENTITY = nn.Identity()  # hidden states are logits here
TARGETS = torch.tensor([[5, 6, 2, PAD], [7, 2, PAD, PAD]])


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_loss_is_pytorchs_own_label_smoothing_and_what_is_logged_is_never_smoothed(
    logits: torch.Tensor, smoothing: float
) -> None:
    pytorchs = partial(F.cross_entropy, logits.flatten(0, 1), TARGETS.flatten(), ignore_index=PAD)
    loss, nll = cross_entropy(IDENTITY, logits, TARGETS, smoothing)
    torch.testing.assert_close(loss, pytorchs(label_smoothing=smoothing))
    torch.testing.assert_close(nll, pytorchs())
    assert not nll.requires_grad
    assert {each.dtype for each in cross_entropy(IDENTITY, logits.bfloat16(), TARGETS, smoothing)} == {torch.float32}


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_padding_does_not_count(logits: torch.Tensor, smoothing: float) -> None:
    expected = cross_entropy(IDENTITY, logits, TARGETS, smoothing)
    longer = torch.cat([logits, 50 * torch.ones(2, 6, 9)], dim=1)
    assert cross_entropy(IDENTITY, longer, F.pad(TARGETS, (0, 6), value=PAD), smoothing) == expected
    changed = torch.where((TARGETS == PAD).unsqueeze(2), torch.full_like(logits, 1e4), logits)
    assert cross_entropy(IDENTITY, changed, TARGETS, smoothing) == expected
    cross_entropy(IDENTITY, logits.requires_grad_(), TARGETS, smoothing)[0].backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(2) > 0, TARGETS != PAD)


def test_each_region_wants_to_be_attended_to_once() -> None:
    alphas = torch.zeros(2, 4, 1, 3)
    alphas[0, [0, 1, 2], 0, [0, 1, 2]] = 1  # once each
    alphas[1, :, 0, 1] = 1  # four times the same, of which two count
    assert doubly_stochastic_penalty(alphas[:1], TARGETS[:1]).item() == 0
    assert doubly_stochastic_penalty(alphas, TARGETS).item() == pytest.approx((1 + 1 + 1) / 6)


def test_the_penalty_is_added_to_the_loss_but_not_to_what_is_logged(tiny_config: Callable) -> None:
    plain, penalised = (toy_model(tiny_config, f"train.doubly_stochastic={weight}") for weight in (0, 2))
    batch = toy_batch(plain)
    (before, nll), (after, same) = (CrossEntropy(model, toy_dataset(model))(batch) for model in (plain, penalised))
    assert nll == same
    _, alphas = plain(batch.features, batch.inputs, batch.image_index)
    penalty = doubly_stochastic_penalty(alphas, batch.targets).item()
    assert after.item() == pytest.approx(before.item() + 2 * penalty, rel=1e-4)


# ---- self-critical training ------------------------------------------------------------------------------------------

WORDS = ["a", "dog", "runs", "on", "grass", "two", "cats", "sit"]
REFERENCES = [
    ["a dog runs on grass", "a dog runs", "the brown dog runs on green grass"],
    ["two cats sit", "two cats sit on grass", "cats sit"],
    ["a dog and a cat", "cats and dogs sit on a mat"],
]


def test_the_reward_is_the_cider_of_the_reference_scorer() -> None:
    captions = ["a dog runs on the grass", "two cats sit on grass grass", "two cats sit on a mat mat mat"]
    references, candidates = dict(enumerate(REFERENCES)), {n: [caption] for n, caption in enumerate(captions)}
    _, expected = Cider().compute_score(references, candidates)
    reward = CiderReward([[words.split() for words in each] for each in REFERENCES])
    found = [reward([caption.split()], picture)[0] for picture, caption in enumerate(captions)]
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert CiderReward([[["a"]], [["b"]]])([[], ["a"]], 0) == [0, pytest.approx(2.5)]  # no words, no reward


def toy_model(tiny_config: Callable, *overrides: str) -> CaptionModel:
    settings = ["decoder.name=attention", "decoder.dropout=0", "train.label_smoothing=0", "search.max_length=4"]
    return CaptionModel.build(tiny_config(*settings, *overrides), build_vocab([" ".join(WORDS)], 1)).eval()


def toy_batch(model: CaptionModel) -> Batch:
    captions = [[SOS, *model.vocab.numericalize(text), EOS] for text in ("a dog runs", "two cats sit")]
    features = torch.randn(2, *model.encoder.feature_shape, generator=torch.Generator().manual_seed(0))
    return Batch(features, pad(captions), torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.bool))


def toy_dataset(model: CaptionModel) -> Flickr8kDataset:
    return make_dataset([("0", "a dog runs"), ("1", "two cats sit")], model.vocab)


def written(loss_fn: SelfCritical, batch: Batch, count: int) -> list[list[int]]:
    """Return captions as the loss draws them, or finds them with a beam."""
    return loss_fn.sample(loss_fn.model.encode(batch.features), loss_fn.sampling, count)


@pytest.mark.parametrize(("samples", "beam"), [(1, "false"), (5, "true")])
def test_captions_with_more_reward_than_the_baseline_become_more_probable(
    samples: int, beam: str, tiny_config: Callable
) -> None:
    model = toy_model(tiny_config, f"train.self_critical_samples={samples}", f"train.self_critical_beam={beam}")
    batch, loss_fn = toy_batch(model), SelfCritical(model, toy_dataset(model))
    batch.features, batch.image_ids = batch.features.repeat(10, 1, 1), batch.image_ids.repeat(10)
    batch.mirrored = batch.mirrored.repeat(10)
    optimiser = torch.optim.Adam(model.decoder.parameters(), lr=0.01)
    torch.manual_seed(0)
    rewards = []
    for _ in range(40):
        rewards.append(loss_fn.rewards(written(loss_fn, batch, 20), batch).mean().item())
        loss, _ = loss_fn(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert min(rewards[-3:]) > 2 * rewards[0]


def test_each_words_log_probability_is_weighed_by_the_advantage_of_its_caption(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "train.self_critical_samples=3")
    batch, loss_fn = toy_batch(model), SelfCritical(model, toy_dataset(model))
    torch.manual_seed(1)
    loss, nll = loss_fn(batch)
    torch.manual_seed(1)
    captions = written(loss_fn, batch, 3)
    rewards = loss_fn.rewards(captions, batch)
    total = own = 0.0
    for place, ids in enumerate(captions):
        picture, others = place // 3, [i for i in range(3) if i != place % 3]
        hidden, _ = model(batch.features, torch.tensor([[SOS, *ids[:-1]]]), torch.tensor([picture]))
        logits = model.decoder.output(hidden)
        logits[0, :, [PAD, SOS, UNK]] = -math.inf  # or all that is taken from bad captions would go to these
        log_prob = logits[0].log_softmax(1).gather(1, torch.tensor(ids).unsqueeze(1)).sum().item()
        total -= log_prob * (rewards[picture, place % 3] - rewards[picture, others].mean()).item()
        own -= log_prob
    words = sum(map(len, captions))
    assert loss.item() == pytest.approx(total / words, rel=1e-4)
    assert nll.item() == pytest.approx(own / words, rel=1e-4)


def test_captions_are_drawn_without_any_dropout(tiny_config: Callable) -> None:
    model = CaptionModel.build(tiny_config("decoder.num_layers=2", "decoder.dropout=0.5"), build_vocab(WORDS, 1))
    SelfCritical(model, toy_dataset(model)).train()
    once, again = (model(torch.ones(1, 512), torch.tensor([[1, 4, 5]]), torch.tensor([0]))[0] for _ in range(2))
    assert torch.equal(once, again)


def test_a_beam_gives_different_captions_the_same_each_time(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "train.self_critical_samples=5", "train.self_critical_beam=true", "search.beam=2")
    loss_fn = SelfCritical(model, toy_dataset(model))
    captions, again = (written(loss_fn, toy_batch(model), 5) for _ in range(2))
    assert captions == again
    assert [len(set(map(tuple, captions[first : first + 5]))) for first in (0, 5)] == [5, 5]


def test_captions_are_drawn_from_the_whole_distribution_whatever_search_is_set_to(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "search.min_length=4", "search.top_k=1", "search.no_repeat_ngram=1")
    captions = written(SelfCritical(model, toy_dataset(model)), toy_batch(model), 100)
    assert min(map(len, captions)) < 4
    assert {len(ids) for ids in captions if EOS not in ids} == {4}  # those that are cut off have no end
    assert all(len(ids) <= 4 and EOS not in ids[:-1] for ids in captions)
    assert len(set(map(tuple, captions))) > 50
    assert any(len(set(ids)) < len(ids) for ids in captions)


def test_a_mirrored_picture_is_rewarded_for_left_where_its_captions_say_right(tiny_config: Callable) -> None:
    said = [("0", "a dog on the left"), ("1", "a cat on the right")]
    model = CaptionModel.build(tiny_config(), build_vocab([caption for _, caption in said], 1))
    batch = toy_batch(model)
    batch.mirrored[0] = True
    left, right = ([*model.vocab.numericalize(f"a dog on the {side}"), EOS] for side in ("left", "right"))
    rewards = SelfCritical(model, make_dataset(said, model.vocab)).rewards([left, right, left, right], batch)
    assert rewards[0, 1] == pytest.approx(10)
    assert rewards[0, 0] < 8


ALIKE = torch.eye(2, 512).repeat_interleave(3, 0)  # (6, 512): features of six pictures of two kinds


def by_consensus(tiny_config: Callable, weight: int, said: list[str]) -> SelfCritical:
    model = CaptionModel.build(tiny_config(f"train.self_critical_consensus={weight}"), build_vocab(said, 1))
    return SelfCritical(model, make_dataset(list(zip("012345", said, strict=True)), model.vocab, ALIKE))


def test_what_people_say_of_other_pictures_is_rewarded_too(tiny_config: Callable) -> None:
    """Each caption is rewarded for what is said of similar pictures, whatever is said of its own."""
    said = ["a dog runs on grass"] * 3 + ["two cats sit on grass"] * 3
    said[0] = said[3]  # of the first, which is like the other dogs
    weighed, plain = (by_consensus(tiny_config, weight, said) for weight in (4, 0))
    batch, vocab = toy_batch(plain.model), plain.model.vocab
    batch.features, batch.image_ids = ALIKE[[0, 3]], torch.tensor([0, 3])
    captions = [[*vocab.numericalize(text), EOS] for text in (said[1], said[3])] * 2  # dog and cats of each
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        expected = (weighed.rewards(captions, batch) - plain.rewards(captions, batch)) / 4
    [dog, no_dog], [no_cats, cats] = expected
    assert min(dog, cats) > 8
    assert max(no_dog, no_cats) < 2


def test_of_a_mirrored_picture_left_is_expected_where_others_say_right(tiny_config: Callable) -> None:
    loss_fn = by_consensus(tiny_config, 1, ["a dog on the left"] * 3 + ["a cat on the right"] * 3)
    batch = toy_batch(loss_fn.model)
    batch.features, batch.image_ids = ALIKE[[0, 0]], torch.tensor([0, 0])
    batch.mirrored = torch.tensor([False, True])
    left, right = ([*loss_fn.model.vocab.numericalize(f"a dog on the {side}"), EOS] for side in ("left", "right"))
    shown, mirrored = loss_fn.rewards([left, right, left, right], batch)
    torch.testing.assert_close(shown, mirrored.flip(0))
    assert shown[0] > shown[1] + 1
