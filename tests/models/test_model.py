"""A checkpoint is all it takes: it holds what cannot be found again, and whatever does not fit is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from config import Config
from data.vocab import SPECIALS, build_vocab
from models.encoder import EncoderCNN
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint

VOCAB = build_vocab(["a brown dog runs through the tall grass", "two cats sit on a red mat"], 1)
PICTURES = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(config: Config) -> CaptionModel:
    model = CaptionModel.build(config, VOCAB).eval()
    with torch.inference_mode():
        model.fit_statistics(model.encoder(model.transform.normalise(PICTURES)))
        for parameter in model.decoder.parameters():
            parameter.mul_(4)  # so that captions differ
    return model


def logits(model: CaptionModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(PICTURES, torch.tensor([VOCAB.encode("a brown dog runs")] * 3), torch.arange(3))[0]


def captions(model: CaptionModel) -> list[str]:
    with torch.inference_mode():
        found = model.describe(model.encoder(model.transform.normalise(PICTURES)))
        return [captions[0].text for captions in found]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights" / "resnet18.pth"
    path.parent.mkdir()
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@pytest.fixture
def pretrained(weights: Path, tmp_path: Path, tiny_config: Callable) -> tuple[Path, list[str]]:
    """The checkpoint of a model with a frozen backbone from a file, and its captions."""
    model = build(tiny_config(f"encoder.weights={weights}"))
    save_checkpoint(tmp_path / "a.pth", model.state())
    return tmp_path / "a.pth", captions(model)


@pytest.fixture
def saved(tiny_config: Callable) -> dict[str, Any]:
    return build(tiny_config()).state()


def test_a_model_comes_back_from_its_checkpoint_alone(
    tmp_path: Path, tiny_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_config())
    save_checkpoint(tmp_path / "a.pth", model.state())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = CaptionModel.from_checkpoint(tmp_path / "a.pth")
    assert not again.training
    assert (again.config, again.transform, again.vocab.words) == (model.config, model.transform, model.vocab.words)
    assert torch.equal(logits(again), logits(model))
    assert captions(again) == captions(model)


def test_a_checkpoint_is_plain_data(tmp_path: Path, saved: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "a.pth", saved)
    assert torch.load(tmp_path / "a.pth", weights_only=True)["vocabulary"] == VOCAB.state()


def test_a_model_is_drawn_from_the_seed(tiny_config: Callable) -> None:
    first, same, other = (build(tiny_config(f"train.seed={seed}")) for seed in (3, 3, 4))
    assert torch.equal(logits(first), logits(same))
    assert not torch.equal(logits(first), logits(other))


def test_a_decoder_that_does_not_exist_is_refused_with_those_that_do(tiny_config: Callable, refused: Callable) -> None:
    with refused("decoder.name", "gpt", "lstm, attention, transformer"):
        CaptionModel.build(tiny_config("decoder.name=gpt"), VOCAB)


def test_a_penalty_on_attention_needs_attention(tiny_config: Callable, refused: Callable) -> None:
    with refused("train.doubly_stochastic", "decoder.name"):
        CaptionModel.build(tiny_config("train.doubly_stochastic=1"), VOCAB)


@pytest.mark.parametrize("shape", [(50, 512), (20, 4, 512)])
def test_training_features_are_centred_and_scaled_as_one(shape: tuple[int, ...], tiny_config: Callable) -> None:
    model = build(tiny_config())
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
    model = build(tiny_config())
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.feature_mean, model.feature_scale = torch.zeros(512, device="cuda"), torch.ones(1, device="cuda")
        model.fit_statistics(torch.randn(50, 512))
        assert model.standardise(torch.randn(2, 512, device="cuda")).device.type == "cuda"


def test_a_forbidden_word_that_is_cut_into_several_is_refused(tiny_config: Callable, refused: Callable) -> None:
    model = build(tiny_config())
    options = model.config.search.model_copy(update={"forbidden": ["a", "fire hydrant"]})
    with refused("search.forbidden", "fire hydrant"):
        model.describe(torch.zeros(1, 512), options)


def test_pixels_and_their_features_give_the_same_logits(tiny_config: Callable) -> None:
    model = build(tiny_config())
    with torch.inference_mode():
        features = model.encoder(model.transform.normalise(PICTURES))
        tokens, owner = torch.tensor([VOCAB.encode("two cats sit")] * 2), torch.tensor([2, 0])
        assert torch.equal(model(PICTURES, tokens, owner)[0], model(features, tokens, owner)[0])


def test_captions_hold_words_of_the_vocabulary_only(tiny_config: Callable) -> None:
    words = set(" ".join(captions(build(tiny_config()))).split())
    assert words
    assert words <= set(VOCAB.words) - set(SPECIALS)


def test_a_frozen_pretrained_backbone_is_not_inside_and_found_again(pretrained: tuple[Path, list[str]]) -> None:
    path, expected = pretrained
    assert load_checkpoint(path)["backbone"] is None
    assert path.stat().st_size < 1_000_000
    assert captions(CaptionModel.from_checkpoint(path)) == expected


def test_a_backbone_that_was_moved_can_be_named(pretrained: tuple[Path, list[str]], weights: Path) -> None:
    path, expected = pretrained
    moved = weights.rename(weights.with_name("moved.pth"))
    assert captions(CaptionModel.from_checkpoint(path, [f"encoder.weights={moved}"])) == expected


def test_a_backbone_that_is_gone_is_refused(
    pretrained: tuple[Path, list[str]], weights: Path, refused: Callable
) -> None:
    weights.unlink()
    with refused(str(weights), "encoder.weights"):
        CaptionModel.from_checkpoint(pretrained[0])


@pytest.mark.parametrize("named", [True, False])
def test_other_backbone_weights_are_refused(
    named: bool, pretrained: tuple[Path, list[str]], weights: Path, refused: Callable
) -> None:
    other = weights.with_name("other.pth") if named else weights
    torch.save(torchvision.models.resnet18().state_dict(), other)
    with refused("sha256", str(other), "encoder.weights="):
        CaptionModel.from_checkpoint(pretrained[0], [f"encoder.weights={other}"] if named else [])


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_random_backbone_is_inside(frozen: str, tmp_path: Path, tiny_config: Callable) -> None:
    model = build(tiny_config(f"encoder.frozen={frozen}"))
    save_checkpoint(tmp_path / "a.pth", model.state())
    assert load_checkpoint(tmp_path / "a.pth")["backbone"] is not None
    assert captions(CaptionModel.from_checkpoint(tmp_path / "a.pth")) == captions(model)


def test_a_fine_tuned_backbone_is_inside(tmp_path: Path, weights: Path, tiny_config: Callable) -> None:
    model = build(tiny_config("encoder.frozen=false", f"encoder.weights={weights}"))
    model.encoder.backbone.get_parameter("conv1.weight").data.mul_(1.1)
    save_checkpoint(tmp_path / "a.pth", model.state())
    weights.unlink()
    again = CaptionModel.from_checkpoint(tmp_path / "a.pth")
    assert torch.equal(logits(again), logits(model))
    assert all(parameter.requires_grad for parameter in again.encoder.parameters())


def test_a_fine_tuned_backbone_can_be_frozen_as_it_is(tmp_path: Path, weights: Path, tiny_config: Callable) -> None:
    model = build(tiny_config("encoder.frozen=false", f"encoder.weights={weights}"))
    model.encoder.backbone.get_parameter("conv1.weight").data.mul_(1.1)
    frozen = tiny_config("encoder.frozen=true", f"encoder.weights={weights}").model_dump()
    again = CaptionModel.from_state(model.state() | {"config": frozen}, "a.pth").eval()
    assert again.encoder.identity["sha256"] != EncoderCNN(again.config.encoder).identity["sha256"]  # its own features
    assert torch.equal(logits(CaptionModel.from_state(again.state(), "b.pth").eval()), logits(model))


@pytest.mark.parametrize("words", [[*VOCAB.words, "zebra"], VOCAB.words[:-1]])
def test_a_vocabulary_that_does_not_fit_the_tensors_is_refused(
    words: list[str], saved: dict[str, Any], refused: Callable
) -> None:
    saved["vocabulary"] = saved["vocabulary"] | {"words": words}
    with refused("a.pth", "do not fit"):
        CaptionModel.from_state(saved, "a.pth")


@pytest.mark.parametrize("part", ["decoder", "backbone"])
def test_missing_and_additional_tensors_are_refused(part: str, saved: dict[str, Any], refused: Callable) -> None:
    name, tensor = next(iter(saved[part].items()))
    with refused("a.pth", name):
        CaptionModel.from_state(saved | {part: {k: v for k, v in saved[part].items() if k != name}}, "a.pth")
    with refused("a.pth", "another"):
        CaptionModel.from_state(saved | {part: {**saved[part], "another": tensor}}, "a.pth")


@pytest.mark.parametrize("part", ["feature_mean", "feature_scale"])
def test_feature_statistics_of_another_size_are_refused(part: str, saved: dict[str, Any], refused: Callable) -> None:
    with refused("a.pth"):
        CaptionModel.from_state(saved | {part: torch.ones(511)}, "a.pth")


def test_poisoned_weights_are_refused(saved: dict[str, Any], refused: Callable) -> None:
    name = min(saved["decoder"])
    saved["decoder"][name] = torch.full_like(saved["decoder"][name], float("nan"))
    with refused("a.pth", "NaN", name):
        CaptionModel.from_state(saved, "a.pth")


@pytest.mark.parametrize("key", ["embed_size", "hidden_size"])
@pytest.mark.parametrize("size", [10**8, 10**12])
def test_absurd_sizes_are_refused_before_anything_is_allocated(
    key: str, size: int, saved: dict[str, Any], refused: Callable
) -> None:
    saved["config"]["decoder"][key] = size
    with refused("a.pth"):
        CaptionModel.from_state(saved, "a.pth")


@pytest.mark.parametrize(
    "part", ["config", "vocabulary", "transform", "encoder", "backbone", "feature_mean", "decoder"]
)
def test_a_checkpoint_that_lacks_a_part_is_refused(part: str, saved: dict[str, Any], refused: Callable) -> None:
    with refused("a.pth"):
        CaptionModel.from_state({key: value for key, value in saved.items() if key != part}, "a.pth")


def test_pictures_are_captioned_as_paths_or_opened_one_or_many(
    drawn: Path, tmp_path: Path, tiny_config: Callable, refused: Callable
) -> None:
    save_checkpoint(tmp_path / "a.pth", build(tiny_config()).state())
    model = CaptionModel.from_checkpoint(tmp_path / "a.pth")
    paths = [drawn / f"images/{number:02}.jpg" for number in range(3)]
    pixels = torch.stack([model.transform(Image.open(path)) for path in paths])
    with torch.inference_mode():
        options = model.config.search.model_copy(update={"beam": 2, "max_length": 4})
        expected = [best.text for [best] in model.describe(model.encoder(pixels), options)]
    assert model.caption(paths, beam=2, max_length=4) == expected
    assert model.caption([str(paths[0]), Image.open(paths[1])], beam=2, max_length=4) == expected[:2]
    sideways = Image.open(paths[2]).transpose(Image.Transpose.ROTATE_90)
    sideways.getexif()[0x0112] = 6  # to be turned back
    assert model.caption(sideways, beam=2, max_length=4) == expected[2:]
    assert model.caption([]) == []
    with refused("search.beem", "search.beam"):
        model.caption(paths, beem=2)
    with refused("search.beam = 0", "1"):
        model.caption(paths, beam=0)
    with refused(str(tmp_path / "none.jpg")):
        model.caption([paths[0], tmp_path / "none.jpg"])
