"""PyTorch as ONNX graphs: what `models.export` takes elsewhere, and what `models.int8` computes in 8 bits."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Graph(nn.Module):
    """A function of tensors as a module, which PyTorch's exporter wants; its weights are those of `owner`."""

    def __init__(self, owner: nn.Module, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.function(*inputs)


@contextmanager
def quietly() -> Iterator[None]:
    """Let no library warn, of what users cannot change, inside a `with` block."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def to_onnx(graph: Graph, inputs: dict[str, torch.Tensor], axes: list[dict[int, str]], outputs: list[str]) -> bytes:
    """Return the graph as ONNX; `axes` names, for each input, those that may change, `outputs` what is returned."""
    contiguous = tuple(part.contiguous() for part in inputs.values())  # strides are traced too, and ONNX has none
    options: dict[str, Any] = {"dynamic_shapes": (tuple(axes),), "input_names": list(inputs), "output_names": outputs}
    with quietly():  # it warns of LSTM weights in one piece, and of its own old functions
        program = torch.onnx.export(graph.eval(), contiguous, dynamo=True, verbose=False, **options)
    assert program is not None
    return program.model_proto.SerializeToString()
