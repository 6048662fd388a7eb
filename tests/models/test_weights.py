"""Files of weights: read as people have them, or refused with the reason."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from test_encoder import config, encode

from models.encoder import EncoderCNN
from models.weights import read_weights

safetensors = pytest.importorskip("safetensors.torch")
STATE = {"conv.weight": torch.rand(2, 3), "norm.num_batches_tracked": torch.tensor(7)}
OTHER = {"conv.weight": torch.zeros(2, 3)}


def renamed(*prefixes: str) -> dict[str, torch.Tensor]:
    return {f"{''.join(prefixes)}{name}": tensor for name, tensor in STATE.items()}


FILES: dict[str, Any] = {
    "plain": STATE,
    "of DataParallel": renamed("module."),
    "of torch.compile": renamed("_orig_mod."),
    "of both": renamed("module.", "_orig_mod."),
    "of both, the other way round": renamed("_orig_mod.", "module."),
    "of a compiled part": {"conv._orig_mod.weight": STATE["conv.weight"], **dict([*STATE.items()][1:])},
    **{f"in {name}": {name: STATE, "epoch": 3} for name in ("state_dict", "model", "model_state_dict")},
    "averaged": {"state_dict": OTHER, "state_dict_ema": renamed("module."), "args": argparse.Namespace(lr=0.1)},
    "never averaged": {"state_dict": STATE, "state_dict_ema": None},
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_read_as_people_have_them(kind: str, tmp_path: Path) -> None:
    torch.save(FILES[kind], tmp_path / "weights.pth")
    read = read_weights(tmp_path / "weights.pth")
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in STATE.items())


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "blob"  # as Hugging Face's cache names files
    safetensors.save_file(renamed("module."), path)
    assert torch.equal(read_weights(path)["conv.weight"], STATE["conv.weight"])


NO_STATE: list[Any] = [[STATE], {"net": STATE}, {"model": {"conv": 1}}, {1: OTHER["conv.weight"]}]


@pytest.mark.parametrize("content", ["{}", "cut", *NO_STATE])
def test_what_is_no_file_of_weights_is_refused(content: Any, tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "odd.safetensors"
    if isinstance(content, str):
        whole = safetensors.save(STATE)
        path.write_bytes(whole[:-5] if content == "cut" else (9).to_bytes(8, "little") + b"{}")
    else:
        torch.save(content, path)
    with refused(str(path), "cut short" if isinstance(content, str) else "torch.save(net.state_dict(), FILE)"):
        read_weights(path)


class Trap:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


@pytest.mark.parametrize(("content", "named"), [(torch.nn.Linear(2, 2), "Linear"), (Trap(), "print")])
def test_what_might_run_code_is_named_and_not_run(
    content: object, named: str, tmp_path: Path, refused: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": STATE, "more": content}, tmp_path / "whole.pth")
    with refused("whole.pth holds more than weights", named, "torch.save(net.state_dict(), FILE)"):
        read_weights(tmp_path / "whole.pth")
    assert not capsys.readouterr().out


def test_an_encoder_takes_halves_and_is_known_by_the_file(tmp_path: Path) -> None:
    whole = torchvision.models.squeezenet1_1().half().state_dict()
    safetensors.save_file({f"module.{name}": tensor for name, tensor in whole.items()}, tmp_path / "half.safetensors")
    torch.save(whole, tmp_path / "half.pth")
    by_name = [config("encoder.name=squeezenet1_1", f"encoder.weights={path}") for path in sorted(tmp_path.iterdir())]
    first, second = map(EncoderCNN, by_name)
    assert torch.equal(encode(first), encode(second))
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    assert first.identity["sha256"] != second.identity["sha256"]
