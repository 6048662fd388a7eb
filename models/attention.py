"""Show, Attend and Tell (Xu et al. 2015): an LSTM that attends to the regions of the image before each word."""

from cli import UserError

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from config import DecoderConfig
from models.decoder import Decoder, Memory, State, group_by_image


class AttentionRNN(Decoder):
    """Soft attention over regions (equation 13 of the paper) with a gate (4.2.1) and a deep output (equation 7).

    Unlike the paper's, a region's score is the scaled product of its key with a query (Luong et al. 2015), not a small
    network, and the query depends on the last word, too. Attention and gate only weigh regions and add them up, so the
    linear maps from the context vector to the LSTM's gates and to the output are applied to the regions beforehand:
    once per image, not once per word.
    L regions of size D, H hidden size, E embedding size, N = B K captions, K of each image.
    """

    spatial = True
    heads = 1

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise UserError(f"decoder.num_layers = {config.num_layers}, but the attention decoder has one; set it to 1")
        hidden, embed = config.hidden_size, config.embed_size
        self.dropout = nn.Dropout(config.dropout)
        self.region_sizes = [hidden, 4 * hidden, embed]  # a region's key, its share of the gates and of the output
        self.input_sizes = [hidden, 4 * hidden]  # the query, and the word's and state's share of the gates
        self.project = nn.Linear(feature_size, hidden)
        self.from_cell = nn.Linear(hidden, sum(self.region_sizes))
        self.init_state = nn.Linear(hidden, 2 * hidden)
        self.embedding = nn.Embedding(vocab_size, embed)
        self.from_word = nn.Linear(embed, sum(self.input_sizes))
        self.from_state = nn.Linear(hidden, sum(self.input_sizes), bias=False)
        self.gate = nn.Linear(hidden, 1)
        self.from_hidden = nn.Linear(hidden, embed)
        self.output = nn.Linear(embed, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Start with a forget bias of 1 (Jozefowicz et al. 2015)."""
        with torch.no_grad():
            self.from_word.bias.split(self.input_sizes)[1].view(4, -1)[1] += 1

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        keys, to_gates, to_output, _ = memory
        rows, row = group_by_image(tokens, image_index, len(features))  # (B K, T), (N,)
        h, c = (part.repeat_interleave(len(rows) // len(features), 0) for part in self.start(memory))  # (B K, H)
        words, place = rows.T.unique(return_inverse=True)  # (W,), (T, B K): each word is read once
        inputs = F.embedding(place, self.from_word(self.embedding(words)))  # (T, B K, 5 H)
        read: list[torch.Tensor] = []  # the state that each word is read with (B K, H)
        looked: list[torch.Tensor] = []  # the alphas that it is read with, times the gate (B, K, L)
        inputs = OneGradient.apply(inputs, self.from_state.weight, to_gates, read, looked)
        weight = self.from_state.weight.detach().to(inputs.dtype)  # once, which autocast would do for each word
        hiddens, gates, alphas = [], [], []
        for word in inputs.unbind():  # (B K, 5 H) each
            read.append(h.detach())
            h, c, gate, alpha = self.attend(word + F.linear(h, weight), h, c, keys, to_gates.detach())
            looked.append((gate.view_as(alpha[:, :, :1]) * alpha).detach())
            hiddens.append(h)
            gates.append(gate)
            alphas.append(alpha)
        hidden, gate = torch.stack(hiddens, dim=1), torch.stack(gates, dim=1)  # (B K, T, H), (B K, T, 1)
        alpha = torch.stack(alphas, dim=2)  # (B, K, T, L)
        context = (alpha.flatten(1, 2) @ to_output).view(*hidden.shape[:2], -1)  # (B K, T, E)
        hidden = self.deep_output(self.embedding(rows), hidden, gate * context)  # (B K, T, E)
        return hidden[row], alpha.flatten(0, 1)[row].unsqueeze(2)  # (N, T, E), (N, T, 1, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        regions = self.project(features)  # (B, L, H)
        keys, to_gates, to_output = self.from_cell(regions).split(self.region_sizes, dim=2)  # (B, L, H or 4 H or E)
        keys = (keys * keys.shape[2] ** -0.5).transpose(1, 2)  # (B, H, L)
        parts = (part.contiguous() for part in (keys, to_gates, to_output))  # read once per word: in one piece each
        return *parts, self.init_state(regions.mean(1))  # (B, 2 H)

    def start(self, memory: Memory) -> State:
        h, c = memory[3].float().tanh().chunk(2, dim=1)  # (B, H) each, in fp32: bf16 is too coarse for sums over time
        return h, c

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        h, c = state
        keys, to_gates, to_output, _ = memory
        words = self.embedding(token)  # (N, E)
        h, c, gate, alpha = self.attend(self.from_word(words) + self.from_state(h), h, c, keys, to_gates)
        context = gate * (alpha @ to_output).flatten(0, 1)  # (N, E)
        return self.output(self.deep_output(words, h, context)), (h, c), alpha.flatten(0, 1).unsqueeze(1)

    def attend(
        self, inputs: torch.Tensor, h: torch.Tensor, c: torch.Tensor, keys: torch.Tensor, to_gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend to the regions, then read a word.

        Args:
            inputs: the word's and the state's share of query and gates (N, 5 H).
            h, c: the state before the word (N, H).
            keys: (B, H, L); to_gates: each region's share of the LSTM's gates (B, L, 4 H).

        Returns h and c (N, H), the gate on the context (N, 1), and the attention weights alpha (B, K, L).
        """
        query, lstm_gates = inputs.split(self.input_sizes, dim=1)
        alpha = (query.unflatten(0, (len(keys), -1)) @ keys).softmax(2)  # (B, K, L)
        gate = self.gate(h).sigmoid()  # (N, 1)
        i, f, g, o = torch.addcmul(lstm_gates, gate, (alpha @ to_gates).flatten(0, 1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, gate, alpha

    def deep_output(self, words: torch.Tensor, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return the input of `output` (..., E), from the last word, the LSTM's state and the context (equation 7)."""
        return self.dropout(words + self.from_hidden(hidden) + context)


class OneGradient(torch.autograd.Function):
    """Identity on `sums` (T, B K, 5 H), whose backward also gives the gradients of what is to be added to them.

    That is, for each word, read[t] @ weight.T, and looked[t] @ to_gates to the part of the LSTM. Backpropagation
    through time would add up T small products, and read and write the whole gradient for each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: torch.Tensor,
        weight: torch.Tensor,
        to_gates: torch.Tensor,
        read: list[torch.Tensor],
        looked: list[torch.Tensor],
    ) -> torch.Tensor:
        ctx.gates, ctx.read, ctx.looked = to_gates.shape[2], read, looked
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        to_weight = grad.flatten(0, 1).T @ torch.cat(ctx.read).to(grad.dtype)  # (5 H, H)
        looked = torch.cat(ctx.looked, dim=1).to(grad.dtype)  # (B, T K, L)
        to_lstm = grad[:, :, -ctx.gates :].unflatten(1, (len(looked), -1))  # (T, B, K, 4 H)
        to_regions = looked.transpose(1, 2) @ to_lstm.transpose(0, 1).flatten(1, 2)  # (B, L, 4 H)
        return grad, to_weight, to_regions, None, None
