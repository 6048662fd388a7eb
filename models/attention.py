"""Show, Attend and Tell (Xu et al. 2015): an LSTM that looks at the picture anew before each word."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from config import DecoderConfig, UserError
from models.decoder import Decoder, Dropout, Memory, State, by_picture


class AttentionRNN(Decoder):
    """Soft attention over the cells of a grid (equation 13 of the paper) with a gate and a deep output (equation 7).

    What the paper computes for each word is computed once for each picture where it can be. Cells are scored by the
    scaled product of their key with a query (Luong et al. 2015) rather than by a small network, and since attention and
    gate only weigh cells and add them up, each cell is mapped to what it says to LSTM and output before it is weighed.
    Unlike the paper's, the query knows the last word.
    L cells of size D, H hidden size, E embedding size, N = B K captions, K of each picture.
    """

    grid: ClassVar[bool] = True
    heads = 1

    def __init__(self, config: DecoderConfig, feature_size: int, vocab_size: int) -> None:
        super().__init__()
        if config.num_layers != 1:
            raise UserError(f"decoder.num_layers = {config.num_layers}, but the attention decoder has one; set it to 1")
        hidden, embed = config.hidden_size, config.embed_size
        self.dropout = Dropout(config.dropout)
        self.said = [hidden, 4 * hidden, embed]  # by a cell: its key, and what goes to the LSTM's gates and the output
        self.heard = [hidden, 4 * hidden]  # of word and state: the query, and what goes to the LSTM's gates
        self.narrow = nn.Linear(feature_size, hidden)
        self.cells = nn.Linear(hidden, sum(self.said))
        self.first_state = nn.Linear(hidden, 2 * hidden)
        self.embedding = nn.Embedding(vocab_size, embed)
        self.from_word = nn.Linear(embed, sum(self.heard))
        self.from_state = nn.Linear(hidden, sum(self.heard), bias=False)
        self.gate = nn.Linear(hidden, 1)
        self.deep = nn.Linear(hidden, embed)
        self.output = nn.Linear(embed, vocab_size)
        self.init_weights()

    def init_weights(self) -> None:
        """Start with a forget bias of 1 (Jozefowicz et al. 2015)."""
        with torch.no_grad():
            self.from_word.bias.split(self.heard)[1].view(4, -1)[1] += 1

    def hidden(
        self, features: torch.Tensor, tokens: torch.Tensor, owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        memory = self.prepare(features)
        rows, slot = by_picture(tokens, owner, len(features))  # (B K, T), (N,)
        h, c = (part.repeat_interleave(len(rows) // len(features), 0) for part in self.start(memory))  # (B K, H)
        words, place = rows.T.unique(return_inverse=True)  # (W,), (T, B K): each word is read once
        weight = self.from_state.weight
        read: list[torch.Tensor] = []
        heard = AddWithOneGradient.apply(F.embedding(place, self.from_word(self.embedding(words))), weight, read)
        weight = weight.detach().to(heard.dtype)  # once, which autocast would do for each word
        hiddens, gates, maps = [], [], []
        for word in heard.unbind():  # (B K, 5 H) each
            read.append(h.detach())
            h, c, gate, attention = self.look(word + F.linear(h, weight), h, c, memory)
            hiddens.append(h)
            gates.append(gate)
            maps.append(attention)
        hidden, gate = torch.stack(hiddens, dim=1), torch.stack(gates, dim=1)  # (B K, T, H), (B K, T, 1)
        attention = torch.stack(maps, dim=2)  # (B, K, T, L)
        seen = (attention.flatten(1, 2) @ memory[2]).view(*hidden.shape[:2], -1)  # (B K, T, E)
        states = self.read_out(self.embedding(rows), hidden, gate * seen)  # (B K, T, E)
        return states[slot], attention.flatten(0, 1)[slot].unsqueeze(2)  # (N, T, E), (N, T, 1, L)

    def prepare(self, features: torch.Tensor) -> Memory:
        cells = self.narrow(features)  # (B, L, H)
        keys, to_gates, to_output = self.cells(cells).split(self.said, dim=2)  # (B, L, H or 4 H or E)
        keys = (keys * keys.shape[2] ** -0.5).transpose(1, 2)  # (B, H, L)
        parts = (part.contiguous() for part in (keys, to_gates, to_output))  # read once per word: in one piece each
        return *parts, self.first_state(cells.mean(1))

    def start(self, memory: Memory) -> State:
        h, c = memory[3].float().tanh().chunk(2, dim=1)  # (B, H) each; c adds up, which bf16 does badly
        return h, c

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, torch.Tensor]:
        h, c = state
        words = self.embedding(token)  # (N, E)
        h, c, gate, attention = self.look(self.from_word(words) + self.from_state(h), h, c, memory)
        seen = gate * (attention @ memory[2]).flatten(0, 1)  # (N, E)
        return self.output(self.read_out(words, h, seen)), (h, c), attention.flatten(0, 1).unsqueeze(1)

    def look(
        self, heard: torch.Tensor, h: torch.Tensor, c: torch.Tensor, memory: Memory
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look at the picture, then read a word: `heard` (N, 5 H) of the word and the state, h and c (N, H).

        Returns h and c (N, H), how open the gate was (N, 1), and where it looked (B, K, L).
        """
        keys, to_gates, _, _ = memory  # (B, H, L), (B, L, 4 H)
        query, own = heard.split(self.heard, dim=1)
        attention = (query.unflatten(0, (len(keys), -1)) @ keys).softmax(2)  # (B, K, L)
        gate = self.gate(h).sigmoid()  # (N, 1)
        i, f, g, o = torch.addcmul(own, gate, (attention @ to_gates).flatten(0, 1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c, gate, attention

    def read_out(self, words: torch.Tensor, hidden: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Return what `output` reads (..., E), of the last word, the state and what was seen (equation 7)."""
        return self.dropout(words + self.deep(hidden) + seen)


class AddWithOneGradient(torch.autograd.Function):
    """Leaves `sums` as they are, and is the gradient of `weight` in sums[t] + read[t] @ weight.T, to be added by hand.

    Backpropagation through time would add up T small products, and read and write the whole gradient for each.
    """

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor, weight: torch.Tensor, read: list[torch.Tensor]) -> torch.Tensor:
        ctx.read = read
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, grad.flatten(0, 1).T @ torch.cat(ctx.read).to(grad.dtype), None
