"""BatchNorm folded into convolutions: the same features, sooner. Only `EncoderCNN.for_inference` needs it."""

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def fold_batchnorm(backbone: nn.Module, size: int) -> None:
    """Fold each BatchNorm that directly follows a convolution into it, in place; outputs in eval mode stay the same.

    A forward pass of one picture (1, 3, size, size) shows which norm follows which convolution, in any backbone.
    """
    made_by: dict[int, str] = {}  # id of a convolution's output -> the name of the convolution
    outputs: list[torch.Tensor] = []  # kept alive, so that no id is used twice
    pairs: list[tuple[str, str]] = []  # names of a convolution and the norm that reads its output

    def note_output(name: str, output: torch.Tensor) -> None:
        made_by[id(output)] = name
        outputs.append(output)

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
