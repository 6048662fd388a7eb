"""Search: only real words, an end always, and every picture on its own."""

import pytest
import torch

from config import load_config
from data.vocab import EOS, PAD, SOS, UNK
from models.decoder import DECODERS, Decoder, Memory, State
from models.search import greedy

V = 12


class Script(Decoder):
    """Gives each picture the same logits at every step: its features."""

    def prepare(self, features: torch.Tensor) -> Memory:
        return (features,)

    def start(self, memory: Memory) -> State:
        return (torch.zeros(len(memory[0]), 1),)

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, None]:
        return memory[0].clone(), (state[0] + 1,), None


class EndAfter(Script):
    """Writes word 5, and `<eos>` at the step that each picture's features name."""

    def step(self, token: torch.Tensor, state: State, memory: Memory) -> tuple[torch.Tensor, State, None]:
        logits = torch.zeros(len(token), V)
        logits[:, 5] = 1
        logits[:, EOS] = 2.0 * (state[0] == memory[0])[:, 0]
        return logits, (state[0] + 1,), None


def prefers(*words: int) -> torch.Tensor:
    """Return logits in which the first word is the most probable, then the second, and so on."""
    logits = torch.zeros(1, V)
    logits[0, list(words)] = torch.arange(len(words), 0, -1.0)
    return logits


@pytest.mark.parametrize("order", [(PAD, SOS, UNK, 7), (UNK, PAD, 7, SOS), (SOS, 7, EOS)])
def test_special_words_are_never_written_however_probable(order: tuple[int, ...]) -> None:
    assert greedy(Script(), prefers(*order), max_length=3).tolist() == [[7, 7, 7]]


def test_a_caption_that_never_ends_stops_at_the_longest_length() -> None:
    assert greedy(Script(), prefers(7), max_length=25).shape == (1, 25)


def test_a_caption_may_end_at_once() -> None:
    assert greedy(Script(), prefers(UNK, EOS, 7), max_length=5).tolist() == [[EOS]]


def test_behind_its_end_a_row_holds_nothing_but_eos() -> None:
    ends = torch.tensor([[0], [3], [1]])
    assert greedy(EndAfter(), ends, max_length=9).tolist() == [
        [EOS, EOS, EOS, EOS],
        [5, 5, 5, EOS],
        [5, EOS, EOS, EOS],
    ]


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_words_are_integers_that_can_be_written(name: str) -> None:
    ids = greedy(random_decoder(name), random_features(name), max_length=8)
    assert ids.dtype == torch.int64
    assert not torch.isin(ids, torch.tensor([PAD, SOS, UNK])).any()
    assert ids.max() < V


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_a_batch_is_captioned_as_one_by_one(name: str) -> None:
    decoder, features = random_decoder(name), random_features(name)
    together = greedy(decoder, features, max_length=8).tolist()
    for row, alone in zip(together, features.split(1), strict=True):
        ids = greedy(decoder, alone, max_length=8)[0].tolist()
        assert row == ids + [EOS] * (len(row) - len(ids))
    assert len(set(map(tuple, together))) > 1


def random_decoder(name: str) -> Decoder:
    torch.manual_seed(0)
    decoder = DECODERS[name](load_config(overrides=[f"decoder.name={name}"]).decoder, 16, V).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(5)  # so that captions differ
    return decoder


def random_features(name: str) -> torch.Tensor:
    shape = (7, 4, 16) if DECODERS[name].grid else (7, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
