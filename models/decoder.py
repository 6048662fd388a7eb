"""The decoder interface, against which search and training are written, and the decoder of Show and Tell.

A new decoder is one file with one such class, and one entry in DECODERS of models/model.py.
"""

from collections.abc import Callable

import torch
from torch import nn

from config import DecoderConfig
from models.dropout import Dropout

State = tuple[torch.Tensor, ...]
Memory = tuple[torch.Tensor, ...]


class Decoder(nn.Module):
    """Captions encoded images. B images, N captions or hypotheses, T time steps, H hidden size, V words."""

    spatial: bool = False  # whether it reads one feature per region (B, L, D) or one per image (B, D), standardised
    heads: int = 0  # A, the number of attention maps per word; 0 without attention
    output: Callable[[torch.Tensor], torch.Tensor]  # from hidden states (..., H) to logits (..., V)

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher forcing: read whole captions at once, given as `<sos> w1 … wn` and padding (N, T).

        `image_index` (N,) is each caption's row in the features (B, D) or (B, L, D). Returns hidden states (N, T, H),
        whose `output` at t scores the word after tokens[:, t], and the attention weights alphas (N, T, A, L), or None.
        Values at padding are undefined.
        """
        raise NotImplementedError

    def prepare(self, features: torch.Tensor) -> Memory:
        """Compute what depends on the image alone: tensors of one row per image, never copied per hypothesis."""
        raise NotImplementedError

    def start(self, memory: Memory) -> State:
        """Return the initial state, before `<sos>`, of one hypothesis per image: the hypothesis is the first axis."""
        raise NotImplementedError

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        """Read one word per hypothesis, `token` (N,), where the N / B hypotheses of an image are side by side.

        Returns logits (N, V) of the next word, the new state, and alphas (N, A, L), or None.
        """
        raise NotImplementedError


def group_by_image(tokens: torch.Tensor, image_index: torch.Tensor, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Arrange captions (N, T) of B `images` in K rows per image, so that they can share what is computed from it.

    Returns the rows (B K, T), those of an image side by side, and the row of each caption (N,). K is the largest number
    of captions of an image; rows without a caption are zeros.
    """
    counts = image_index.bincount(minlength=images)  # (B,)
    per_image = int(counts.max())  # K
    order = image_index.argsort(stable=True)  # (N,)
    rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[image_index[order]]  # (N,)
    row = torch.empty_like(order).scatter_(0, order, image_index[order] * per_image + rank)  # (N,)
    return tokens.new_zeros(images * per_image, tokens.shape[1]).index_copy_(0, row, tokens), row


class DecoderRNN(Decoder):
    """Show and Tell (Vinyals et al. 2015): an LSTM that reads the image as its first word.

    The LSTM's inputs are `[image, <sos>, w1 … wn]`. Its output after the image is not scored: the target there would
    always be `<sos>`, which is trivial to predict and would understate the loss.
    """

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        self.project = nn.Linear(feature_size, config.embed_size)
        self.embedding = nn.Embedding(vocab_size, config.embed_size)
        inner_dropout = config.dropout if config.num_layers > 1 else 0.0
        self.lstm = nn.LSTM(
            config.embed_size, config.hidden_size, config.num_layers, batch_first=True, dropout=inner_dropout
        )
        self.dropout = Dropout(config.dropout)
        self.output = nn.Linear(config.hidden_size, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Let the LSTM remember the image, which it sees at the first step alone, to the end of the caption.

        It enters with variance 1, as words do, and a forget bias of 1 (Jozefowicz et al. 2015) keeps it in memory.
        """
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        nn.init.zeros_(self.project.bias)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.ones_(bias.data[self.lstm.hidden_size : 2 * self.lstm.hidden_size])

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        image = self.project(features)[image_index].unsqueeze(1)  # (N, 1, E)
        inputs = torch.cat([image, self.embedding(tokens)], dim=1)  # (N, 1 + T, E)
        hidden, _ = self.lstm(inputs)  # (N, 1 + T, H), from an initial state of zeros
        return self.dropout(hidden[:, 1:]), None  # (N, T, H)

    def prepare(self, features: torch.Tensor) -> Memory:
        return (self.project(features),)  # (B, E)

    def start(self, memory: Memory) -> State:
        _, (h, c) = self.lstm(memory[0].unsqueeze(1))  # (layers, B, H) each: zeros, then the image
        return h.transpose(0, 1), c.transpose(0, 1)  # (B, layers, H)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, None]:
        h, c = (part.transpose(0, 1).contiguous() for part in state)  # (layers, N, H)
        hidden, (h, c) = self.lstm(self.embedding(token).unsqueeze(1), (h, c))  # (N, 1, H)
        return self.output(hidden[:, 0]), (h.transpose(0, 1), c.transpose(0, 1)), None
