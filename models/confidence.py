"""How sure a caption is: the chance that it is right, calibrated on the val pictures by `calibrate.py`.

A caption counts as right where its CIDEr-D is at least RIGHT. Logistic regression (Platt 1999) estimates the chance of
that from what is at hand when a picture is captioned; a chance of less than UNSURE is shown as "unsure".

K kinds of things that the backbone's classifier knows, B pictures, N captions of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional as F

from data.vocab import UNK
from models.search import Hypothesis

RIGHT = 40.0  # CIDEr-D, of 1,000 at most
UNSURE = 0.5
LIKELY = 0.2  # probability from which a kind of thing is named beside an unsure caption
MOST_NAMED = 2
INPUTS = (
    "log_prob",  # of the caption, per word
    "named",  # the probability, by the backbone's classifier, of the kinds of things that the caption names
    "missed",  # that of the likeliest kind which it does not name
    "cider",  # what consensus expects
)
RIDGE = 1e-3


@dataclass(frozen=True)
class Confidence:
    """A weight for each of INPUTS, and a bias: plain numbers, as they are in a checkpoint."""

    weights: tuple[float, ...]
    bias: float

    @classmethod
    def fit(cls, inputs: torch.Tensor, right: torch.Tensor) -> "Confidence":
        """Fit to the inputs (N, 4) of captions that are `right`, or not (N,)."""
        varies = inputs.std(0) > 1e-6  # (4,): an input that is always missing, or the same, gets no weight
        inputs = inputs.where(varies, 0)
        mean, scale = inputs.mean(0), inputs.std(0).where(varies, 1)
        units = (inputs - mean) / scale  # (N, 4)
        parameters = torch.zeros(inputs.shape[1] + 1, requires_grad=True)
        optimiser = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            logits = units @ parameters[:-1] + parameters[-1]  # (N,)
            total = F.binary_cross_entropy_with_logits(logits, right.float())
            total = total + RIDGE * parameters[:-1].square().sum()
            total.backward()
            return total

        optimiser.step(loss)
        weights = parameters.detach()[:-1] / scale * varies
        return cls(tuple(weights.tolist()), float(parameters.detach()[-1] - weights @ mean))

    def chances(self, inputs: torch.Tensor) -> list[float | None]:
        """Return the chance of each caption to be right, from its inputs (N, 4); None where one is missing (NaN)."""
        weights = torch.tensor(self.weights)
        used = torch.where(weights == 0, 0.0, inputs * weights)  # a missing one that has no weight does not matter
        return [None if chance != chance else chance for chance in (used.sum(1) + self.bias).sigmoid().tolist()]

    def state(self) -> dict:
        return asdict(self) | {"weights": list(self.weights)}


def evidence(
    found: Sequence[Sequence[Hypothesis]], max_length: int, kinds: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    """Return INPUTS of each hypothesis (N, 4); NaN for what consensus expects, where there is none.

    Args:
        kinds: the probability of each kind of thing (B, K); `words`: the vocabulary's id of its word (K,).
    """
    rows = []
    for probs, hypotheses in zip(kinds, found, strict=True):
        for each in hypotheses:
            named = names(each, words)  # (K,)
            missed = float(probs[~named].max()) if len(probs) else 0.0
            per_word = each.log_prob / min(len(each.ids) + 1, max_length)
            cider = float("nan") if each.cider is None else each.cider
            rows.append([per_word, float(probs[named].sum()), missed, cider])
    return torch.tensor(rows)


def names(hypothesis: Hypothesis, words: torch.Tensor) -> torch.Tensor:
    """Return which kinds of things a caption names (K,), given their words' ids (K,)."""
    return torch.isin(words, torch.tensor([i for i in hypothesis.ids if i != UNK], dtype=words.dtype))
