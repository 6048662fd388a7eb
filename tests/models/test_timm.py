"""timm's networks as encoders: what is a region, positions for another size, and where their weights come from."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file
from test_encoder import config, encode

from config import EncoderConfig, load_config
from data.transforms import Transform
from models import backbones
from models.encoder import EncoderCNN, transform_for

VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SMALL: dict[str, dict[str, Any]] = {  # networks of the documentation, made small: their sizes
    "timm/vit_base_patch32_clip_quickgelu_224.openai": VIT,
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": VIT,
    "timm/vit_base_patch16_siglip_224": VIT,
    "timm/eva02_base_patch14_224": VIT,
    "timm/swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
}
PREFIX = dict(zip(SMALL, (1, 5, 0, 1, 0), strict=True))  # the class token, and four registers
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **options: create(name, **options, **SMALL.get(f"timm/{name}", {}))
    )


def timm_config(name: str, size: int | str, weights: Path | str = "null") -> EncoderConfig:
    return config(f"encoder.name={name}", f"encoder.image_size={size}", f"encoder.weights={weights}")


@pytest.mark.parametrize("name", SMALL)
def test_regions_run_along_the_rows_without_prefix_tokens(name: str) -> None:
    spatial, pooled = (EncoderCNN(timm_config(name, 224), spatial) for spatial in (True, False))
    pooled.load_state_dict(spatial.state_dict())
    pictures = torch.rand(2, 3, 224, 224)
    regions = encode(spatial, pictures)  # (B, L, D)
    torch.testing.assert_close(encode(pooled, pictures), regions.mean(1))
    backbone: Any = spatial.backbone
    with torch.inference_mode():
        [grid] = backbone.forward_intermediates(pictures, indices=1, norm=True, intermediates_only=True)
        norm = getattr(backbone, "fc_norm", torch.nn.Identity())
        torch.testing.assert_close(regions, norm(grid.flatten(2).mT))  # of timm's (B, D, h, w)
    assert spatial.prefix_tokens == PREFIX[name]


@pytest.mark.parametrize(("name", "size"), [*zip(SMALL, (96, 224, 112, 112, 112), strict=True)])
def test_positions_are_resized_as_timm_does(name: str, size: int, tmp_path: Path) -> None:
    own = transform_for(timm_config(name, "null")).image_size
    assert own != size
    torch.manual_seed(0)
    saved = {key: torch.randn_like(tensor) for key, tensor in backbones.build_timm(name, own).state_dict().items()}
    save_file(saved, tmp_path / "weights.safetensors")
    encoder = EncoderCNN(timm_config(name, size, tmp_path / "weights.safetensors"), True)
    by_timm = timm.create_model(
        name.removeprefix("timm/"),
        num_classes=1,
        img_size=size,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.safetensors"), "num_classes": 1},
    )
    theirs = by_timm.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in encoder.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        ("timm/resnet18.tv_in1k", Transform(224)),
        ("timm/vit_small_patch14_reg4_dinov2", Transform(518, interpolation="bicubic")),
        ("timm/vit_base_patch32_clip_quickgelu_224.openai", Transform(224, CLIP_MEAN, CLIP_STD, "bicubic")),
        ("timm/vit_base_patch16_siglip_384", Transform(384, (0.5,) * 3, (0.5,) * 3, "bicubic")),
    ],
)
def test_pictures_are_prepared_as_timm_says(name: str, transform: Transform) -> None:
    assert transform_for(timm_config(name, "null")) == transform
    assert transform_for(timm_config(name, 96)).image_size == 96


@pytest.mark.parametrize("recipe", ["clip", "dinov2"])
def test_the_recipes_name_networks_that_timm_has_weights_for(recipe: str) -> None:
    settings = load_config(f"configs/{recipe}.yaml").encoder
    assert settings.name in SMALL and backbones.timm_weights(settings.name).hf_hub_id
    assert EncoderCNN(settings, True, load=False).feature_shape == {"clip": (49, 16), "dinov2": (256, 16)}[recipe]


@torch.no_grad()
def test_a_network_is_cut_where_gradients_are_turned_off() -> None:
    assert EncoderCNN(timm_config("timm/test_vit", 64), True).feature_shape == (16, 64)


def test_weights_may_change_after_a_network_has_run() -> None:
    first, second = (EncoderCNN(timm_config("timm/efficientvit_m0", 64)) for _ in range(2))
    second.load_state_dict(first.state_dict())
    pictures = torch.rand(1, 3, 64, 64)
    assert torch.equal(encode(first, pictures), encode(second, pictures))


def test_a_classifier_in_the_file_does_not_matter_but_another_network_does(tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "weights.pth"
    saved = backbones.build_timm("timm/test_vit", 64).state_dict()
    heads = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    bare = {name: tensor for name, tensor in saved.items() if not name.startswith("head.")}
    for state in (bare, saved | heads):
        torch.save(state, path)
        encoder = EncoderCNN(timm_config("timm/test_vit", 64, path))
        assert all(torch.equal(tensor, bare[name]) for name, tensor in encoder.backbone.state_dict().items())
    with refused(str(path), "timm/test_convnext", "encoder.name"):
        EncoderCNN(timm_config("timm/test_convnext", 64, path))
    with refused(str(path), "timm/vit_base_patch16_siglip_224", "encoder.name"):
        EncoderCNN(timm_config("timm/vit_base_patch16_siglip_224", 64, path))


def test_positions_that_timm_does_not_resize_are_refused(tmp_path: Path, refused: Callable) -> None:
    torch.save(backbones.build_timm("timm/pit_ti_224", 224).state_dict(), tmp_path / "weights.pth")
    with refused("timm/pit_ti_224", "first pos_embed", "the encoder.image_size that they are for"):
        EncoderCNN(timm_config("timm/pit_ti_224", 96, tmp_path / "weights.pth"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A Hugging Face Hub that has weights of test_vit, and the files asked of it since; its cache is empty."""
    path, asked = tmp_path / "model.safetensors", list[str]()
    save_file(backbones.build_timm("timm/test_vit", 160).state_dict(), path)

    def download(repository: str, file: str) -> str:
        asked.append(f"{repository}/{file}")
        if not path.is_file():
            raise LocalEntryNotFoundError("An error happened while trying to locate the file. Please check it.\nYours")
        return str(path)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *file: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit.r160_in1k"])
def test_pretrained_weights_come_from_the_hub_once(
    name: str, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, path = timm_config(name, 64, "pretrained"), tmp_path / "model.safetensors"
    encoder = EncoderCNN(settings)
    assert hub == ["timm/test_vit.r160_in1k/model.safetensors"]
    assert encoder.identity["source"] == str(path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *file: str(path))
    assert EncoderCNN(settings).identity == encoder.identity
    assert len(hub) == 1


def test_a_failed_download_names_the_file_to_fetch(hub: list[str], tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "model.safetensors").unlink()
    url = "https://huggingface.co/timm/test_vit.r160_in1k/resolve/main/model.safetensors"
    with refused(f"cannot download {url} (An error happened while trying to locate the file)", "encoder.weights=FILE"):
        EncoderCNN(timm_config("timm/test_vit", 64, "pretrained"))


def test_timm_is_needed_for_its_own_networks_only(monkeypatch: pytest.MonkeyPatch, refused: Callable) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with refused("timm/… needs timm", "pip install -r requirements-extras.txt"):
        EncoderCNN(timm_config("timm/test_vit", 64))
    EncoderCNN(timm_config("resnet18", 64))
