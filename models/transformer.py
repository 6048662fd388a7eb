"""A Transformer (Vaswani et al. 2017) that attends to the words so far and to the regions of the image.

E width (`decoder.embed_size`), A heads, N = B K captions, K of each image, L regions, S positions of any sequence.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from config import DecoderConfig
from models.decoder import Decoder, Memory, State, group_by_image
from models.dropout import Dropout


class TransformerDecoder(Decoder):
    """Pre-norm layers with a feed-forward network of size `decoder.hidden_size`; output weights are tied to embeddings.

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
                "make it a multiple of 2 x decoder.num_heads"
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
        rows, row = group_by_image(tokens, image_index, len(features))  # (B K, T), (N,)
        state = tuple(part.repeat_interleave(len(rows) // len(features), 0) for part in self.start(memory))
        hidden, _, alphas = self.read(rows, state, memory)
        return hidden[row], alphas[row]  # (N, T, E), (N, T, A, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        regions = self.dropout(self.project(features))  # (B, L, E)
        regions = regions + positions(0, regions)
        for layer in self.encoder:
            regions, _, _ = layer(regions)
        return self.key_value(regions).chunk(len(self.layers), dim=2)  # for each layer (B, L, 2 E)

    def start(self, memory: Memory) -> State:
        return tuple(part[:, :0] for part in memory)  # keys and values of no words: (B, 0, 2 E)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        hidden, state, alphas = self.read(token.unsqueeze(1), state, memory)
        return self.output(hidden[:, 0]), state, alphas[:, 0]  # (N, V), (N, t + 1, 2 E) each, (N, A, L)

    def read(self, tokens: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        """Read `tokens` (N, T), which follow the words in the state: whole captions, or one word.

        Returns hidden states (N, T, E), the new state, and alphas (N, T, A, L).
        """
        words = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)  # (N, T, E)
        hidden = self.dropout(words + positions(state[0].shape[1], words))
        new_state = []
        for layer, past, regions in zip(self.layers, state, memory, strict=True):
            hidden, past, alphas = layer(hidden, past, regions)
            new_state.append(past)
        return self.norm(hidden), tuple(new_state), alphas

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
        self.dropout = Dropout(config.dropout)

    def forward(
        self, hidden: torch.Tensor, past: torch.Tensor | None = None, regions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Apply one layer to `hidden` (N, S, E); returns it, `past` with these words added, and alphas (N, S, A, L).

        `past` are the keys and values of the words before these (N, t, 2 E), without which attention is not causal;
        `regions` are those of the image's regions (B, L, 2 E).
        """
        normed, alphas = self.self_norm(hidden), None
        keys_values = self.key_value(normed)  # (N, S, 2 E)
        if past is not None:
            keys_values = torch.cat([past, keys_values], dim=1)  # (N, t + S, 2 E)
        attended, _ = self.self_attention(normed, keys_values, causal=past is not None)
        hidden = hidden + self.dropout(attended)
        if regions is not None:
            attended, alphas = self.cross_attention(self.cross_norm(hidden), regions)
            hidden = hidden + self.dropout(attended)
        return hidden + self.dropout(self.feed_forward(self.feed_forward_norm(hidden))), keys_values, alphas


class Attention(nn.Module):
    """Scaled dot-product attention with several heads (equation 1 and section 3.2.2 of the paper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(
        self, hidden: torch.Tensor, keys_values: torch.Tensor, causal: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let `hidden` (N, S, E) attend to `keys_values` (B, L, 2 E), of which N / B rows share one.

        With `causal`, the last of the S positions sees all L, the one before it all but one, and so on.
        Returns (N, S, E) and the alphas (N, S, A, L), which PyTorch's fused kernel does not give.
        """
        queries = self.query(hidden).view(len(keys_values), -1, hidden.shape[2])  # (B, K S, E)
        parts = (queries, *keys_values.chunk(2, dim=2))
        query, keys, values = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = query @ keys.transpose(2, 3) * query.shape[3] ** -0.5  # (B, A, K S, L)
        if causal and scores.shape[2] > 1:
            future = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device)
            scores = scores.masked_fill(future.triu(1 + scores.shape[3] - scores.shape[2]), -math.inf)
        alphas = scores.softmax(3)
        attended = (alphas @ values).transpose(1, 2).reshape(hidden.shape)  # (N, S, E)
        return self.output(attended), alphas.transpose(1, 2).reshape(*hidden.shape[:2], self.heads, -1)


def positions(first: int, like: torch.Tensor) -> torch.Tensor:
    """Return the positional encoding (S, E) of positions `first`, `first` + 1 … (section 3.5 of the paper)."""
    length, width = like.shape[1:]
    position = torch.arange(first, first + length, device=like.device, dtype=torch.float32).unsqueeze(1)  # (S, 1)
    dimension = torch.arange(0, width, 2, device=like.device, dtype=torch.float32)  # (E / 2,)
    angle = position * torch.exp(
        -math.log(10000) / width * dimension
    )  # (S, E / 2), in fp32: bf16 rounds neighbouring positions to one value
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).to(like.dtype)
