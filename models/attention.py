"""Show, Attend and Tell (Xu et al. 2015): an LSTM that attends to the regions of the image before each word."""

import torch
from torch import nn

from cli import UserError
from config import DecoderConfig
from models.decoder import Decoder, Memory, State, group_by_image
from models.dropout import Dropout
from models.product_over_time import ProductOverTime


class AttentionRNN(Decoder):
    """Soft attention over regions (equation 13 of the paper) with a gate (4.2.1) and a deep output (equation 7).

    Unlike the paper's small network, the score is the scaled dot product of a region's key and a query (Luong et al.
    2015), which also depends on the previous word. The gated context is a weighted sum of regions, so its linear maps
    to the LSTM's gates and to the output are applied to the regions beforehand: once per image, not once per word.
    L regions of size D, H hidden size, E embedding size, N = B K captions, K of each image.
    """

    spatial = True
    heads = 1

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise UserError(f"decoder.num_layers = {config.num_layers}, but the attention decoder has one; set it to 1")
        hidden, embed = config.hidden_size, config.embed_size
        self.dropout = Dropout(config.dropout)
        self.region_sizes = [hidden, 4 * hidden, embed]  # a region's key, its share of the gates and of the output
        self.input_sizes = [hidden, 4 * hidden]  # the query, and the word's and state's share of the gates
        self.project = nn.Linear(feature_size, hidden)
        self.from_cell = nn.Linear(hidden, sum(self.region_sizes))  # reads a region, whatever its name in checkpoints
        self.init_state = nn.Linear(hidden, 2 * hidden)
        self.embedding = nn.Embedding(vocab_size, embed)
        self.from_word = nn.Linear(embed, sum(self.input_sizes))
        self.from_state = nn.Linear(hidden, sum(self.input_sizes), bias=False)
        self.gate = nn.Linear(hidden, 1)
        self.from_hidden = nn.Linear(hidden, embed)
        self.output = nn.Linear(embed, vocab_size)
        with torch.no_grad():  # a forget bias of 1 (Jozefowicz et al. 2015)
            self.from_word.bias.split(self.input_sizes)[1].view(4, -1)[1] += 1

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        keys, to_gates, to_output, _ = memory
        rows, row = group_by_image(tokens, image_index, len(features))  # (B K, T), (N,)
        words = self.embedding(rows)  # (B K, T, E)
        inputs = self.from_word(words)  # (B K, T, 5 H)
        h, c = (part.repeat_interleave(len(rows) // len(features), 0) for part in self.start(memory))  # (B K, H)
        from_state = ProductOverTime(self.from_state.weight.T.to(inputs.dtype))  # computes self.from_state(h)
        from_regions = ProductOverTime(to_gates)  # computes gated @ to_gates
        states, alphas, gated_alphas = [], [], []
        for word in inputs.unbind(1):  # (B K, 5 H) each
            query, gates = (word + from_state(h)).split(self.input_sizes, dim=1)  # (B K, H), (B K, 4 H)
            alpha, gated = self.attend(query, h, keys)  # (B, K, L) each
            h, c = lstm(gates + from_regions(gated).flatten(0, 1), c)  # (B K, H) each
            states.append(h)
            alphas.append(alpha)
            gated_alphas.append(gated)
        hidden, gated = torch.stack(states, dim=1), torch.stack(gated_alphas, dim=2)  # (B K, T, H), (B, K, T, L)
        context = (gated.flatten(1, 2) @ to_output).view_as(words)  # (B K, T, E)
        alpha = torch.stack(alphas, dim=2).flatten(0, 1)  # (B K, T, L)
        return self.deep_output(words, hidden, context)[row], alpha[row].unsqueeze(2)  # (N, T, E), (N, T, 1, L)

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
        query, gates = (self.from_word(words) + self.from_state(h)).split(self.input_sizes, dim=1)  # (N, H), (N, 4 H)
        alpha, gated = self.attend(query, h, keys)  # (B, K, L) each
        h, c = lstm(gates + (gated @ to_gates).flatten(0, 1), c)  # (N, H) each
        context = (gated @ to_output).flatten(0, 1)  # (N, E)
        return self.output(self.deep_output(words, h, context)), (h, c), alpha.flatten(0, 1).unsqueeze(1)

    def attend(self, query: torch.Tensor, h: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the attention weights alpha, of sum 1, and the gated weights beta * alpha (B, K, L), from the query
        (N, H), the LSTM's state before the word (N, H), and the regions' keys (B, H, L).
        """
        alpha = (query.unflatten(0, (len(keys), -1)) @ keys).softmax(2)  # (B, K, L)
        beta = self.gate(h).sigmoid().unflatten(0, (len(keys), -1))  # (B, K, 1)
        return alpha, beta * alpha

    def deep_output(self, words: torch.Tensor, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Return the input of `output` (..., E), from previous word, LSTM state and context (equation 7)."""
        return self.dropout(words + self.from_hidden(hidden) + context)


def lstm(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the next h and c (N, H) of an LSTM, from its gates' pre-activations (N, 4 H) and the previous c (N, H)."""
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c
