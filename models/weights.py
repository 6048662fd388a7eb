"""Files of weights as people have them: .pth or .safetensors, from DataParallel or torch.compile, wrapped or bare."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cli import UserError
from cli.safe_load import DAMAGED, safe_load

# What training scripts call the part of a checkpoint that is the network; averaged weights are the better ones.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet that only their own training needs


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict in a file, with the names that the plain network gives its tensors.

    Raises UserError when the file is damaged or holds something else. Nothing in it is executed (`weights_only`).
    """
    state = read_safetensors(path) if is_safetensors(path) else read_pickle(path)
    for name in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    tensors = isinstance(state, dict) and all(isinstance(each, torch.Tensor) for each in state.values())
    if not tensors or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no network's state_dict; save one with torch.save(net.state_dict(), FILE)")
    return {name.replace("_orig_mod.", "").removeprefix("module."): tensor for name, tensor in state.items()}


def is_safetensors(path: Path) -> bool:
    """Whether a file begins with a length and JSON; Hugging Face's cache resolves to names without an ending."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path} needs safetensors; install it: pip install -r requirements-extras.txt") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a file of weights, or was cut short; download it again") from error


def read_pickle(path: Path) -> Any:
    try:
        return safe_load(path, [argparse.Namespace])  # the options that many keep beside weights
    except DAMAGED as error:
        other = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and other:
            raise UserError(
                f"{path} holds more than weights ({other[1]:.60}), which might run code and is not read; save the "
                "weights alone with torch.save(net.state_dict(), FILE)"
            ) from None
        raise UserError(f"{path} is not a file of weights, or was cut short; download it again") from error


def load_weights(
    state: dict[str, torch.Tensor], whole: dict[str, torch.Tensor], backbone: nn.Module, path: Path, name: str
) -> bool:
    """Load the `state` from the file `path` into a network, of which the backbone is a part.

    The tensors of its head may be missing or differ; returns whether they were loaded, too.

    `whole` are the tensors of the network, by name. Raises UserError when the file belongs to another backbone.
    """
    state = {key: tensor for key, tensor in state.items() if not key.startswith(AUXILIARY)}
    used = {id(tensor) for tensor in backbone.state_dict(keep_vars=True).values()}
    own = {key: tensor for key, tensor in whole.items() if id(tensor) in used}
    head = whole.keys() - own.keys()
    differ = [key for key in state if key not in head and (key not in own or own[key].shape != state[key].shape)]
    differ += [key for key in own if key not in state and "num_batches" not in key]
    if differ:
        sizes = all(key in own and key in state for key in differ)  # no more than positions, perhaps
        raise UserError(
            f"the weights in {path} do not fit {name}: {len(differ)} tensors differ, first "
            f"{', '.join(differ[:3])}; name the backbone they belong to in encoder.name, or other weights"
            f"{', or the encoder.image_size that they are for' if sizes else ''}"
        )
    has_head = all(key in state and state[key].shape == whole[key].shape for key in head)
    with torch.no_grad():
        for key in (whole if has_head else own).keys() & state.keys():
            whole[key].copy_(state[key])
    return has_head
