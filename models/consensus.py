"""Consensus re-ranking: of the captions a beam finds, the one most like what people say of similar pictures.

Devlin et al. 2015 (arXiv:1505.04467) and Mao et al. 2015 (arXiv:1412.6632, appendix) take the candidate closest to the
captions of the nearest training pictures. Here all training pictures count, by kernel ridge regression: from a
picture's features it predicts the weights of the n-grams that CIDEr-D compares, and their product with a candidate's
own weights is about the CIDEr-D that this candidate can expect.

A plug-in: training writes consensus.pth beside checkpoints.pth (`fit`, `save`), `models.checkpoint` loads it, and
`CaptionModel.generate` ranks by it. P remembered pictures, C captions of them, B pictures to caption, G n-grams.
"""

from cli import UserError

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data.dataset import Flickr8kDataset, pad
from data.vocab import PAD
from models.search import Hypothesis
from utils import load_checkpoint, save_checkpoint

FILE = "consensus.pth"
MAX_IMAGES = 8000  # remembered pictures: the regression solves as many equations
MAX_WORDS = 50  # of a remembered caption: one very long caption would make all others take its room
MIN_IMAGES = 2  # that an n-gram must occur with: what people say of one picture alone says nothing of others
MAX_NGRAM = 4  # words in an n-gram
SIGMA = 6.0  # standard deviation, in words, of CIDEr-D's penalty for another length
CHUNK = 500  # pictures whose features are in memory together
# Sharpness and ridge of the regression that ranks captions, chosen on Flickr8k's dev pictures, and of the one whose
# expectation is a reward in training: about the least error on train, each picture left out.
RANKING, REWARD = (2.0, 0.1), (4.0, 0.3)


def missing(weight: float) -> UserError:
    """Return the error of a search that is to rank by consensus where there is none."""
    return UserError(
        f"search.consensus = {weight:g} compares captions with those of training pictures, and there is no {FILE} "
        "beside this checkpoint; set it to 0, or write that file, where its run and data are: python train.py --resume "
        f"--run NAME search.consensus={weight:g}"
    )


class Consensus:
    """Remembered pictures with their captions, and the CIDEr-D that these let one expect for other pictures.

    Args:
        embeddings: pooled features less their mean `centre` (D,), as unit vectors (P, D).
        captions: word ids (C, T), `<pad>` at their ends; image_index: whose they are (C,).
    """

    def __init__(
        self, embeddings: torch.Tensor, centre: torch.Tensor, captions: torch.Tensor, image_index: torch.Tensor
    ) -> None:
        self.embeddings, self.centre, self.captions, self.image_index = embeddings, centre, captions, image_index
        self.ranking, self.reward = KernelRegression(embeddings, *RANKING), KernelRegression(embeddings, *REWARD)

    @classmethod
    def fit(
        cls, encode: Callable[[Sequence[str]], torch.Tensor], dataset: Flickr8kDataset, images: Sequence[str]
    ) -> "Consensus":
        """Remember these of the dataset's pictures, with their captions.

        Args:
            encode: returns the raw features of some pictures (b, D) or (b, L, D); it is asked for a few at a time.
        """
        parts = [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]
        pooled = torch.cat([pool(encode(part)) for part in parts]).cpu()  # (P, D)
        centre = pooled.mean(0)
        row_of = {image: row for row, image in enumerate(images)}
        captions, image_index = list[np.ndarray](), list[int]()
        for number, image in enumerate(dataset.image_of.tolist()):
            ids = dataset.tokens[number]
            if len(ids) and dataset.images[image] in row_of:
                captions.append(ids[:MAX_WORDS])
                image_index.append(row_of[dataset.images[image]])
        return cls(F.normalize(pooled - centre), centre, pad(captions), torch.tensor(image_index))

    def save(self, path: Path) -> None:
        """Write what cannot be computed again."""
        real = self.captions != PAD  # (C, T)
        state = {
            "embeddings": self.embeddings.half(),
            "centre": self.centre,
            "words": self.captions[real].int(),
            "lengths": real.sum(1).int(),
            "image_index": self.image_index.int(),
        }
        save_checkpoint(path, state)

    @classmethod
    def load(cls, path: Path, feature_size: int, vocab_size: int) -> "Consensus":
        """Return what `save` wrote, for features of this size; raises UserError for what does not fit together."""
        try:
            saved: dict[str, Any] = load_checkpoint(path)
            embeddings, centre = saved["embeddings"].float(), saved["centre"].float()
            ids, lengths, image_index = (saved[name].long() for name in ("words", "lengths", "image_index"))
            fits = (
                embeddings.ndim == 2
                and embeddings.shape[1:] == centre.shape == (feature_size,)
                and 0 < len(embeddings) <= MAX_IMAGES
                and bool(embeddings.isfinite().all() and centre.isfinite().all())
                and ids.ndim == lengths.ndim == image_index.ndim == 1
                and len(lengths) == len(image_index) > 0
                and 0 < int(lengths.min()) <= int(lengths.max()) <= MAX_WORDS
                and int(lengths.sum()) == len(ids)
                and bool(((ids >= 0) & (ids < vocab_size)).all())
                and bool(((image_index >= 0) & (image_index < len(embeddings))).all())
            )
        except (KeyError, AttributeError, TypeError, RuntimeError):
            fits = False
        if not fits:
            raise UserError(
                f"{path} is damaged, or belongs to another checkpoint; make it anew with: python train.py --resume "
                f"--run {path.resolve().parent.name}, or search without it: search.consensus=0"
            )
        captions = pad(np.split(ids.numpy(), lengths.cumsum(0)[:-1]))
        return cls(F.normalize(embeddings), centre, captions, image_index)

    def rank(
        self, features: torch.Tensor, found: Sequence[Sequence[Hypothesis]], weight: float
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses of each picture, the best first by their score plus `weight` times what is expected.

        Args:
            features: raw ones, (B, D) or (B, L, D), on any device.
            weight: of an expected CIDEr-D of 1 (of 10; papers call it 100).
        """
        tokens = pad([each.ids or [PAD] for hypotheses in found for each in hypotheses])  # (N, T)
        image_index = torch.arange(len(found)).repeat_interleave(torch.tensor(list(map(len, found))))  # (N,)
        weights = self.ranking.weights(self.embed(features))  # (B, P)
        expected = iter((weight * self.expected_cider(weights, tokens, image_index)).tolist())
        scored = [[replace(each, score=each.score + next(expected)) for each in hypotheses] for hypotheses in found]
        return [sorted(each, key=lambda one: -one.score) for each in scored]

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Return raw features (B, D) or (B, L, D) as unit vectors (B, D), to be compared with the remembered ones."""
        return F.normalize(pool(features).cpu() - self.centre)

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # it has no sparse products
    def expected_cider(self, weights: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor) -> torch.Tensor:
        """Return about the CIDEr-D (N,), from 0 to 10, that captions (N, T) of the pictures `image_index` can expect.

        It is that of Vedantam et al. (2015), with the document frequencies of the remembered captions, except that
        n-grams which a caption repeats are not clipped, and that lengths are compared with the expected mean.

        Args:
            weights: of each remembered picture for each of B pictures (B, P), from a KernelRegression.
        """
        ngrams = self.mean_weights @ weights.T  # (G, B)
        lengths = weights @ self.mean_lengths  # (B,)
        row, ngram, weight = self.ngrams.tf_idf(tokens)  # (entries,) each
        product = torch.zeros(len(tokens)).index_add(0, row, weight * ngrams[ngram, image_index[row]])  # (N,)
        difference = (tokens != PAD).sum(1) - lengths[image_index]  # (N,) words
        return 10 / MAX_NGRAM * product * torch.exp(-(difference**2) / (2 * SIGMA**2))

    @cached_property
    def ngrams(self) -> "NGrams":
        return NGrams(self.captions, self.image_index)

    @cached_property
    def mean_weights(self) -> torch.Tensor:
        """The mean n-gram weights of each picture's captions, sparse (G, P)."""
        row, ngram, weight = self.ngrams.tf_idf(self.captions)
        image = self.image_index[row]
        each = weight / torch.bincount(self.image_index, minlength=len(self.embeddings))[image]
        places, size = torch.stack([ngram, image]), (self.ngrams.count, len(self.embeddings))
        with warnings.catch_warnings(action="ignore"):  # that CSR, three times as fast here, is in beta
            return torch.sparse_coo_tensor(places, each, size, check_invariants=True).to_sparse_csr()

    @cached_property
    def mean_lengths(self) -> torch.Tensor:
        """The mean length of each picture's captions (P,), in words; of a picture without captions, that of all."""
        words = (self.captions != PAD).sum(1).float()  # (C,)
        total = torch.zeros(len(self.embeddings)).index_add(0, self.image_index, words)  # (P,)
        captions = torch.bincount(self.image_index, minlength=len(self.embeddings))  # (P,)
        return torch.where(captions > 0, total / captions, words.mean())


class KernelRegression:
    """Kernel ridge regression with a Gaussian kernel (Saunders et al. 1998) from P remembered pictures to others.

    Args:
        embeddings: unit vectors (P, D).
        sharpness: of the kernel exp(sharpness (cosine - 1)); ridge: what is added to the equations' diagonal.
    """

    def __init__(self, embeddings: torch.Tensor, sharpness: float, ridge: float) -> None:
        self.embeddings, self.sharpness, self.ridge = embeddings, sharpness, ridge

    @torch.autocast("cpu", enabled=False)  # in bfloat16 no picture would be left out exactly
    def weights(self, embeddings: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of each remembered picture for B others (B, P); they sum to 1, and some may be negative.

        The weighted sum of anything known of the remembered pictures is its prediction: kernel ridge regression on the
        difference from the mean.

        Args:
            embeddings: unit vectors (B, D).
            own: the row (B,) of those that are remembered themselves, else -1. Their own row gets weight 0, as if it
                had never been seen: leave-one-out, exactly.
        """
        similar = self.kernel(self.embeddings @ embeddings.T)  # (P, B)
        solved = torch.cholesky_solve(similar, self.factor).T if own is None else self.leave_out(similar, own)
        shares = torch.ones_like(solved)
        if own is not None:
            shares[own >= 0, own[own >= 0]] = 0
        rest = 1 - solved.sum(1, keepdim=True)  # (B, 1): the weight of the mean, to which the others contribute alike
        return solved + rest * shares / shares.sum(1, keepdim=True).clamp(min=1)

    def leave_out(self, similar: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return the solutions (B, P) for kernels `similar` (P, B), each without the row and column `own` (B,)."""
        weights = (self.inverse @ similar).T  # (B, P)
        known = (own >= 0).nonzero().squeeze(1)  # (b,)
        row = own[known]  # (b,)
        share = weights[known, row] / self.inverse.diagonal()[row]  # (b,)
        weights[known] -= share.unsqueeze(1) * self.inverse[row]  # its column, since the matrix is symmetric
        weights[known, row] = 0  # and not a rounding error
        return weights

    def kernel(self, cosines: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.sharpness * (cosines - 1))

    @cached_property
    def factor(self) -> torch.Tensor:
        return self.factorise()

    @cached_property
    def inverse(self) -> torch.Tensor:
        """The inverse of the equations' matrix (P, P): three times the work, which pays where many are left out."""
        return torch.cholesky_inverse(self.factorise())

    def factorise(self) -> torch.Tensor:
        """Return the Cholesky factor of the equations (P, P): a quarter of a gigabyte for 8,000 pictures."""
        count = len(self.embeddings)
        matrix = torch.empty(count, count)  # of which Cholesky's algorithm reads the lower half
        for first in range(0, count, CHUNK):
            last = min(count, first + CHUNK)
            matrix[first:last, :last] = self.kernel(self.embeddings[first:last] @ self.embeddings[:last].T)
        matrix.diagonal().add_(self.ridge)
        return torch.linalg.cholesky(matrix, out=matrix)


class NGrams:
    """The n-grams of 1 to 4 words in captions of at least MIN_IMAGES pictures, and their CIDEr-D weights.

    An n-gram is numbered by the number of the n-gram before its last word, and this word.

    Args:
        captions: word ids (C, T), `<pad>` at their ends; image_index: whose they are (C,).

    Attributes:
        count: how many n-grams there are.
    """

    def __init__(self, captions: torch.Tensor, image_index: torch.Tensor) -> None:
        self.vocabulary, images = int(captions.max()) + 1, int(image_index.max()) + 1
        self.known: list[torch.Tensor] = []  # for each n, sorted
        frequencies = []
        before = torch.zeros_like(captions)  # (C, T)
        for _ in range(MAX_NGRAM):
            codes = self.code(before, captions)  # (C, T)
            pairs = (codes * images + image_index.unsqueeze(1))[codes >= 0].unique()
            ngrams, seen = (pairs // images).unique_consecutive(return_counts=True)
            self.known.append(ngrams[seen >= MIN_IMAGES])
            frequencies.append(seen[seen >= MIN_IMAGES])
            before = shift(find(codes, self.known[-1]))
        self.count = sum(map(len, self.known))
        unknown = torch.ones(1)  # CIDEr-D counts them as seen once
        self.idf = torch.log(images / torch.cat([*frequencies, unknown]))  # (G + 1,)

    def code(self, before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return a code (C, T) for the n-gram that ends with each word, given the number of the n-gram before it.

        It is -1 where there is no word, or an unknown one, or where no known n-gram precedes it.
        """
        nothing = (before < 0) | (tokens == PAD) | (tokens >= self.vocabulary)
        return (before * self.vocabulary + tokens).masked_fill(nothing, -1)

    def tf_idf(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, number and weight of each known n-gram in captions (C, T); for each row and n their norm is 1."""
        row, n, number = self.look_up(tokens)
        every = self.count + tokens.shape[1] * MAX_NGRAM
        keys, times = ((row * MAX_NGRAM + n) * every + number).unique(return_counts=True)
        number, group = keys % every, keys // every
        weight = times * self.idf[number.clamp(max=self.count)]
        norm = torch.zeros(len(tokens) * MAX_NGRAM).index_add(0, group, weight**2).sqrt().clamp(min=1e-12)
        known = number < self.count
        return group[known] // MAX_NGRAM, number[known], (weight / norm[group])[known]

    def look_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, n - 1 and number of each n-gram; unknown ones are numbered from `count` on, by their place."""
        numbers, before, first = list[torch.Tensor](), torch.zeros_like(tokens), 0
        for known in self.known:
            found = find(self.code(before, tokens), known)  # (C, T)
            numbers.append(torch.where(found < 0, -1, first + found))
            before, first = shift(found), first + len(known)
        together = torch.stack(numbers, dim=1)  # (C, 4, T)
        place = torch.arange(tokens.shape[1])  # (T,)
        real = (tokens != PAD).unsqueeze(1) & (place >= torch.arange(MAX_NGRAM).unsqueeze(1))  # (C, 4, T)
        row, n, end = real.nonzero(as_tuple=True)
        own = self.count + end * MAX_NGRAM + n
        number = together[real]
        return row, n, torch.where(number < 0, own, number)


def find(codes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return where codes stand among the sorted `known` ones, -1 where they do not."""
    if not len(known):
        return torch.full_like(codes, -1)
    place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    return torch.where(known[place] == codes, place, -1)


def shift(numbers: torch.Tensor) -> torch.Tensor:
    """Move the number of what ends with each word (C, T) to the next word; nothing precedes the first."""
    return F.pad(numbers[:, :-1], (1, 0), value=-1)


def pool(features: torch.Tensor) -> torch.Tensor:
    """Return the mean over the regions of features (B, D) or (B, L, D)."""
    return features.float() if features.ndim == 2 else features.float().mean(1)
