"""Consensus without anybody's captions: what `models.publish` makes of consensus.pth, small enough for a checkpoint.

Instead of remembered pictures with their captions it has a linear map from a picture's features to the weights of the
most frequent n-grams: reduced-rank ridge regression (Izenman 1975), fitted to the same pictures. It knows what people
say of pictures of a kind, but of no picture what was said of it.

D feature size, R rank, G n-grams, P training pictures, B pictures to caption.
"""

from functools import cached_property

import torch
from torch.nn import functional as F

from models.consensus import LAST_CODE, Consensus, Expectation, NGrams, pool

NGRAMS = 6000  # most that are kept; on Flickr8k's dev pictures all of them were worth 0.3 CIDEr-D more
RANK = 256
SHAPES = {  # of the tensors in a checkpoint
    "codes": ("G + 1",),
    "idf": ("G + 1",),
    "base": (),
    "centre": ("D",),
    "weights": ("G",),
    "scale": ("G",),
    "table": ("G", "R"),
    "projection": ("R", "D"),
    "length": ("1",),
    "per_unit": ("D",),
}
DTYPES = {"codes": torch.int64, "base": torch.int64, "table": torch.int8}  # of those that are not float32
RIDGE = 3e-5  # is added to the variances of the embeddings' numbers, whose sum is 1


class CompactConsensus(Expectation):
    """A linear map of rank R from pooled features to the weights of n-grams, and to the length of a caption.

    Args:
        state: its tensors, as they are in a checkpoint. Of a unit vector x (D,), pooled features less their `centre`
            (D,), the weights of n-grams are `weights` (G,) + `scale` (G,) * (`table` (G, R) @ `projection` (R, D) @ x),
            and the length is `length` (1,) + `per_unit` (D,) @ x. `codes`, `idf` and `base` are those of NGrams.
    """

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    @cached_property
    def ngrams(self) -> NGrams:
        return NGrams(self.state["codes"], self.state["idf"], int(self.state["base"]))

    @classmethod
    @torch.inference_mode()
    def fit(cls, consensus: Consensus) -> "CompactConsensus":
        """Return what can be given away of a consensus that remembers captions."""
        ngrams, kept = consensus.ngrams.most_frequent(NGRAMS)
        embeddings, images = consensus.embeddings, len(consensus.embeddings)
        mean = embeddings.mean(0)  # (D,)
        centred = embeddings - mean  # (P, D)
        weights = consensus.mean_weights @ torch.full((images, 1), 1 / images)  # (all n-grams, 1)
        lengths = consensus.mean_lengths

        # Ridge regression: the n-grams' weights are B x, with B = Y X^T (X X^T + ridge)^-1.
        variance = centred.T @ centred / images + RIDGE * torch.eye(len(mean))  # (D, D)
        covariance = (consensus.mean_weights @ centred)[kept] / images  # (G, D)
        regression = torch.linalg.solve(variance, covariance.T).T  # (G, D)
        per_unit = torch.linalg.solve(variance, centred.T @ lengths / images)  # (D,)

        # The best approximation of low rank is by the principal components of what is predicted.
        values, vectors = torch.linalg.eigh(variance)
        root = vectors * values.sqrt() @ vectors.T  # (D, D)
        predicted = regression @ root  # (G, D)
        components = torch.linalg.eigh(predicted.T @ predicted).eigenvectors[:, -RANK:]  # (D, R)
        table = predicted @ components  # (G, R)
        projection = torch.linalg.solve(root, components).T  # (R, D)
        scale = (table.abs().amax(1) / 127).clamp(min=1e-7)  # (G,): a byte for each number, from -127 to 127
        state = {
            "codes": ngrams.codes,
            "idf": ngrams.idf,
            "base": torch.tensor(ngrams.base),
            "centre": consensus.centre,
            "weights": weights[kept, 0] - scale * (((table / scale[:, None]).round()) @ (projection @ mean)),
            "scale": scale,
            "table": (table / scale[:, None]).round().to(torch.int8),
            "projection": projection,
            "length": (lengths.mean() - per_unit @ mean).view(1),
            "per_unit": per_unit,
        }
        return cls({name: value.clone() for name, value in state.items()})

    @classmethod
    def restore(cls, state: dict[str, torch.Tensor], feature_size: int, vocab_size: int) -> "CompactConsensus | None":
        """Return that of a checkpoint, for features of this size; None for a damaged one."""
        if state.keys() != SHAPES.keys() or not all(isinstance(value, torch.Tensor) for value in state.values()):
            return None
        sizes = {"D": feature_size, "G": state["weights"].numel(), "1": 1}
        sizes["R"] = state["projection"].numel() // feature_size
        sizes["G + 1"] = sizes["G"] + 1
        fits = (
            all(value.shape == tuple(sizes[size] for size in SHAPES[name]) for name, value in state.items())
            and all(value.dtype == DTYPES.get(name, torch.float32) for name, value in state.items())
            and all(bool(value.isfinite().all()) for value in state.values())
            and 0 < int(state["base"]) <= vocab_size + 1
            and bool((state["codes"].diff() > 0).all())
            and int(state["codes"][-1]) == LAST_CODE
        )
        return cls(state) if fits else None

    def expect(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state
        units = F.normalize(pool(features).cpu() - state["centre"])  # (B, D)
        products = state["table"].float() @ (state["projection"] @ units.T)  # (G, B)
        weights = state["weights"].unsqueeze(1) + state["scale"].unsqueeze(1) * products
        return weights, state["length"] + units @ state["per_unit"]
