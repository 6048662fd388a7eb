"""A Transformer (Vaswani et al. 2017) that reads the words so far and the cells of the picture.

E width (`decoder.embed_size`), A heads, N = B K captions, K of each picture, S places of any sequence.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from config import DecoderConfig, UserError
from models.decoder import Decoder, Dropout, Memory, State, by_picture


class TransformerDecoder(Decoder):
    """Pre-norm layers with a feed-forward network of size `decoder.hidden_size`; output weights are the embeddings.

    `decoder.encoder_layers` let the cells attend to each other first. The state is each layer's keys and values of the
    words so far (N, t, 2 E), so that a step computes one word only. The maps returned are those of the last layer.
    """

    grid: ClassVar[bool] = True

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        width = config.embed_size
        if width % (2 * config.num_heads):
            raise UserError(
                f"decoder.embed_size = {width} cannot be shared by decoder.num_heads = {config.num_heads}; "
                "make it a multiple of twice as many"
            )
        self.heads = config.num_heads
        self.dropout = Dropout(config.dropout)
        self.project = nn.Linear(feature_size, width)
        self.encoder = nn.ModuleList(Layer(config, cross=False) for _ in range(config.encoder_layers))
        self.key_value = nn.Linear(width, config.num_layers * 2 * width)
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(config, cross=True) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.embedding.weight, std=0.5 * width**-0.5)

    def hidden(
        self, features: torch.Tensor, tokens: torch.Tensor, owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        rows, slot = by_picture(tokens, owner, len(features))  # (B K, T), (N,)
        nothing = tuple(part.new_empty(len(rows), 0, part.shape[2]) for part in memory)
        hidden, _, maps = self.read(rows, nothing, memory)
        return hidden[slot], maps[slot]  # (N, T, E), (N, T, A, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        cells = self.dropout(self.project(features))  # (B, L, E)
        cells = cells + positions(0, cells)
        for layer in self.encoder:
            cells, _, _ = layer(cells)
        return self.key_value(cells).chunk(len(self.layers), dim=2)  # keys and values for each layer (B, L, 2 E)

    def start(self, memory: Memory) -> State:
        return tuple(part[:, :0] for part in memory)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        hidden, state, maps = self.read(token.unsqueeze(1), state, memory)
        return self.output(hidden[:, 0]), state, maps[:, 0]  # (N, V), (N, t + 1, 2 E) each, (N, A, L)

    def read(self, tokens: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        """Read `tokens` (N, T), the first ones or a single one after those in the state.

        Returns (N, T, E), the new state and maps (N, T, A, L).
        """
        words = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)  # (N, T, E)
        hidden = self.dropout(words + positions(state[0].shape[1], words))
        grown = []
        for layer, past, cells in zip(self.layers, state, memory, strict=True):
            hidden, past, maps = layer(hidden, past, cells)
            grown.append(past)
        return self.norm(hidden), tuple(grown), maps

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(self.dropout(hidden), self.embedding.weight, self.bias)


class Layer(nn.Module):
    """Self-attention, cross-attention where there are cells, and a feed-forward network; each normed and added."""

    def __init__(self, config: DecoderConfig, cross: bool) -> None:
        super().__init__()
        width, inner = config.embed_size, config.hidden_size
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, config.num_heads)
        self.key_value = nn.Linear(width, 2 * width)
        if cross:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = Dropout(config.dropout)

    def forward(
        self, hidden: torch.Tensor, past: torch.Tensor | None = None, cells: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Map `hidden` (N, S, E), which sees all of itself, or, given the keys and values `past`, only what is before.

        Args:
            past: of the words before these (N, t, 2 E); cells: of the picture's cells (B, L, 2 E).

        Returns hidden (N, S, E), `past` with these words added, and the maps on the cells (N, S, A, L).
        """
        normed, maps = self.self_norm(hidden), None
        keys_values = self.key_value(normed)  # (N, S, 2 E)
        causal = past is not None and hidden.shape[1] > 1
        keys_values = keys_values if past is None else torch.cat([past, keys_values], dim=1)  # (N, t + S, 2 E)
        hidden = hidden + self.dropout(self.self_attention(normed, keys_values, causal))
        if cells is not None:
            queries = self.cross_norm(hidden).view(len(cells), -1, hidden.shape[2])  # (B, K S, E)
            attended, maps = self.cross_attention.attend_with_maps(queries, cells)
            hidden = hidden + self.dropout(attended.view_as(hidden))
            maps = maps.reshape(*hidden.shape[:2], *maps.shape[2:])  # (N, S, A, L)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden))), keys_values, maps


class Attention(nn.Module):
    """Attention with several heads, of `queries` (B, Q, E) to keys and values `keys_values` (B, S, 2 E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, keys_values: torch.Tensor, causal: bool) -> torch.Tensor:
        query, keys, values = self.split(queries, keys_values)
        if query.is_cpu:  # whose kernel takes seven times as long for gradients in bfloat16
            query, keys, values = query.float(), keys.float(), values.float()
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)
        return self.join(attended)  # (B, Q, E)

    def attend_with_maps(self, queries: torch.Tensor, keys_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where each head looked too (B, Q, A, S), which the fused kernel does not tell."""
        query, keys, values = self.split(queries, keys_values)
        maps = (query @ keys.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)  # (B, A, Q, S)
        return self.join(maps @ values), maps.transpose(1, 2)

    def split(self, queries: torch.Tensor, keys_values: torch.Tensor) -> list[torch.Tensor]:
        """Return query, keys and values by head, (B, A, Q or S, E / A) each."""
        parts = [self.query(queries), *keys_values.chunk(2, dim=2)]
        return [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]

    def join(self, heads: torch.Tensor) -> torch.Tensor:
        return self.output(heads.transpose(1, 2).flatten(2))


def positions(first: int, like: torch.Tensor) -> torch.Tensor:
    """Return the sines and cosines (S, E) that tell places from `first` on apart (section 3.5 of the paper)."""
    length, width = like.shape[1:]
    place = torch.arange(first, first + length, device=like.device, dtype=torch.float32).unsqueeze(1)  # (S, 1)
    pace = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)  # (E / 2,)
    angle = place * torch.exp(-math.log(10000) / width * pace)  # (S, E / 2), which bf16 would round to a few places
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)
