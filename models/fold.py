"""BatchNorm folded into convolutions: the same features, sooner. Only `EncoderCNN.for_inference` needs it."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def fold_batchnorm(backbone: nn.Module, size: int) -> None:
    """Fold each BatchNorm into the convolution before it, in place; outputs in eval mode stay the same.

    A forward pass of one picture (1, 3, size, size) shows, in any backbone, which norm reads the output of which
    convolution. Where something else reads it too, such as a residual connection, the two stay apart.
    """
    made_by: dict[int, str] = {}  # id of a convolution's output -> the name of the convolution
    outputs: list[torch.Tensor] = []  # kept alive, so that no id is used twice
    pairs: list[tuple[int, str]] = []  # id of a convolution's output, and the name of a norm that reads it
    readers = Counter[int]()  # operations that read a convolution's output, by its id

    class CountReaders(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            readers.update(id(value) for value in tree_leaves((args, kwargs)) if id(value) in made_by)
            return func(*args, **(kwargs or {}))

    def note_output(name: str, output: torch.Tensor) -> None:
        made_by[id(output)] = name
        outputs.append(output)

    def note_input(name: str, norm_input: torch.Tensor) -> None:
        if id(norm_input) in made_by:
            pairs.append((id(norm_input), name))

    hooks = []
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda m, x, y, name=name: note_output(name, y)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: note_input(name, x[0])))
    with torch.no_grad(), CountReaders():
        backbone(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    for output, norm_name in pairs:
        if readers[output] == 1:
            conv: Any = backbone.get_submodule(made_by[output])
            norm: Any = backbone.get_submodule(norm_name)
            backbone.set_submodule(made_by[output], fuse_conv_bn_eval(conv, norm))
            backbone.set_submodule(norm_name, nn.Identity())
