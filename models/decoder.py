"""The decoder interface, which search and training are written against, and the classic decoder behind it.

A new decoder is one file with one class of this shape, and one line in DECODERS of model.py.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

from config import DecoderConfig

State = tuple[torch.Tensor, ...]
Memory = tuple[torch.Tensor, ...]

ROWS = 64  # words that are computed come in multiples of so many


class Decoder(nn.Module):
    """Writes captions for encoded pictures. B pictures, N captions or hypotheses, T steps, V words.

    `grid` says which features it reads: a vector per picture (B, D), or one per cell (B, L, D);
    they come standardised. `heads` is A, the number of attention maps for each word. `output` makes logits (..., V) of
    hidden states (..., H).
    """

    spatial: ClassVar[bool] = False
    heads: int = 0
    output: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do as `forward` does, up to the states (N, T, H) before `output`: padding needs no logits.

        What is returned where a caption is padding means nothing.
        """
        raise NotImplementedError

    def prepare(self, features: torch.Tensor) -> Memory:
        """Compute what depends on the pictures alone, one row each: never copied per beam."""
        raise NotImplementedError

    def start(self, memory: Memory) -> State:
        """Return the state before `<sos>`, one hypothesis per picture: tensors with the hypothesis first."""
        raise NotImplementedError

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        """Read one word per hypothesis, `token` (N,); the N / B hypotheses of a picture stand together.

        Returns logits (N, V) of the next word, the new state, and attention (N, A, L) or None.
        """
        raise NotImplementedError


def by_picture(tokens: torch.Tensor, image_index: torch.Tensor, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring the captions of a picture together, so that they can share what was computed of it.

    Args:
        tokens: (N, T) captions; image_index: the picture of each (N,).

    Returns captions (pictures K, T), where the K rows of a picture stand together and those it has no caption for are
    zeros, and the row of each caption (N,). K is the number of captions of the picture that has most.
    """
    counts = image_index.bincount(minlength=pictures)  # (B,)
    captions = int(counts.max())
    order = image_index.argsort(stable=True)  # (N,)
    rank = (
        torch.arange(len(image_index), device=image_index.device) - (counts.cumsum(0) - counts)[image_index[order]]
    )  # (N,)
    slot = torch.empty_like(image_index).scatter_(0, order, image_index[order] * captions + rank)
    return tokens.new_zeros(pictures * captions, tokens.shape[1]).index_copy_(0, slot, tokens), slot


def first_rows(real: torch.Tensor) -> torch.Tensor:
    """Return the places of what is `real` (N, T) in all that there is (N T,), in order, and of some that is not.

    There are a multiple of ROWS, or all: oneDNN makes a kernel for each number of rows that it has not met yet.
    """
    rows = -(-int(real.sum()) // ROWS) * ROWS
    return real.flatten().argsort(descending=True, stable=True)[:rows]


class Dropout(nn.Dropout):
    """Dropout whose mask is drawn eight places at a time on a CPU, where PyTorch draws each alone, five times as slow.

    The probability is `p` rounded to the next 256th.
    """

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not (self.training and self.p and values.is_cpu):
            return super().forward(values)
        fallen = min(255, round(256 * self.p))
        draws = torch.randint(-(2**63), 2**63 - 1, (-(-values.numel() // 8),)).view(torch.uint8)[: values.numel()]
        kept = draws.ge(fallen).view_as(values).to(values.dtype)
        return values * kept.mul_(256 / (256 - fallen))


class DecoderRNN(Decoder):
    """Show and Tell (Vinyals et al. 2015): an LSTM that reads the picture as its first word.

    The LSTM's inputs are `[picture, <sos>, w1 … wn]`; its answer to the picture is not scored, so that no free
    `<sos>` target flatters the loss.
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
        """Let the picture, which is read first and only once, be heard to the end of the sentence from the start.

        It enters with variance 1, as words do, and a forget bias of 1 (Jozefowicz et al. 2015) keeps it.
        """
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        nn.init.zeros_(self.project.bias)
        for name, bias in self.lstm.named_parameters():
            if name.startswith("bias_ih"):
                nn.init.ones_(bias.data[self.lstm.hidden_size : 2 * self.lstm.hidden_size])

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        picture = self.project(features)[image_index].unsqueeze(1)  # (N, 1, E)
        inputs = torch.cat([picture, self.embedding(tokens)], dim=1)  # (N, 1 + T, E)
        hidden, _ = self.lstm(inputs)  # (N, 1 + T, H)
        return self.dropout(hidden[:, 1:]), None  # (N, T, H)

    def prepare(self, features: torch.Tensor) -> Memory:
        return (self.project(features),)  # (B, E)

    def start(self, memory: Memory) -> State:
        _, (h, c) = self.lstm(memory[0].unsqueeze(1))  # (layers, B, H) each
        return h.transpose(0, 1), c.transpose(0, 1)

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        h, c = (part.transpose(0, 1).contiguous() for part in state)  # (layers, N, H)
        hidden, (h, c) = self.lstm(self.embedding(token).unsqueeze(1), (h, c))  # (N, 1, H)
        return self.output(hidden[:, 0]), (h.transpose(0, 1), c.transpose(0, 1)), None
