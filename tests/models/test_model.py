"""A model from its parts: drawn from the seed, with standardised features, writing words of its vocabulary."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from data.vocab import EOS, SOS, SPECIALS, build_vocab
from models import imagenet
from models.model import CaptionModel

VOCAB = build_vocab(["a brown dog runs through the tall grass", "two cats sit on a red mat"], 1)
PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(tiny_config: Callable, *overrides: str) -> CaptionModel:
    return CaptionModel.build(tiny_config(*overrides), VOCAB).eval()


@torch.inference_mode()
def test_a_model_is_drawn_from_the_seed(tiny_config: Callable) -> None:
    tokens = torch.tensor([[SOS, *VOCAB.numericalize("a brown dog runs"), EOS]] * 3)
    models = [build(tiny_config, f"train.seed={seed}") for seed in (3, 3, 4)]
    first, same, other = (model(PIXELS, tokens, torch.arange(3))[0] for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@torch.inference_mode()
def test_pixels_and_their_features_give_the_same(tiny_config: Callable) -> None:
    model = build(tiny_config)
    features = model.encoder(model.transform.normalise(PIXELS))
    tokens, image_index = torch.tensor([[SOS, *VOCAB.numericalize("two cats sit"), EOS]] * 2), torch.tensor([2, 0])
    assert torch.equal(model(PIXELS, tokens, image_index)[0], model(features, tokens, image_index)[0])


@pytest.mark.parametrize("shape", [(50, 512), (20, 4, 512)])
def test_training_features_are_centred_and_scaled_as_one(shape: tuple[int, ...], tiny_config: Callable) -> None:
    model = build(tiny_config)
    features = 30 + 5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    features[..., 7] = 3.0  # a feature that never changes
    model.fit_statistics(features)
    standard = model.standardise(features).flatten(0, -2)
    torch.testing.assert_close(standard.mean(0), torch.zeros(512), rtol=0, atol=1e-3)
    assert standard[:, 7].abs().max() < 1e-3
    assert abs(standard.square().mean() - 1) < 1e-3
    spread = features.flatten(0, -2).std(0) / standard.std(0)
    torch.testing.assert_close(spread[:7], spread[:1].expand(7), rtol=1e-3, atol=0)


def test_a_model_on_a_gpu_takes_its_statistics_from_features_in_memory(tiny_config: Callable) -> None:
    model = build(tiny_config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.feature_mean, model.feature_scale = torch.zeros(512, device="cuda"), torch.ones(1, device="cuda")
        model.fit_statistics(torch.randn(50, 512))
        assert model.standardise(torch.randn(2, 512, device="cuda")).device.type == "cuda"


def test_captions_hold_words_of_the_vocabulary_that_are_not_forbidden(tiny_config: Callable, refused: Callable) -> None:
    model = build(tiny_config)
    found = model.generate(torch.zeros(1, 512), num_captions=4)[0]
    assert {word for each in found for word in each.words} <= set(VOCAB.words) - set(SPECIALS)
    [first, *_] = found[0].words
    options = model.config.search.model_copy(update={"forbidden": [first]})
    assert first not in {word for each in model.generate(torch.zeros(1, 512), options)[0] for word in each.words}
    with refused("search.forbidden", "fire hydrant"):
        model.generate(torch.zeros(1, 512), options.model_copy(update={"forbidden": ["a", "fire hydrant"]}))


def test_a_class_is_a_word_of_the_vocabulary_where_the_picture_shows_it(
    tiny_config: Callable, refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_config)
    with refused("search.classes = 2", "resnet18", "set it to 0"):
        model.generate(torch.rand(1, 512), model.config.search.model_copy(update={"classes": 2.0}))
    words = {name: imagenet.plain_words()[imagenet.names().index(name)] for name in ("tabby", "beagle", "school bus")}
    assert words == {"tabby": "cat", "beagle": "dog", "school bus": "bus"}
    dog, bus = (imagenet.names().index(name) for name in ("beagle", "school bus"))
    probs = torch.zeros(3, 1000)
    probs[0, [dog, dog + 1]], probs[1, dog], probs[2, bus] = 0.4, 0.2, 1.0
    monkeypatch.setattr(model.encoder, "classify", lambda features: probs)
    bonus = model.class_bonus(probs, 2.0)
    [(place, word)] = bonus.nonzero().tolist()
    assert (place, VOCAB.words[word]) == (0, "dog")  # too little of one, and a word that the vocabulary lacks
    assert bonus[place, word] == pytest.approx(1.6)
