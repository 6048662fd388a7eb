"""An ensemble: several trained models write one caption together, from the mean of their probabilities of each word."""

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from cli import UserError
from models.checkpoint import load_model
from models.decoder import Decoder, Memory, State
from models.hub import is_on_hub
from models.model import CaptionModel


class Ensemble(Decoder):
    """A decoder made of those of `models`, which read the same features and have the same vocabulary.

    Memory and state are those of the members, one after the other. The alphas are the mean of the members' alphas,
    where all have the same number of heads.
    """

    def __init__(self, models: Sequence[CaptionModel]) -> None:
        super().__init__()
        self.spatial = models[0].decoder.spatial
        heads = {model.decoder.heads for model in models}
        self.heads = heads.pop() if len(heads) == 1 else 0
        self.models = nn.ModuleList(models)
        self.members = list(models)
        self.memory_sizes: list[int] = []  # how many tensors each member's memory has
        self.state_sizes: list[int] = []  # and its state

    def prepare(self, features: torch.Tensor) -> Memory:
        """Return the members' memories. Each standardises the features by itself: these must be raw."""
        memories = [member.decoder.prepare(member.standardise(features)) for member in self.members]
        self.memory_sizes = list(map(len, memories))
        return tuple(itertools.chain(*memories))

    def start(self, memory: Memory) -> State:
        memories = split(memory, self.memory_sizes)
        states = [member.decoder.start(part) for member, part in zip(self.members, memories, strict=True)]
        self.state_sizes = list(map(len, states))
        return tuple(itertools.chain(*states))

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        memories, states = split(memory, self.memory_sizes), split(state, self.state_sizes)
        log_probs, new_states, alphas = [], [], []  # type: tuple[list, list, list]
        for member, own_state, own_memory in zip(self.members, states, memories, strict=True):
            logits, own_state, own_alphas = member.decoder.step(token, own_state, own_memory)
            log_probs.append(logits.float().log_softmax(1))
            new_states.append(own_state)
            alphas.append(own_alphas)
        mean = torch.stack(log_probs).logsumexp(0) - math.log(len(log_probs))  # (N, V): log of the mean probability
        return mean, tuple(itertools.chain(*new_states)), torch.stack(alphas).mean(0) if self.heads else None


def split(tensors: tuple[torch.Tensor, ...], sizes: Iterable[int]) -> list[tuple[torch.Tensor, ...]]:
    left = iter(tensors)
    return [tuple(itertools.islice(left, size)) for size in sizes]


def load_ensemble(paths: Sequence[str | Path], overrides: list[str] | None = None) -> CaptionModel:
    """Return the model in the file, or the ensemble of several, with the encoder, vocabulary and search of the first.

    Raises UserError for models that read other features than the first, or have another vocabulary.
    """
    first, *others = models = [load_model(path, overrides) for path in paths]
    if not others:
        return first
    for path, model in zip(paths[1:], others, strict=True):
        same_features, same_words = features_of(model) == features_of(first), model.vocab.words == first.vocab.words
        if not (same_features and same_words):
            what = "has another vocabulary" if same_features else "reads other features"
            raise UserError(f"{path} {what} than {paths[0]}, so they cannot write a caption together; leave it out")
    if not all(model.config.encoder.frozen for model in models):
        raise UserError(f"a backbone of {paths[0]} or the others is fine-tuned; an ensemble needs one frozen backbone")
    ensemble = CaptionModel(first.config, first.vocab, first.transform, first.encoder, Ensemble(models))
    ensemble.consensus = first.consensus
    return ensemble.eval()


def refuse_homeless(paths: Sequence[str | Path], out: str | None) -> None:
    """Raise UserError where the captions of an ensemble would be written among those of the first model's run, or
    those of a model from the Hub, which has no run, into its cache.
    """
    if is_on_hub(paths[0]) and not out:
        raise UserError(f"what is made of {paths[0]} belongs to no run; add --out FOLDER")
    if len(paths) > 1 and not out:
        raise UserError(f"the captions of {len(paths)} checkpoints together belong to no run; add --out FOLDER")


def features_of(model: CaptionModel) -> tuple[object, ...]:
    return model.encoder.identity["sha256"], model.decoder.spatial, model.encoder.config.stride_in_1x1, model.transform
