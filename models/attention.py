"""Show, Attend and Tell (Xu et al. 2015): an LSTM that looks at the picture anew before each word."""

from typing import ClassVar

import torch
from torch import nn

from config import DecoderConfig, UserError
from models.decoder import Decoder, Memory, State, by_picture


class AttentionRNN(Decoder):
    """Soft attention over the cells of a grid (equation 13 of the paper) with a gate and a deep output (equation 7).

    Cells are scored by a scaled product with the query (Luong et al. 2015) rather than by the paper's small network:
    training then reads the cells once for all captions of a picture, and writes no L hidden vectors for each word.
    L cells, H hidden size, E embedding size, N = B K captions, K of each picture.
    """

    grid: ClassVar[bool] = True
    heads = 1

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise UserError(f"decoder.num_layers = {config.num_layers}, but the attention decoder has one; set it to 1")
        hidden, embed = config.hidden_size, config.embed_size
        self.dropout = nn.Dropout(config.dropout)
        self.cells = nn.Linear(feature_size, hidden)
        self.keys = nn.Linear(hidden, hidden)
        self.first_state = nn.Linear(hidden, 2 * hidden)
        self.embedding = nn.Embedding(vocab_size, embed)
        self.query = nn.Linear(hidden, 2 * hidden)  # what to look for, and the gate of what is seen
        self.word_gates = nn.Linear(embed, 4 * hidden)
        self.gates = nn.Linear(2 * hidden, 4 * hidden, bias=False)
        self.deep = nn.Linear(2 * hidden, embed)
        self.output = nn.Linear(embed, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Start with a forget bias of 1 (Jozefowicz et al. 2015)."""
        with torch.no_grad():
            self.word_gates.bias.view(4, -1)[1] += 1

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        rows, slot = by_picture(tokens, owner, len(features))  # (B K, T), (N,)
        words = self.embedding(rows)  # (B K, T, E)
        h, c = (part.repeat_interleave(len(rows) // len(features), 0) for part in self.start(memory))  # (B K, H)
        seen, maps = [], []
        for word_gates in self.word_gates(words).unbind(1):
            h, c, context, attention = self.look(word_gates, h, c, memory)
            seen.append(torch.cat([h, context], dim=1))
            maps.append(attention)
        logits = self.read_out(words[slot], torch.stack(seen, dim=1)[slot])  # (N, T, V)
        return logits, torch.stack(maps, dim=1)[slot]  # (N, T, 1, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        cells = self.dropout(self.cells(features).relu())  # (B, L, H)
        return cells, self.keys(cells) * cells.shape[2] ** -0.5, self.first_state(cells.mean(1))

    def start(self, memory: Memory) -> State:
        h, c = memory[2].tanh().chunk(2, dim=1)  # (B, H) each
        return h, c

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        h, c = state
        words = self.embedding(token)  # (N, E)
        h, c, context, attention = self.look(self.word_gates(words), h, c, memory)
        return self.read_out(words, torch.cat([h, context], dim=1)), (h, c), attention

    def look(
        self, word_gates: torch.Tensor, h: torch.Tensor, c: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look at the picture, then read a word: `word_gates` (N, 4 H), h and c (N, H).

        Returns h and c (N, H), what was seen (N, H) and where (N, 1, L).
        """
        cells, keys, _ = memory  # (B, L, H) each
        query, gate = self.query(h).chunk(2, dim=1)  # (N, H) each
        asked = query.view(len(cells), -1, cells.shape[2])  # (B, K, H)
        attention = (asked @ keys.transpose(1, 2)).softmax(2)  # (B, K, L)
        context = gate.sigmoid() * (attention @ cells).flatten(0, 1)  # (N, H)
        i, f, g, o = (word_gates + self.gates(torch.cat([context, h], dim=1))).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return h, c, context, attention.view(len(h), 1, -1)

    def read_out(self, words: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return the logits of the next word from the last one and what was seen: the deep output of equation 7."""
        return self.output(self.dropout(words + self.deep(seen)))
