"""What the Transformer has beyond the contract of all decoders."""

from collections.abc import Callable

import pytest
import torch

from config import load_config
from models.transformer import TransformerDecoder, positions

D, L, V = 24, 9, 50


def build(*overrides: str) -> TransformerDecoder:
    torch.manual_seed(0)
    sizes = ["decoder.embed_size=16", "decoder.hidden_size=32", "decoder.num_heads=2"]
    return TransformerDecoder(load_config(overrides=[*sizes, *overrides]).decoder, D, V).eval()


def test_the_heads_share_the_width(refused: Callable) -> None:
    with refused("decoder.embed_size = 16", "decoder.num_heads = 3"):
        build("decoder.num_heads=3")


@torch.inference_mode()
def test_the_heads_differ_and_the_words_so_far_are_kept() -> None:
    decoder = build("decoder.num_layers=2", "decoder.num_heads=4")
    memory = decoder.prepare(torch.randn(2, L, D))
    state = decoder.start(memory)
    for t in range(3):
        assert [part.shape for part in state] == [(2, t, 32)] * 2
        _, state, alphas = decoder.step(torch.tensor([5, 6]), state, memory)
    assert not torch.allclose(alphas[:, 0], alphas[:, 1])


@torch.inference_mode()
def test_with_encoder_layers_the_regions_attend_to_each_other() -> None:
    features = torch.randn(1, L, D)
    changed = features.clone()
    changed[0, 0] += 1
    for layers, touched in ((0, 1), (1, L)):
        decoder = build(f"decoder.encoder_layers={layers}")
        (before,), (after,) = decoder.prepare(features), decoder.prepare(changed)
        assert ((before != after).any(2).sum() == touched).item()


@torch.inference_mode()
def test_the_output_weights_are_the_embeddings() -> None:
    decoder = build()
    before = decoder.output(torch.ones(1, 16))
    decoder.embedding.weight[7] += 1
    after = decoder.output(torch.ones(1, 16))
    assert (after - before).flatten().tolist() == pytest.approx([16 * (word == 7) for word in range(V)], abs=1e-4)


def test_positions_are_those_of_the_paper_and_differ_in_bf16_too() -> None:
    angles = torch.tensor([[3, 0.03], [4, 0.04]])
    expected = torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    torch.testing.assert_close(positions(3, torch.zeros(1, 2, 4)), expected)
    exact, rounded = (positions(0, torch.zeros(1, 400, 64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=2**-8)
    assert len(rounded.unique(dim=0)) == 400
