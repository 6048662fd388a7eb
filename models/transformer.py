"""A Transformer (Vaswani et al. 2017) that reads the words so far and the cells of the picture.

E width (`decoder.embed_size`), A heads, N = B K captions, K of each picture, S places of any sequence, W words or cells
in all of them: layers compute these (W, E), and no padding.
"""

from cli import UserError

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from config import DecoderConfig
from data.vocab import PAD
from models.decoder import Decoder, Dropout, Memory, State, by_picture, first_rows


class TransformerDecoder(Decoder):
    """Pre-norm layers with a feed-forward network of size `decoder.hidden_size`; output weights are the embeddings.

    `decoder.encoder_layers` let the cells attend to each other first. The state is each layer's keys and values of the
    words so far (N, t, 2 E), so that a step computes one word only. The maps returned are those of the last layer.
    """

    spatial: ClassVar[bool] = True

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

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        rows, slot = by_picture(tokens, image_index, len(features))  # (B K, T), (N,)
        nothing = tuple(part.new_empty(len(rows), 0, part.shape[2]) for part in memory)
        hidden, _, maps = self.read(rows, nothing, memory, Places(rows != PAD))
        return hidden[slot], maps[slot]  # (N, T, E), (N, T, A, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        cells = self.dropout(self.project(features))  # (B, L, E)
        places = EveryPlace(len(cells))
        hidden = places.gather(cells + positions(0, cells))  # (B L, E)
        for layer in self.encoder:
            hidden, _, _ = layer(hidden, places)
        keys_values = places.spread(self.key_value(hidden))  # (B, L, layers 2 E)
        return keys_values.chunk(len(self.layers), dim=2)  # for each layer (B, L, 2 E)

    def start(self, memory: Memory) -> State:
        return tuple(part[:, :0] for part in memory)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        hidden, state, maps = self.read(token.unsqueeze(1), state, memory, EveryPlace(len(token)))
        return self.output(hidden[:, 0]), state, maps[:, 0]  # (N, V), (N, t + 1, 2 E) each, (N, A, L)

    def read(
        self, tokens: torch.Tensor, state: State, memory: Memory, places: "EveryPlace"
    ) -> tuple[torch.Tensor, State, torch.Tensor]:
        """Read `tokens` (N, T), the first ones or a single one after those in the state.

        Returns (N, T, E), zeros where there is no word, the new state and maps (N, T, A, L).
        """
        words = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)  # (N, T, E)
        hidden = self.dropout(places.gather(words + positions(state[0].shape[1], words)))  # (W, E)
        grown = []
        for layer, past, cells in zip(self.layers, state, memory, strict=True):
            hidden, past, maps = layer(hidden, places, past, cells)
            grown.append(past)
        return places.spread(self.norm(hidden)), tuple(grown), maps

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
        self,
        hidden: torch.Tensor,
        places: "EveryPlace",
        past: torch.Tensor | None = None,
        cells: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Map `hidden` (W, E), which sees all of itself, or, given the keys and values `past`, only what is before.

        Args:
            places: where these words stand (N, S).
            past: of the words before these (N, t, 2 E); cells: of the picture's cells (B, L, 2 E).

        Returns hidden (W, E), `past` with these words added, and the maps on the cells (N, S, A, L).
        """
        normed, maps = self.self_norm(hidden), None
        keys_values = places.spread(self.key_value(normed))  # (N, S, 2 E)
        keys_values = keys_values if past is None else torch.cat([past, keys_values], dim=1)  # (N, t + S, 2 E)
        hidden = hidden + self.dropout(self.self_attention(normed, places, keys_values, causal=past is not None))
        if cells is not None:
            attended, maps = self.cross_attention.attend_with_maps(self.cross_norm(hidden), places, cells)
            hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden))), keys_values, maps


class Attention(nn.Module):
    """Attention with several heads, of words (W, E) that stand in `places` (N, S) to keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, words: torch.Tensor, places: "EveryPlace", keys_values: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        """Return what the words find (W, E) in those of their own caption, `keys_values` (N, t + S, 2 E)."""
        query, keys, values = self.split(places.spread(self.query(words)), keys_values)
        if query.is_cpu:  # whose kernel takes seven times as long for gradients in bfloat16
            query, keys, values = query.float(), keys.float(), values.float()
        with torch.autocast("cpu", enabled=False):
            causal = causal and query.shape[2] > 1
            attended = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)  # (N, A, S, E / A)
        return self.output(places.gather(join(attended)))

    def attend_with_maps(
        self, words: torch.Tensor, places: "EveryPlace", keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the words find (W, E) in the cells of their picture, `keys_values` (B, L, 2 E), and where.

        The fused kernel does not tell where each head looked (N, S, A, L).
        """
        asked = places.spread(self.query(words))  # (N, S, E)
        query, keys, values = self.split(asked.view(len(keys_values), -1, asked.shape[2]), keys_values)
        maps = (query @ keys.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)  # (B, A, K S, L)
        attended = join(maps @ values).view_as(asked)  # (N, S, E)
        maps = maps.transpose(1, 2).reshape(*asked.shape[:2], self.heads, -1)  # (N, S, A, L)
        return self.output(places.gather(attended)), maps

    def split(self, queries: torch.Tensor, keys_values: torch.Tensor) -> list[torch.Tensor]:
        """Return query, keys and values by head, (B, A, Q or S, E / A) each, of (B, Q, E) and (B, S, 2 E)."""
        parts = [queries, *keys_values.chunk(2, dim=2)]
        return [part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts]


def join(heads: torch.Tensor) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(2)  # (B, A, Q, E / A) to (B, Q, E)


class EveryPlace:
    """Where words stand: in all places (N, S) of N captions."""

    def __init__(self, captions: int) -> None:
        self.captions = captions

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Take what stands in the places (N, S, E) where words are (W, E)."""
        return values.flatten(0, 1)

    def spread(self, words: torch.Tensor) -> torch.Tensor:
        """Put what is of words (W, E) where these stand (N, S, E)."""
        return words.unflatten(0, (self.captions, -1))


class Places(EveryPlace):
    """Where words stand in captions of different lengths: where `real` (N, S) says so, and zeros elsewhere."""

    def __init__(self, real: torch.Tensor) -> None:
        super().__init__(len(real))
        self.size, self.first = real.numel(), first_rows(real)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values.flatten(0, 1).index_select(0, self.first)

    def spread(self, words: torch.Tensor) -> torch.Tensor:
        return super().spread(words.new_zeros(self.size, words.shape[1]).index_copy(0, self.first, words))


def positions(first: int, like: torch.Tensor) -> torch.Tensor:
    """Return the sines and cosines (S, E) that tell places from `first` on apart (section 3.5 of the paper)."""
    length, width = like.shape[1:]
    place = torch.arange(first, first + length, device=like.device, dtype=torch.float32).unsqueeze(1)  # (S, 1)
    pace = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)  # (E / 2,)
    angle = place * torch.exp(-math.log(10000) / width * pace)  # (S, E / 2), which bf16 would round to a few places
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)
