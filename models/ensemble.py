"""Several trained models that write one caption together: at each word their probabilities are averaged."""

from cli import UserError

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from models.checkpoint import load_model
from models.decoder import Decoder, Memory, State
from models.model import CaptionModel


class Ensemble(Decoder):
    """A decoder made of those of `models`, which read the same features and know the same words.

    Memory and state are those of the members, one after the other. Attention is the mean of the members' maps where
    all have as many.
    """

    def __init__(self, models: Sequence[CaptionModel]) -> None:
        super().__init__()
        self.spatial = models[0].decoder.spatial  # type: ignore[misc]
        heads = {model.decoder.heads for model in models}
        self.heads = heads.pop() if len(heads) == 1 else 0
        self.models = nn.ModuleList(models)
        self.members = list(models)
        self.memory_sizes: list[int] = []  # tensors in each member's memory
        self.state_sizes: list[int] = []

    def prepare(self, features: torch.Tensor) -> Memory:
        """Return the members' memories of features that are not standardised yet."""
        memories = [member.decoder.prepare(member.standardise(features)) for member in self.members]
        self.memory_sizes = list(map(len, memories))
        return join(memories)

    def start(self, memory: Memory) -> State:
        memories = split(memory, self.memory_sizes)
        states = [member.decoder.start(part) for member, part in zip(self.members, memories, strict=True)]
        self.state_sizes = list(map(len, states))
        return join(states)

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        memories, states = split(memory, self.memory_sizes), split(state, self.state_sizes)
        log_probs, after, maps = [], [], []  # type: tuple[list, list, list]
        for member, own_state, own_memory in zip(self.members, states, memories, strict=True):
            logits, own_state, attention = member.decoder.step(token, own_state, own_memory)
            log_probs.append(logits.float().log_softmax(1))
            after.append(own_state)
            maps.append(attention)
        together = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))  # (N, V)
        return together, join(after), torch.stack(maps).mean(0) if self.heads else None


def join(parts: Sequence[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for part in parts for tensor in part)


def split(tensors: tuple[torch.Tensor, ...], sizes: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [tensors[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def load_ensemble(paths: Sequence[Path], overrides: list[str] | None = None) -> CaptionModel:
    """Return the model in the one file, or the ensemble of several, with the first one's encoder, words and search.

    Raises UserError for models that read other features than the first, or know other words.
    """
    first, *others = models = [load_model(path, overrides) for path in paths]
    if not others:
        return first
    for path, model in zip(paths[1:], others, strict=True):
        same = (features_of(model) == features_of(first), model.vocab.words == first.vocab.words)
        if not all(same):
            what = "knows other words" if same[0] else "reads other features"
            raise UserError(f"{path} {what} than {paths[0]}, so that they cannot write together; leave it out")
    if not all(model.config.encoder.frozen for model in models):
        raise UserError(f"a backbone of {paths[0]} or the others is fine-tuned; an ensemble needs one frozen backbone")
    ensemble = CaptionModel(first.config, first.vocab, first.transform, first.encoder, Ensemble(models))
    ensemble.consensus = first.consensus
    return ensemble.eval()


def refuse_homeless_ensemble(paths: Sequence[Path], out: str | None) -> None:
    """Raise UserError where the results of several models would land among those of the first."""
    if len(paths) > 1 and not out:
        raise UserError(f"{len(paths)} checkpoints write together, so the captions are no run's; add --out FOLDER")


def features_of(model: CaptionModel) -> tuple[object, ...]:
    return model.encoder.identity["sha256"], model.encoder.spatial, model.encoder.config.stride_in_1x1, model.transform
