"""A checkpoint is all that a model takes: it holds what cannot be found again, and what does not fit is refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from config import Config
from data.vocab import EOS, SOS, build_vocab
from models.checkpoint import load_model, model_from_start, model_from_state, model_state
from models.encoder import EncoderCNN
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint

VOCAB = build_vocab(["a brown dog runs through the tall grass", "two cats sit on a red mat"], 1)
PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(config: Config) -> CaptionModel:
    model = CaptionModel.build(config, VOCAB).eval()
    with torch.no_grad():
        model.fit_statistics(model.encoder(model.transform.normalise(PIXELS)))
        for parameter in model.decoder.parameters():
            parameter.mul_(4)  # so that captions differ
    return model


@torch.inference_mode()
def hidden(model: CaptionModel) -> torch.Tensor:
    return model(PIXELS, torch.tensor([[SOS, *VOCAB.numericalize("a brown dog runs"), EOS]] * 3), torch.arange(3))[0]


@torch.inference_mode()
def captions(model: CaptionModel) -> list[str]:
    return [best.text for [best] in model.generate(model.encoder(model.transform.normalise(PIXELS)))]


def save(model: CaptionModel, path: Path) -> Path:
    save_checkpoint(path, model_state(model))
    return path


@pytest.fixture(scope="module")
def state(tiny_config: Callable) -> dict[str, Any]:
    """What a checkpoint holds; `saved` is a copy to be changed."""
    return model_state(build(tiny_config()))


@pytest.fixture
def saved(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(state)


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
    return save(model, tmp_path / "a.pth"), captions(model)


# ---- what is inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["true", "false"])
def test_a_model_comes_back_from_its_checkpoint_alone(
    frozen: str, tmp_path: Path, tiny_config: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_config(f"encoder.frozen={frozen}"))
    path = save(model, tmp_path / "a.pth")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_model(path)
    assert not again.training
    assert (again.config, again.transform, again.vocab.words) == (model.config, model.transform, model.vocab.words)
    assert torch.equal(hidden(again), hidden(model))
    assert captions(again) == captions(model)
    assert torch.load(path, weights_only=True)["vocabulary"] == {"words": VOCAB.words, "language": VOCAB.language}


def test_a_frozen_pretrained_backbone_is_not_inside_and_found_again(
    pretrained: tuple[Path, list[str]], weights: Path, refused: Callable
) -> None:
    path, expected = pretrained
    assert load_checkpoint(path)["backbone"] is None
    assert path.stat().st_size < 1_000_000
    assert captions(load_model(path)) == expected
    moved = weights.rename(weights.with_name("moved.pth"))
    assert captions(load_model(path, [f"encoder.weights={moved}"])) == expected
    with refused(str(weights), "encoder.weights"):
        load_model(path)


@pytest.mark.parametrize("named", [True, False])
def test_other_backbone_weights_are_refused(
    named: bool, pretrained: tuple[Path, list[str]], weights: Path, refused: Callable
) -> None:
    other = weights.with_name("other.pth") if named else weights
    torch.save(torchvision.models.resnet18().state_dict(), other)
    with refused("sha256", str(other), "encoder.weights="):
        load_model(pretrained[0], [f"encoder.weights={other}"] if named else [])


def test_a_fine_tuned_backbone_is_inside_and_can_be_frozen_as_it_is(
    tmp_path: Path, weights: Path, tiny_config: Callable
) -> None:
    model = build(tiny_config("encoder.frozen=false", f"encoder.weights={weights}"))
    model.encoder.backbone.get_parameter("conv1.weight").data.mul_(1.1)
    frozen = model_from_state(
        model_state(model) | {"config": tiny_config(f"encoder.weights={weights}").model_dump()}, "a.pth"
    ).eval()
    assert frozen.encoder.identity["sha256"] != EncoderCNN(frozen.config.encoder).identity["sha256"]  # other features
    assert torch.equal(hidden(model_from_state(model_state(frozen), "b.pth").eval()), hidden(model))
    path = save(model, tmp_path / "a.pth")
    weights.unlink()
    again = load_model(path)
    assert torch.equal(hidden(again), hidden(model))
    assert all(parameter.requires_grad for parameter in again.encoder.parameters())


# ---- a model to go on from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "there"),
    [
        *(("encoder.name=resnet34", "resnet18"), ("encoder.image_size=64", "32")),
        *(("encoder.stride_in_1x1=true", "false"), ("data.language=zh-characters", "en")),
        *(("decoder.name=transformer", "lstm"), ("decoder.embed_size=8", "16"), ("decoder.hidden_size=8", "32")),
        *(("decoder.num_layers=2", "1"), ("decoder.num_heads=2", "8"), ("decoder.encoder_layers=1", "0")),
    ],
)
def test_a_start_must_agree_in_what_gives_tensors_their_shapes(
    word: str, there: str, state: dict[str, Any], tmp_path: Path, tiny_config: Callable, refused: Callable
) -> None:
    save_checkpoint(tmp_path / "a.pth", state)
    name, start = word.partition("=")[0], f"train.start={tmp_path / 'a.pth'}"
    with refused(f"a.pth was trained with another {name}; start from it with: {name}={there}"):
        model_from_start(tiny_config(start, word))
    free = ["train.lr=1", "decoder.dropout=0.9", "data.min_count=3", "encoder.frozen=false", "train.loss=self_critical"]
    model = model_from_start(tiny_config(start, *free))
    assert torch.equal(model.eval().feature_mean, state["feature_mean"])
    assert (model.config.train.lr, model.config.decoder.dropout) == (1, 0.9)


# ---- what is refused -------------------------------------------------------------------------------------------------


def put(saved: dict[str, Any], place: str, value: object) -> dict[str, Any]:
    *parts, last = place.split("/")
    part = saved
    for name in parts:
        part = part[name]
    part[last] = value
    return saved


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(("config/train/lr", "x" * 9999), ("config/train/more", 1), ("config/decoder/hidden_size", 10**12)),
        *(("vocabulary/words", [*VOCAB.words, "zebra"]), ("vocabulary/words", VOCAB.words[:-1])),
        *(("vocabulary/language", "tlh"), ("feature_mean", torch.ones(511)), ("feature_scale", torch.ones(2))),
        *(("decoder", {}), ("config/decoder/name", "transformer"), ("config/encoder/name", "resnet34")),
        *(("decoder", []), ("decoder", {1: torch.ones(1)}), ("backbone", {"a": 1}), ("backbone", "all")),
        *(("feature_mean", torch.ones(())), ("feature_mean", 1.0), ("feature_scale", torch.zeros(1))),
        *(("feature_scale", torch.tensor([-1.0])), ("feature_mean", torch.full((512,), float("nan")))),
        *(("config", {}), ("config", []), ("config/train", 1), ("config/train/seed", 2**64)),
        *(("config/search/temperature", 1e-50), ("config/search/top_p", 1e-50), ("config/search/beam", 10**7)),
        *(("vocabulary", []), ("vocabulary/words", "words"), ("vocabulary/words", [*VOCAB.words, 7])),
        *((f"transform/{name}", None) for name in ("image_size", "mean", "std", "interpolation")),
        *(("transform/image_size", size) for size in (0, -32, 10**30, 20_000, 32.0, True)),
        *(("transform/std", std) for std in ((0.0, 1.0, 1.0), (1e-50, 1.0, 1.0), (1.0,), (float("nan"), 1.0, 1.0))),
        *(("transform/mean", (0.5, 0.5)), ("transform/mean", (1e30, 0.0, 0.0)), ("transform/more", 1)),
        *(("transform/interpolation", "nearest"), ("transform", {}), ("encoder", {}), ("encoder/source", 3)),
        *(("encoder/sha256", None), ("encoder/name", []), ("encoder/stride_in_1x1", "no"), ("backbone", None)),
    ],
)
def test_a_part_that_does_not_fit_is_refused(
    place: str, value: object, saved: dict[str, Any], refused: Callable
) -> None:
    with refused():
        model_from_state(put(saved, place, value), "a.pth")


def test_no_huge_network_is_built_for_a_small_file(
    saved: dict[str, Any], refused: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ViT of 630 million parameters at 1,022 pixels, of which the file holds nothing, or other tensors."""
    saved["config"]["encoder"] |= {"name": "vit_h_14", "image_size": 1022}
    ran = list[torch.Size]()
    monkeypatch.setattr(EncoderCNN, "forward", lambda self, images: ran.append(images.shape))
    backbones: list[dict | None] = [None, saved["backbone"], {}]
    for backbone in backbones:
        with refused("a.pth"):
            model_from_state(saved | {"backbone": backbone}, "a.pth")
    assert not ran


def test_a_file_of_this_project_without_a_model_is_refused(saved: dict[str, Any], refused: Callable) -> None:
    """Such as consensus.pth."""
    for part in saved:
        with refused(f"a.pth lacks its {part}", "not a trained model"):
            model_from_state({name: content for name, content in saved.items() if name != part}, "a.pth")


@pytest.mark.parametrize("part", ["decoder", "backbone"])
def test_tensors_are_named_that_are_missing_or_too_many_or_not_numbers(
    part: str, saved: dict[str, Any], refused: Callable
) -> None:
    name, tensor = next((n, t) for n, t in saved[part].items() if t.is_floating_point())
    for told, changed in (
        (f"tensor {name} in a.pth does not fit", {n: t for n, t in saved[part].items() if n != name}),
        ("tensor another in a.pth does not fit", saved[part] | {"another": tensor}),
        (f"tensor {name} in a.pth does not fit", saved[part] | {name: tensor.double()}),
        (f"a.pth holds NaN or infinite weights, first in {name}", saved[part] | {name: tensor / 0}),
    ):
        with refused(told):
            model_from_state(saved | {part: changed}, "a.pth")


def test_weights_that_overflow_write_no_caption(saved: dict[str, Any], refused: Callable) -> None:
    for tensor in saved["decoder"].values():
        tensor.copy_(torch.where(tensor < 0, -3e38, 3e38))
    with refused("NaN or infinite"):
        model_from_state(saved, "a.pth").generate(torch.ones(2, 512))
