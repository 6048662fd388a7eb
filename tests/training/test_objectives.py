"""What training makes small."""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from pycocoevalcap.cider.cider import Cider
from torch import nn

from data.dataset import Batch, Features, Flickr8kDataset, padded
from data.vocab import EOS, PAD, SOS, UNK, build_vocab
from models.model import CaptionModel
from training.objectives import CiderReward, SelfCritical, caption_loss, cross_entropy, uneven_looking

AS_THEY_ARE = nn.Identity()  # hidden states are logits here
TARGETS = torch.tensor([[5, 6, 2, PAD], [7, 2, PAD, PAD]])


@pytest.fixture
def logits() -> torch.Tensor:
    return 3 * torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_more_padding_does_not_change_the_loss(logits: torch.Tensor, smoothing: float) -> None:
    longer = torch.cat([logits, 50 * torch.ones(2, 6, 9)], dim=1)
    padded = F.pad(TARGETS, (0, 6), value=PAD)
    assert caption_loss(AS_THEY_ARE, longer, padded, smoothing) == caption_loss(AS_THEY_ARE, logits, TARGETS, smoothing)


def test_what_is_predicted_behind_the_end_does_not_matter(logits: torch.Tensor) -> None:
    changed = torch.where((TARGETS == PAD).unsqueeze(2), torch.full_like(logits, 1e4), logits)
    assert caption_loss(AS_THEY_ARE, changed, TARGETS, 0.1) == caption_loss(AS_THEY_ARE, logits, TARGETS, 0.1)


def test_padding_has_no_gradient(logits: torch.Tensor) -> None:
    logits.requires_grad_()
    caption_loss(AS_THEY_ARE, logits, TARGETS, 0.1)[0].backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(2) > 0, TARGETS != PAD)


@pytest.mark.parametrize("smoothing", [0, 0.1, 0.5])
def test_the_objective_is_pytorchs_own_label_smoothing(logits: torch.Tensor, smoothing: float) -> None:
    expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=PAD, label_smoothing=smoothing)
    torch.testing.assert_close(caption_loss(AS_THEY_ARE, logits, TARGETS, smoothing)[0], expected)


@pytest.mark.parametrize("smoothing", [0, 0.1])
def test_the_logged_loss_is_the_mean_over_real_words_and_never_smoothed(logits: torch.Tensor, smoothing: float) -> None:
    rows, places = (TARGETS != PAD).nonzero(as_tuple=True)
    expected = -logits.log_softmax(-1)[rows, places, TARGETS[rows, places]].mean()
    loss = caption_loss(AS_THEY_ARE, logits, TARGETS, smoothing)[1]
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def test_evenly_spread_logits_cost_the_log_of_the_vocabulary() -> None:
    assert caption_loss(AS_THEY_ARE, torch.zeros(2, 4, 9), TARGETS, 0)[1] == pytest.approx(math.log(9))


def test_the_loss_of_bf16_logits_is_computed_in_fp32(logits: torch.Tensor) -> None:
    objective, loss = caption_loss(AS_THEY_ARE, logits.bfloat16(), TARGETS, 0.1)
    assert objective.dtype == loss.dtype == torch.float32


def test_each_cell_wants_to_be_looked_at_once() -> None:
    attention = torch.zeros(2, 4, 1, 3)
    attention[0, [0, 1, 2], 0, [0, 1, 2]] = 1  # once each
    attention[1, :, 0, 1] = 1  # four times the same, of which two count
    assert uneven_looking(attention[:1], TARGETS[:1]).item() == 0
    assert uneven_looking(attention, TARGETS).item() == pytest.approx((1 + 1 + 1) / 6)


def test_the_penalty_is_part_of_the_objective(tiny_config: Callable) -> None:
    plain, penalised = (toy_model(tiny_config, f"train.doubly_stochastic={weight}") for weight in (0, 2))
    batch = toy_batch(plain)
    (before, nll), (after, same) = (cross_entropy(model, batch) for model in (plain, penalised))
    assert nll == same
    _, attention = plain(batch.pictures, batch.inputs, batch.owner)
    assert after.item() == pytest.approx(before.item() + 2 * uneven_looking(attention, batch.targets).item(), rel=1e-4)


WORDS = ["a", "dog", "runs", "on", "grass", "two", "cats", "sit"]
REFERENCES = [
    ["a dog runs on grass", "a dog runs", "the brown dog runs on green grass"],
    ["two cats sit", "two cats sit on grass", "cats sit"],
    ["a dog and a cat", "cats and dogs sit on a mat"],
]


def test_the_reward_is_the_cider_of_the_reference_scorer() -> None:
    captions = ["a dog runs on the grass", "two cats sit on grass grass", "two cats sit on a mat mat mat"]
    names = [str(number) for number in range(3)]
    _, expected = Cider().compute_score(
        dict(zip(names, REFERENCES, strict=True)), {name: [c] for name, c in zip(names, captions, strict=True)}
    )
    reward = CiderReward([[words.split() for words in each] for each in REFERENCES])
    found = [reward([caption.split()], picture)[0] for picture, caption in enumerate(captions)]
    assert found == pytest.approx(expected.tolist(), rel=1e-6)


def test_a_caption_without_words_has_no_reward() -> None:
    assert CiderReward([[["a"]], [["b"]]])([[], ["a"]], 0) == [0, pytest.approx(2.5)]


def toy_model(tiny_config: Callable, *overrides: str) -> CaptionModel:
    settings = ["decoder.name=attention", "decoder.dropout=0", "train.label_smoothing=0", "search.max_length=4"]
    model = CaptionModel.build(tiny_config(*settings, *overrides), build_vocab([" ".join(WORDS)], 1))
    return model.eval()


def toy_batch(model: CaptionModel) -> Batch:
    captions = [[SOS, *model.vocab.numericalize(text), EOS] for text in ("a dog runs", "two cats sit")]
    features = torch.randn(2, *model.encoder.feature_shape, generator=torch.Generator().manual_seed(0))
    return Batch(features, padded(captions), torch.arange(2), torch.arange(2), torch.zeros(2, dtype=torch.bool))


def toy_dataset(model: CaptionModel) -> Flickr8kDataset:
    table = pd.DataFrame({"image": ["0", "1"], "caption": ["a dog runs", "two cats sit"]})
    return Flickr8kDataset(table, model.vocab, Path(), model.transform)


@pytest.mark.parametrize(("samples", "beam"), [(1, "false"), (5, "false"), (5, "true")])
def test_what_is_rewarded_better_than_usual_becomes_likelier(samples: int, beam: str, tiny_config: Callable) -> None:
    model = toy_model(tiny_config, f"train.self_critical_samples={samples}", f"train.self_critical_beam={beam}")
    batch, critic = toy_batch(model), SelfCritical(model, toy_dataset(model))
    batch.pictures, batch.images = batch.pictures.repeat(10, 1, 1), batch.images.repeat(10)
    batch.mirrored = batch.mirrored.repeat(10)
    optimiser = torch.optim.Adam(model.decoder.parameters(), lr=0.01)
    torch.manual_seed(0)
    rewards = []
    for _ in range(40):
        drawn = critic.write(model, model.encode(batch.pictures), critic.written, 20)
        rewards.append(critic.rewards(drawn, batch).mean().item())
        objective, _ = critic(model, batch)
        optimiser.zero_grad()
        objective.backward()
        optimiser.step()
    assert min(rewards[-3:]) > 2 * rewards[0]


def test_the_objective_weighs_each_words_log_probability_by_its_captions_advantage(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "train.self_critical_samples=3")
    batch, critic = toy_batch(model), SelfCritical(model, toy_dataset(model))
    torch.manual_seed(1)
    objective, nll = critic(model, batch)
    torch.manual_seed(1)
    features = model.encode(batch.pictures)
    captions = critic.write(model, features, critic.written, 3)
    rewards = critic.rewards(captions, batch)
    total = own = 0.0
    for place, ids in enumerate(captions):
        picture, others = place // 3, [i for i in range(3) if i != place % 3]
        logits, _ = model.decoder(features, torch.tensor([[SOS, *ids[:-1]]]), torch.tensor([picture]))
        logits[0, :, [PAD, SOS, UNK]] = -math.inf  # or all that is taken from bad captions would go to these
        log_prob = logits[0].log_softmax(1).gather(1, torch.tensor(ids).unsqueeze(1)).sum().item()
        total -= log_prob * (rewards[picture, place % 3] - rewards[picture, others].mean()).item()
        own -= log_prob
    words = sum(map(len, captions))
    assert objective.item() == pytest.approx(total / words, rel=1e-4)
    assert nll.item() == pytest.approx(own / words, rel=1e-4)


def test_a_beam_gives_different_captions_the_same_each_time(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "train.self_critical_samples=5", "train.self_critical_beam=true", "search.beam=2")
    critic, features = SelfCritical(model, toy_dataset(model)), model.encode(toy_batch(model).pictures)
    captions, again = (critic.write(model, features, critic.written, 5) for _ in range(2))
    assert captions == again
    assert [len(set(map(tuple, captions[first : first + 5]))) for first in (0, 5)] == [5, 5]


def test_a_mirrored_picture_is_rewarded_for_left_where_its_captions_say_right(tiny_config: Callable) -> None:
    model = CaptionModel.build(tiny_config(), build_vocab(["a dog on the left", "a cat on the right"], 1))
    table = pd.DataFrame({"image": ["0", "1"], "caption": ["a dog on the left", "a cat on the right"]})
    critic = SelfCritical(model, Flickr8kDataset(table, model.vocab, Path(), model.transform))
    batch = toy_batch(model)
    batch.mirrored[0] = True
    left, right = ([*model.vocab.numericalize(f"a dog on the {side}"), EOS] for side in ("left", "right"))
    rewards = critic.rewards([left, right, left, right], batch)
    assert rewards[0, 1] == pytest.approx(10)
    assert rewards[0, 0] < 8


def test_what_other_pictures_lead_one_to_expect_is_rewarded_too(tiny_config: Callable) -> None:
    """Each is rewarded for what is said of those that look alike, whatever is said of itself."""
    said = ["a dog runs on grass"] * 3 + ["two cats sit on grass"] * 3
    said[0] = said[3]  # of the first, which looks like the other dogs
    names, looks = list("012345"), torch.eye(2, 512).repeat_interleave(3, 0)  # (6, 512)
    table = pd.DataFrame({"image": names, "caption": said})
    model = CaptionModel.build(tiny_config("train.self_critical_consensus=4"), build_vocab(said, 1))
    dataset = Flickr8kDataset(table, model.vocab, Path(), model.transform, Features([looks.half()], names))
    critic, batch = SelfCritical(model, dataset), toy_batch(model)
    batch.pictures, batch.images = looks[[0, 3]], torch.tensor([0, 3])
    captions = [[*model.vocab.numericalize(text), EOS] for text in (said[1], said[3])] * 2  # dog and cats of each
    with torch.autocast("cpu", torch.bfloat16):  # as in training
        [dog, no_dog], [no_cats, cats] = expected = critic.expected(captions, batch).view(2, 2)
    assert min(dog, cats) > 8
    assert max(no_dog, no_cats) < 2
    rewards = critic.rewards(captions, batch)
    critic.consensus_weight = 0
    torch.testing.assert_close(rewards, critic.rewards(captions, batch) + 4 * expected)
    critic.consensus.for_learning = critic.consensus.for_ranking  # which is not what training goes by
    assert not torch.allclose(critic.expected(captions, batch), expected.flatten(), atol=0.1)


def test_of_a_mirrored_picture_left_is_expected_where_others_say_right(tiny_config: Callable) -> None:
    said = ["a dog on the left"] * 3 + ["a cat on the right"] * 3
    names, looks = list("012345"), torch.eye(2, 512).repeat_interleave(3, 0)  # (6, 512)
    table = pd.DataFrame({"image": names, "caption": said})
    model = CaptionModel.build(tiny_config("train.self_critical_consensus=1"), build_vocab(said, 1))
    dataset = Flickr8kDataset(table, model.vocab, Path(), model.transform, Features([looks.half()], names))
    critic, batch = SelfCritical(model, dataset), toy_batch(model)
    batch.pictures, batch.images, batch.mirrored = looks[[0, 0]], torch.tensor([0, 0]), torch.tensor([False, True])
    left, right = ([*model.vocab.numericalize(f"a dog on the {side}"), EOS] for side in ("left", "right"))
    shown, mirrored = critic.rewards([left, right, left, right], batch)
    torch.testing.assert_close(shown, mirrored.flip(0))
    assert shown[0] > shown[1] + 1


def test_captions_that_are_cut_off_have_no_end(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "train.self_critical_samples=3", "search.max_length=2")
    critic = SelfCritical(model, toy_dataset(model))
    captions = critic.write(model, model.encode(toy_batch(model).pictures), critic.written, 20)
    assert all(len(ids) <= 2 and EOS not in ids[:-1] for ids in captions)
    assert {len(ids) for ids in captions if EOS not in ids} == {2}


def test_captions_are_drawn_as_the_decoder_has_them_whatever_search_is_told(tiny_config: Callable) -> None:
    model = toy_model(tiny_config, "search.min_length=4", "search.top_k=1", "search.no_repeat_ngram=1")
    critic = SelfCritical(model, toy_dataset(model))
    captions = critic.write(model, model.encode(toy_batch(model).pictures), critic.written, 100)
    assert min(map(len, captions)) < 4
    assert len(set(map(tuple, captions))) > 50
    assert any(len(set(ids)) < len(ids) for ids in captions)
