"""EncoderCNN: an ImageNet backbone without its classifier gives one feature per picture, or one per region of it.

`models/backbones.py` is the table of backbones that `encoder.name` can have; this file makes an encoder of any of them.
"""

import copy
import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from cli import UserError
from config import EncoderConfig
from data.transforms import Transform
from models.backbones import family_of, unsuitable
from models.weights import load_weights, read_weights

RANDOM = "uniform_ normal_ trunc_normal_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_"
DRAWING: dict[str, Callable] = {name: getattr(nn.init, name) for name in RANDOM.split()}  # what draws weights


class EncoderCNN(nn.Module):
    """A backbone without its classifier. It stays in eval mode, whatever `.train()` is called on the model.

    `feature_shape` is (L, D) or (D,), and `identity` names the weights in plain values.

    Args:
        spatial: one feature per region (B, L, D), else their mean (B, D).
        load: False leaves the weights random.
        fill: puts weights into the backbone, such as fine-tuned ones, in the place of those in a file.

    Raises UserError when the weights cannot be found or do not fit, and for a picture size or stage that does not suit
    the backbone.
    """

    def __init__(
        self,
        config: EncoderConfig,
        spatial: bool = False,
        load: bool = True,
        fill: Callable[[nn.Module], object] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.spatial = config, spatial
        self.family, size = family_of(config.name), transform_for(config).image_size

        # the whole classifier with random weights, and of it only what comes before its head
        source = find_weights(config) if load and not fill and config.weights else None
        with without_random_weights() if source or fill or not load else nullcontext():  # others take their place
            network = self.family.build(config.name, size)
        if config.stride_in_1x1:
            move_stride(network, config.name)
        state = self.family.adapt(network, read_weights(source)) if source else {}
        whole = network.state_dict(keep_vars=True)
        self.backbone = self.family.cut(network, config.name).eval()
        self.prefix_tokens, head = self.family.prefix_tokens(network), self.family.classifier(network)

        # its weights, known by the hash of their file, or of their values where there is none
        self.classifier: nn.Module | None = None
        if source and load_weights(state, whole, self.backbone, source, config.name) and head:
            self.classifier = head.eval().requires_grad_(False)
        if fill:
            fill(self.backbone)
        self.identity = {
            "name": config.name,
            "source": str(source) if source else None,
            "sha256": file_sha256(source) if source else tensors_sha256(self.backbone) if load or fill else "",
            "stride_in_1x1": config.stride_in_1x1,
        }

        # frozen, but for the stages to train; convolutions are fastest with channels last
        self.backbone.requires_grad_(False).to(memory_format=torch.channels_last)
        for stage in trained_stages(self.backbone, config):
            stage.requires_grad_(True)

        try:
            with torch.no_grad(), redirect_stderr(io.StringIO()):  # torch.fx would print a traceback
                self.feature_shape = tuple(self(torch.zeros(1, 3, size, size)).shape[1:])
        except (RuntimeError, AssertionError):  # too small for its last stage, or it does not divide into windows
            raise unsuitable(config.name, size) from None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Encode normalised pictures (B, 3, S, S) as (B, D), or as (B, L, D) with regions row by row."""
        features = self.family.run(self.backbone, images)
        if features.ndim == 4:  # (B, D, h, w), without prefix tokens
            features = features.flatten(2).transpose(1, 2)
        features = features[:, self.prefix_tokens :]  # (B, L, D)
        return features if self.spatial else features.mean(1)

    @torch.no_grad()
    def classify(self, features: torch.Tensor) -> torch.Tensor | None:
        """Return the probabilities (B, 1000) of ImageNet's classes, see `models.imagenet`, given features (B, D) or
        (B, L, D); None where the weights came without their classifier.
        """
        if self.classifier is None:
            return None
        pooled = features.float() if features.ndim == 2 else features.float().mean(1)  # (B, D)
        return self.classifier(pooled).softmax(1)

    def train(self, mode: bool = True) -> "EncoderCNN":
        """Leave the backbone in eval mode, frozen or not: BatchNorm statistics are never learned from captions."""
        super().train(mode)
        for part in self.children():
            part.eval()
        return self

    def in_8_bits(self, transform: Transform, folder: Path) -> nn.Module:
        """Return a copy that encodes uint8 pixels in 8 bits, kept in `folder`; see `models.int8`."""
        from models.int8 import Int8Encoder  # with packages that few users have

        return Int8Encoder(self, transform, folder)

    def name_in_8_bits(self, transform: Transform) -> str:
        """Return the name of that copy."""
        from models.int8 import name_copy

        return name_copy(self, transform)

    def for_inference(self, dtype: torch.dtype) -> "EncoderCNN":
        """Return a fast copy that only encodes: BatchNorm folded into the convolutions, channels last, in `dtype`."""
        fast = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        fold_batchnorm(fast.backbone)
        return fast.to(dtype).to(memory_format=torch.channels_last)


@contextmanager
def without_random_weights() -> Iterator[None]:
    """In this context modules are made without drawing their weights, which takes time, for weights that are loaded;
    until then they are whatever lay in memory.
    """
    try:
        for name in DRAWING:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in DRAWING.items():
            setattr(nn.init, name, function)


def transform_for(config: EncoderConfig) -> Transform:
    """Return the transform that the backbone's weights were trained with, at `encoder.image_size` where it is given."""
    transform = family_of(config.name).transform(config.name, config.weights or "")
    return replace(transform, image_size=config.image_size or transform.image_size)


def move_stride(network: nn.Module, name: str) -> None:
    """Move the stride of each stage to its first 1x1 convolution, where the original Caffe ResNets have it."""
    for stage in ("layer2", "layer3", "layer4"):
        block: Any = getattr(network, stage)[0] if hasattr(network, stage) else None
        if not hasattr(block, "conv3"):
            raise UserError(f"encoder.stride_in_1x1 needs a ResNet with bottlenecks, not {name}; set it to false")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)


def trained_stages(backbone: nn.Module, config: EncoderConfig) -> list[nn.Module]:
    """Return the parts that learn; raises UserError for a name in `encoder.stages` that the backbone does not have."""
    if config.frozen:
        return []
    if config.stages is None:
        return [backbone]
    modules = dict(backbone.named_modules())
    for unknown in (stage for stage in config.stages if stage not in modules):
        known = ", ".join(name for name, part in backbone.named_children() if list(part.parameters()))
        raise UserError(
            f"encoder.stages names {unknown:.60}, which {config.name} lacks; take some of {known}, or of their parts"
        )
    return [modules[stage] for stage in config.stages]


def find_weights(config: EncoderConfig) -> Path:
    """Return the file that `encoder.weights` names: a path, pip's own file, or a download kept in torch.hub's cache."""
    name = config.weights or ""
    if Path(name).is_file():
        return Path(name).resolve()
    if Path(name).suffix or "/" in name or "\\" in name:
        raise UserError(f"there is no weights file at encoder.weights = {name}; check the path")
    return family_of(config.name).find_weights(config.name, name)


class Tracer(fx.Tracer):
    """Shows convolutions and norms as one step each, those of other libraries too."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(module, name)


def fold_batchnorm(backbone: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it, in place; outputs in eval mode stay the same.

    Where something else reads the convolution's output too, such as a residual connection, the two stay apart, and so
    they do in a network of which torch.fx cannot tell what follows what.
    """
    modules = dict(backbone.named_modules())
    tracer = Tracer()
    tracer.traced_func_name = "forward_features" if hasattr(backbone, "forward_features") else "forward"  # timm's
    try:
        graph = tracer.trace(backbone)
    except (fx.proxy.TraceError, RuntimeError, TypeError, ValueError, AttributeError):
        return
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            [before] = node.args
            if before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d) and len(before.users) == 1:
                folded = fuse_conv_bn_eval(modules[before.target], modules[node.target])
                backbone.set_submodule(before.target, folded)
                activation = getattr(modules[node.target], "act", nn.Identity())  # timm's norms have theirs within
                backbone.set_submodule(node.target, activation)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_sha256(module: nn.Module) -> str:
    """Return a hash of the values of weights that are in no file: random or fine-tuned ones."""
    digest = hashlib.sha256()
    for tensor in module.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
