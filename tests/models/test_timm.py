"""timm's networks as encoders: what is a region, positions for another size, and where their weights come from."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_encoder import config, encode

from config import EncoderConfig
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
    size = 112
    spatial, pooled = EncoderCNN(timm_config(name, size), True), EncoderCNN(timm_config(name, size))
    pooled.load_state_dict(spatial.state_dict())
    pictures = torch.rand(2, 3, size, size)
    regions = encode(spatial, pictures)  # (B, L, D)
    torch.testing.assert_close(encode(pooled, pictures), regions.mean(1))
    with torch.inference_mode():
        backbone: Any = spatial.backbone
        own = backbone.forward_intermediates(pictures, indices=1, norm=True, intermediates_only=True)[0]
        own = getattr(spatial.backbone, "fc_norm", torch.nn.Identity())(own.flatten(2).mT)  # of (B, D, h, w)
    if name == "timm/swin_tiny_patch4_window7_224":
        own = own.flatten(1)
    torch.testing.assert_close(regions.flatten(1) if own.ndim == 2 else regions, own)
    assert spatial.prefix_tokens == PREFIX[name]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [224, 112])
def test_positions_are_resized_as_timm_does(name: str, size: int, tmp_path: Path) -> None:
    own = transform_for(timm_config(name, "null")).image_size
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
    assert encoder.backbone.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in encoder.backbone.state_dict().items())
