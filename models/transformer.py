"""A Transformer (Vaswani et al. 2017) that attends to the words so far and to the regions of the image.

E width (`decoder.embed_size`), A heads, N = B K captions, K of each image, L regions, S positions of any sequence, W
words or regions in all of them: layers compute these (W, E), and no padding.
"""

from cli import UserError

import math

import torch
import torch.nn.functional as F
from torch import nn

from config import DecoderConfig
from data.vocab import PAD
from models.decoder import Decoder, Memory, State, first_rows, group_by_image


class TransformerDecoder(Decoder):
    """Pre-norm layers with a feed-forward network of size `decoder.hidden_size`; output weights are the embeddings.

    With `decoder.encoder_layers` the regions attend to each other first. The state is each layer's keys and values of
    the words so far (N, t, 2 E), so that a step computes one word only. The alphas are those of the last layer.
    """

    spatial = True

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        width = config.embed_size
        if width % (2 * config.num_heads):
            raise UserError(
                f"decoder.embed_size = {width} cannot be shared by decoder.num_heads = {config.num_heads}; "
                "make it a multiple of twice as many"
            )
        self.heads = config.num_heads
        self.dropout = nn.Dropout(config.dropout)
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
        rows, row = group_by_image(tokens, image_index, len(features))  # (B K, T), (N,)
        no_words = tuple(part.new_empty(len(rows), 0, part.shape[2]) for part in memory)
        hidden, _, alphas = self.read(rows, no_words, memory, Places(rows != PAD))
        return hidden[row], alphas[row]  # (N, T, E), (N, T, A, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        regions = self.dropout(self.project(features))  # (B, L, E)
        places = EveryPlace(len(regions))
        hidden = places.gather(regions + positions(0, regions))  # (B L, E)
        for layer in self.encoder:
            hidden, _, _ = layer(hidden, places)
        keys_values = places.spread(self.key_value(hidden))  # (B, L, layers 2 E)
        return keys_values.chunk(len(self.layers), dim=2)  # for each layer (B, L, 2 E)

    def start(self, memory: Memory) -> State:
        return tuple(part[:, :0] for part in memory)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        hidden, state, alphas = self.read(token.unsqueeze(1), state, memory, EveryPlace(len(token)))
        return self.output(hidden[:, 0]), state, alphas[:, 0]  # (N, V), (N, t + 1, 2 E) each, (N, A, L)

    def read(
        self, tokens: torch.Tensor, state: State, memory: Memory, places: "EveryPlace"
    ) -> tuple[torch.Tensor, State, torch.Tensor]:
        """Read `tokens` (N, T): whole captions, or the one word that follows those in the state.

        Returns hidden states (N, T, E), zeros at padding, the new state, and alphas (N, T, A, L).
        """
        words = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)  # (N, T, E)
        hidden = self.dropout(places.gather(words + positions(state[0].shape[1], words)))  # (W, E)
        new_state = []
        for layer, past, regions in zip(self.layers, state, memory, strict=True):
            hidden, past, alphas = layer(hidden, places, past, regions)
            new_state.append(past)
        return places.spread(self.norm(hidden)), tuple(new_state), alphas

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(self.dropout(hidden), self.embedding.weight, self.bias)


class Layer(nn.Module):
    """Self-attention, cross-attention to the regions (`cross`), feed-forward network: each pre-norm and residual."""

    def __init__(self, config: DecoderConfig, cross: bool) -> None:
        super().__init__()
        width, inner = config.embed_size, config.hidden_size
        self.self_norm, self.self_attention = nn.LayerNorm(width), Attention(width, config.num_heads)
        self.key_value = nn.Linear(width, 2 * width)
        if cross:
            self.cross_norm, self.cross_attention = nn.LayerNorm(width), Attention(width, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: torch.Tensor,
        places: "EveryPlace",
        past: torch.Tensor | None = None,
        regions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """One layer over `hidden` (W, E): causal where `past` is given, else every position attends to every other.

        Args:
            places: where these words stand (N, S).
            past: keys and values of the words before these (N, t, 2 E).
            regions: keys and values of the image's regions (B, L, 2 E).

        Returns hidden (W, E), `past` with these words added, and the alphas over the regions (N, S, A, L).
        """
        normed, alphas = self.self_norm(hidden), None
        keys_values = places.spread(self.key_value(normed))  # (N, S, 2 E)
        keys_values = keys_values if past is None else torch.cat([past, keys_values], dim=1)  # (N, t + S, 2 E)
        hidden = hidden + self.dropout(self.self_attention(normed, places, keys_values, causal=past is not None))
        if regions is not None:
            attended, alphas = self.cross_attention.to_regions(self.cross_norm(hidden), places, regions)
            hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden))), keys_values, alphas


class Attention(nn.Module):
    """Multi-head attention of words (W, E) that stand in `places` (N, S)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, words: torch.Tensor, places: "EveryPlace", keys_values: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        """Self-attention: attend to the words of the same caption, `keys_values` (N, t + S, 2 E); returns (W, E)."""
        query, keys, values = self.split(places.spread(self.query(words)), keys_values)
        if query.is_cpu:  # whose kernel takes seven times as long for gradients in bfloat16
            query, keys, values = query.float(), keys.float(), values.float()
        with torch.autocast("cpu", enabled=False):
            causal = causal and query.shape[2] > 1
            attended = F.scaled_dot_product_attention(query, keys, values, is_causal=causal)  # (N, A, S, E / A)
        return self.output(places.gather(join(attended)))

    def to_regions(
        self, words: torch.Tensor, places: "EveryPlace", keys_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention: attend to the regions of the image, `keys_values` (B, L, 2 E).

        Returns (W, E) and the alphas (N, S, A, L), which PyTorch's fused kernel does not give.
        """
        queries = places.spread(self.query(words))  # (N, S, E)
        query, keys, values = self.split(queries.view(len(keys_values), -1, queries.shape[2]), keys_values)
        alphas = (query @ keys.transpose(2, 3) * query.shape[3] ** -0.5).softmax(3)  # (B, A, K S, L)
        attended = join(alphas @ values).view_as(queries)  # (N, S, E)
        alphas = alphas.transpose(1, 2).reshape(*queries.shape[:2], self.heads, -1)  # (N, S, A, L)
        return self.output(places.gather(attended)), alphas

    def split(self, queries: torch.Tensor, keys_values: torch.Tensor) -> list[torch.Tensor]:
        """Return query (B, A, Q, E / A), keys and values (B, A, S, E / A) by head, of (B, Q, E) and (B, S, 2 E)."""
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
    """Return the positional encoding (S, E) of positions `first`, `first` + 1 … (section 3.5 of the paper)."""
    length, width = like.shape[1:]
    position = torch.arange(first, first + length, device=like.device, dtype=torch.float32).unsqueeze(1)  # (S, 1)
    dimension = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)  # (E / 2,)
    angle = position * torch.exp(-math.log(10000) / width * dimension)  # (S, E / 2), in fp32: bf16 rounds them alike
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)
