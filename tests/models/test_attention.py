"""What the decoders that look at the picture have beyond the contract of all decoders."""

from collections.abc import Callable

import pytest
import torch

from config import load_config
from models.attention import AttentionRNN
from models.decoder import group_by_image
from models.transformer import TransformerDecoder, positions

WIDTH, CELLS, VOCAB = 24, 9, 50


def transformer(*overrides: str) -> TransformerDecoder:
    torch.manual_seed(0)
    sizes = ["decoder.embed_size=16", "decoder.hidden_size=32", "decoder.num_heads=2"]
    return TransformerDecoder(load_config(overrides=[*sizes, *overrides]).decoder, WIDTH, VOCAB).eval()


def test_captions_of_a_picture_are_brought_together_and_found_again() -> None:
    tokens = torch.tensor([[1, 1], [2, 2], [3, 3], [4, 4]])
    rows, slot = group_by_image(tokens, torch.tensor([2, 0, 2, 1]), 4)
    assert rows[:, 0].tolist() == [2, 0, 4, 0, 1, 3, 0, 0]
    assert torch.equal(rows[slot], tokens)


def test_the_attention_lstm_has_one_layer(refused: Callable) -> None:
    with refused("decoder.num_layers = 2", "set it to 1"):
        AttentionRNN(load_config(overrides=["decoder.num_layers=2"]).decoder, WIDTH, VOCAB)


@torch.inference_mode()
def test_the_lstm_looks_where_its_query_points() -> None:
    torch.manual_seed(0)
    decoder = AttentionRNN(load_config(overrides=["decoder.hidden_size=32"]).decoder, WIDTH, VOCAB).eval()
    memory = keys, _, _, _ = decoder.prepare(torch.randn(1, CELLS, WIDTH))
    decoder.from_word.weight.zero_()
    decoder.from_state.weight.zero_()
    decoder.from_word.bias[:32] = 1e4 * keys[0, :, 4] / keys[0, :, 4].square().sum()
    keys[0, :, [0, 1, 2, 3, 5, 6, 7, 8]] *= 0.1
    _, _, attention = decoder.step(torch.tensor([7]), decoder.start(memory), memory)
    assert attention.flatten().tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_the_width_is_shared_by_the_heads(refused: Callable) -> None:
    with refused("decoder.embed_size = 16", "decoder.num_heads = 3"):
        transformer("decoder.num_heads=3")


@torch.inference_mode()
def test_each_head_of_the_transformer_has_its_own_map() -> None:
    decoder = transformer("decoder.num_heads=4")
    memory = decoder.prepare(torch.randn(2, CELLS, WIDTH))
    _, _, maps = decoder.step(torch.tensor([5, 6]), decoder.start(memory), memory)
    assert maps.shape == (2, 4, CELLS)
    assert not torch.allclose(maps[:, 0], maps[:, 1])


@torch.inference_mode()
def test_the_transformer_remembers_the_words_it_has_read() -> None:
    decoder = transformer("decoder.num_layers=2")
    memory = decoder.prepare(torch.randn(2, CELLS, WIDTH))
    state = decoder.start(memory)
    for t in range(3):
        assert [part.shape for part in state] == [(2, t, 32)] * 2
        _, state, _ = decoder.step(torch.tensor([5, 6]), state, memory)


@torch.inference_mode()
def test_cells_of_the_transformer_see_each_other_where_it_has_encoder_layers() -> None:
    features = torch.randn(1, CELLS, WIDTH)
    changed = features.clone()
    changed[0, 0] += 1
    for layers, touched in ((0, 1), (1, CELLS)):
        decoder = transformer(f"decoder.encoder_layers={layers}")
        (before,), (after,) = decoder.prepare(features), decoder.prepare(changed)
        assert ((before != after).any(2).sum() == touched).item()


@torch.inference_mode()
def test_the_output_weights_of_the_transformer_are_its_embeddings() -> None:
    decoder = transformer()
    before = decoder.output(torch.ones(1, 16))
    decoder.embedding.weight[7] += 1
    after = decoder.output(torch.ones(1, 16))
    assert (after - before).flatten().tolist() == pytest.approx([16 * (word == 7) for word in range(VOCAB)], abs=1e-4)


def test_positions_are_those_of_the_paper() -> None:
    found = positions(3, torch.zeros(1, 2, 4))
    angles = torch.tensor([[3, 0.03], [4, 0.04]])
    torch.testing.assert_close(found, torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1))
