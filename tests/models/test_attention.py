"""What Show, Attend and Tell has beyond the contract of all decoders."""

from collections.abc import Callable

import pytest
import torch

from config import load_config
from models.attention import AttentionRNN

D, L, V = 24, 9, 50


@pytest.fixture
def decoder() -> AttentionRNN:
    torch.manual_seed(0)
    return AttentionRNN(load_config(overrides=["decoder.hidden_size=32"]).decoder, D, V).eval()


def test_it_has_one_layer(refused: Callable) -> None:
    with refused("decoder.num_layers = 2", "set it to 1"):
        AttentionRNN(load_config(overrides=["decoder.num_layers=2"]).decoder, D, V)


@torch.inference_mode()
def test_it_attends_to_the_region_that_its_query_points_to(decoder: AttentionRNN) -> None:
    memory = keys, _, _, _ = decoder.prepare(torch.randn(1, L, D))
    decoder.from_word.weight.zero_()
    decoder.from_state.weight.zero_()
    decoder.from_word.bias[:32] = 1e4 * keys[0, :, 4] / keys[0, :, 4].square().sum()
    keys[0, :, [0, 1, 2, 3, 5, 6, 7, 8]] *= 0.1
    _, _, alphas = decoder.step(torch.tensor([7]), decoder.start(memory), memory)
    assert alphas.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_it_adds_up_its_memory_in_fp32_even_in_bf16(decoder: AttentionRNN) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        memory = decoder.prepare(torch.randn(2, L, D))
        state = decoder.start(memory)
        _, (_, c), _ = decoder.step(torch.tensor([5, 6]), state, memory)
    assert state[1].dtype == c.dtype == torch.float32
