"""Consensus re-ranking: of the captions a beam finds, the one most like what people say of similar pictures.

Devlin et al. 2015 (arXiv:1505.04467) and Mao et al. 2015 (arXiv:1412.6632, appendix) take the candidate closest to the
captions of the nearest training pictures. Here all training pictures count, by kernel ridge regression: from a
picture's features it predicts the weights of the n-grams that CIDEr-D compares, and their product with a candidate's
own weights is about the CIDEr-D that this candidate can expect.

A plug-in: training writes consensus.pth beside checkpoints.pth (`fit`, `save`), `models.checkpoint` loads it, and
`CaptionModel.generate` ranks by it. P remembered pictures, C captions of them, B pictures to caption, G n-grams.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cli import UserError
from data.dataset import Flickr8kDataset, pad
from data.vocab import PAD
from models.search import Hypothesis
from utils import load_checkpoint, save_checkpoint

FILE = "consensus.pth"
MAX_IMAGES = 8000  # remembered pictures: the regression solves as many equations
MAX_CELLS = 1 << 26  # of captions that are filled up to the longest
MAX_WORDS = 50  # of a remembered caption: one very long caption would make all others take its room
MIN_IMAGES = 2  # that an n-gram must occur with: what people say of one picture alone says nothing of others
MAX_NGRAM = 4  # words in an n-gram
LAST_CODE = 2**63 - 1  # one that no n-gram has
SIGMA = 6.0  # standard deviation, in words, of CIDEr-D's penalty for another length
CHUNK = 500  # pictures whose features are in memory together
# Sharpness and ridge of the regression that ranks captions, chosen on Flickr8k's dev pictures, and of the one whose
# expectation is a reward in training: about the least error on train, each picture left out.
RANKING, REWARD = (2.0, 0.1), (4.0, 0.3)


def missing_error(weight: float) -> UserError:
    """Return the error of a search that is to rank by consensus where there is none."""
    return UserError(
        f"search.consensus = {weight:g} compares captions with those of training pictures, and there is no {FILE} "
        "beside this checkpoint; set it to 0, or write that file, where its run and data are: python train.py --resume "
        f"--run NAME search.consensus={weight:g}"
    )


class Expectation(ABC):
    """What people would say of a picture: the expected weights of the n-grams in their captions, and their length."""

    @property
    @abstractmethod
    def ngrams(self) -> "NGrams":
        """Those whose weights are expected."""

    @abstractmethod
    def expect(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the expected weights of n-grams (G, B) and lengths in words (B,) of the captions of B pictures, given
        their raw features, (B, D) or (B, L, D), on any device.
        """

    def rank(
        self, features: torch.Tensor, found: Sequence[Sequence[Hypothesis]], weight: float
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses of each picture, the best first by their score plus `weight` times the CIDEr-D they can
        expect, of 10 at most (papers call it 1,000). The features are raw, (B, D) or (B, L, D), on any device.
        """
        tokens = pad([each.ids or [PAD] for hypotheses in found for each in hypotheses])  # (N, T)
        image_index = torch.arange(len(found)).repeat_interleave(torch.tensor(list(map(len, found))))  # (N,)
        ciders = iter(self.expected_cider(*self.expect(features), tokens, image_index).tolist())
        scored = []
        for hypotheses in found:
            pairs = [(each, next(ciders)) for each in hypotheses]
            scored.append([replace(each, score=each.score + weight * cider, cider=cider) for each, cider in pairs])
        return [sorted(each, key=lambda one: -one.score) for each in scored]

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # it has no sparse products
    def expected_cider(
        self, expected: torch.Tensor, lengths: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> torch.Tensor:
        """Return about the CIDEr-D (N,), from 0 to 10, that captions (N, T) of the pictures `image_index` can expect,
        given the weights of n-grams (G, B) and the lengths (B,) that are expected of these.

        It is that of Vedantam et al. (2015), with the document frequencies of the training captions, except that
        n-grams which a caption repeats are not clipped, and that lengths are compared with the expected mean.
        """
        row, ngram, weight = self.ngrams.tf_idf(tokens)  # (entries,) each
        product = torch.zeros(len(tokens)).index_add(0, row, weight * expected[ngram, image_index[row]])  # (N,)
        difference = (tokens != PAD).sum(1) - lengths[image_index]  # (N,) words
        return 10 / MAX_NGRAM * product * torch.exp(-(difference**2) / (2 * SIGMA**2))


class Consensus(Expectation):
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
        """Remember these of the dataset's pictures, with their captions; `encode` returns the raw features (b, D) or
        (b, L, D) of b of them, and is asked for a few at a time.
        """
        parts = [images[first : first + CHUNK] for first in range(0, len(images), CHUNK)]
        pooled = torch.cat([pool(encode(part)) for part in parts]).cpu()  # (P, D)
        centre = pooled.mean(0)
        row_of = {image: row for row, image in enumerate(images)}
        rows = [row_of.get(dataset.images[image], -1) for image in dataset.image_of.tolist()]  # of each caption
        known = [number for number, row in enumerate(rows) if row >= 0 and len(dataset.tokens[number])]
        captions = pad([dataset.tokens[number][:MAX_WORDS] for number in known])  # (C, T)
        image_index = torch.tensor([rows[number] for number in known])  # (C,)
        return cls(F.normalize(pooled - centre), centre, captions, image_index)

    def save(self, path: Path) -> None:
        """Write what cannot be computed again."""
        real = self.captions != PAD  # (C, T)
        captions = {"words": self.captions[real].int(), "lengths": real.sum(1).int()}
        pictures = {"embeddings": self.embeddings.half(), "centre": self.centre}
        save_checkpoint(path, captions | pictures | {"image_index": self.image_index.int()})

    @classmethod
    def load(cls, path: Path, feature_size: int, vocab_size: int) -> "Consensus":
        """Return what `save` wrote, for features of this size; raises UserError for what does not fit the model."""
        saved = load_checkpoint(path)
        if not cls.fits(saved, feature_size, vocab_size):
            raise UserError(
                f"{path} is damaged, or belongs to another checkpoint; make it anew with: python train.py --resume "
                f"--run {path.resolve().parent.name}, or search without it: search.consensus=0"
            )
        captions = pad(np.split(saved["words"].numpy(), saved["lengths"].cumsum(0)[:-1]))
        embeddings = F.normalize(saved["embeddings"].float())
        return cls(embeddings, saved["centre"].float(), captions, saved["image_index"].long())

    @staticmethod
    def fits(saved: dict[str, Any], feature_size: int, vocab_size: int) -> bool:
        """Whether a file holds what `save` writes, for features of this size and a vocabulary of that size."""
        names = ("embeddings", "centre", "words", "lengths", "image_index")
        tensors = [each for each in map(saved.get, names) if isinstance(each, torch.Tensor)]
        if len(tensors) < len(names):
            return False
        embeddings, centre, words, lengths, image_index = tensors
        floats, whole = (embeddings, centre), (words, lengths, image_index)
        return bool(
            (embeddings.dtype, centre.dtype) == (torch.float16, torch.float32)
            and all(each.isfinite().all() and not each.requires_grad for each in floats)
            and all(each.dtype == torch.int32 and each.ndim == 1 and each.numel() for each in whole)
            and embeddings.shape[1:] == centre.shape == (feature_size,)
            and len(embeddings) <= MAX_IMAGES
            and 0 <= int(words.min()) <= int(words.max()) < vocab_size
            and int(lengths.min()) >= 0
            and int(lengths.max()) * len(lengths) < MAX_CELLS
            and (int(lengths.sum()), len(image_index)) == (len(words), len(lengths))
            and 0 <= int(image_index.min()) <= int(image_index.max()) < len(embeddings)
        )

    def expect(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.mean(self.ranking.weights(self.embed(features)))

    def embed(self, features: torch.Tensor) -> torch.Tensor:
        """Return raw features (B, D) or (B, L, D) as unit vectors (B, D), to be compared with the remembered ones."""
        return F.normalize(pool(features).cpu() - self.centre)

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # it has no sparse products
    def mean(self, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of n-grams (G, B) and the lengths (B,) in the mean over remembered pictures that have
        these weights for B others (B, P), from a KernelRegression.
        """
        return self.mean_weights @ weights.T, weights @ self.mean_lengths

    @cached_property
    def ngrams(self) -> "NGrams":
        return NGrams.of(self.captions, self.image_index)

    @cached_property
    def mean_weights(self) -> torch.Tensor:
        """The means over each picture's captions of their n-grams' weights, sparse (G, P)."""
        captions = torch.bincount(self.image_index, minlength=len(self.embeddings))  # (P,)
        row, ngram, weight = self.ngrams.tf_idf(self.captions)  # (entries,) each
        image = self.image_index[row]
        places, shares = torch.stack([ngram, image]), weight / captions[image]
        size = self.ngrams.count, len(self.embeddings)
        weights = torch.sparse_coo_tensor(places, shares, size, check_invariants=True)
        with warnings.catch_warnings(action="ignore"):  # that CSR, three times as fast here, is in beta
            return weights.to_sparse_csr()

    @cached_property
    def mean_lengths(self) -> torch.Tensor:
        """The mean length in words of each picture's captions (P,); that of all, where it has none."""
        words = (self.captions != PAD).sum(1).float()  # (C,)
        captions = torch.bincount(self.image_index, minlength=len(self.embeddings))  # (P,)
        total = torch.zeros(len(captions)).index_add(0, self.image_index, words)  # (P,)
        return torch.where(captions > 0, total / captions, words.mean())


class KernelRegression:
    """Kernel ridge regression (Saunders et al. 1998) from P remembered pictures, unit vectors (P, D), to others.

    The kernel is Gaussian, exp(sharpness (cosine - 1)), and `ridge` is added to the diagonal of the equations.
    """

    def __init__(self, embeddings: torch.Tensor, sharpness: float, ridge: float) -> None:
        self.embeddings, self.sharpness, self.ridge = embeddings, sharpness, ridge

    @torch.autocast("cpu", enabled=False)  # in bfloat16 no picture would be left out exactly
    def weights(self, embeddings: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weight of each remembered picture for B others (B, P), given as unit vectors (B, D).

        Weights sum to 1, and some may be negative. The weighted sum of anything known of the remembered pictures is its
        prediction: kernel ridge regression on the difference from the mean. Of pictures that are remembered themselves,
        `own` (B,) is the row, else -1: it gets weight 0, as if it had never been seen (leave-one-out, exactly).
        """
        similar = torch.exp(self.sharpness * (self.embeddings @ embeddings.T - 1))  # (P, B)
        others = torch.ones_like(similar).T  # (B, P): 0 in a picture's own row
        if own is None:
            weights = torch.cholesky_solve(similar, self.factor).T  # (B, P)
        else:
            weights = (self.inverse @ similar).T  # (B, P)
            known = (own >= 0).nonzero().squeeze(1)  # (b,)
            row = own[known]  # (b,)
            share = weights[known, row] / self.inverse.diagonal()[row]  # (b,)
            weights[known] -= share.unsqueeze(1) * self.inverse[row]  # its column, since the matrix is symmetric
            weights[known, row] = 0  # and not a rounding error
            others[known, row] = 0
        rest = 1 - weights.sum(1, keepdim=True)  # (B, 1): the weight of the mean, to which the others contribute alike
        return weights + rest * others / others.sum(1, keepdim=True).clamp(min=1)

    @cached_property
    def factor(self) -> torch.Tensor:
        """The Cholesky factor of the equations (P, P): a quarter of a gigabyte for 8,000 pictures."""
        count = len(self.embeddings)
        matrix = torch.empty(count, count)  # of which Cholesky's algorithm reads the lower half
        for first in range(0, count, CHUNK):
            last = min(count, first + CHUNK)
            cosines = self.embeddings[first:last] @ self.embeddings[:last].T
            matrix[first:last, :last] = torch.exp(self.sharpness * (cosines - 1))
        matrix.diagonal().add_(self.ridge)
        return torch.linalg.cholesky(matrix, out=matrix)

    @cached_property
    def inverse(self) -> torch.Tensor:
        """The inverse of the equations' matrix (P, P): three times the work, which pays where many are left out."""
        inverse = torch.cholesky_inverse(self.factor)
        del self.factor  # memory for what is not needed beside it
        return inverse


class NGrams:
    """The n-grams of 1 to 4 words in captions of at least MIN_IMAGES pictures, and their CIDEr-D weights.

    They are a tree: the parent of an n-gram is what precedes its last word, and the root is empty. An n-gram's code is
    its parent's number times `base`, plus its last word; its number is its place among all codes in order. The root has
    number 0, and `count` is G, with the root.
    """

    def __init__(self, codes: torch.Tensor, idf: torch.Tensor, base: int) -> None:
        self.codes = codes  # (G + 1,), sorted: that of the root, those of n-grams, and one that no n-gram has
        self.idf = idf  # (G + 1,): the last is that of unknown n-grams
        self.base, self.count = base, len(codes) - 1

    @classmethod
    def of(cls, captions: torch.Tensor, image_index: torch.Tensor) -> "NGrams":
        """Return those in captions (C, T) of the pictures `image_index` (C,)."""
        images = int(image_index.max()) + 1
        ngrams = cls(torch.tensor([0, LAST_CODE]), torch.zeros(2), int(captions.max()) + 2)
        seen = [torch.ones(1)]
        for n, codes in enumerate(ngrams.encode(captions)):
            row, place = ((captions[:, n:] != PAD) & (codes >= 0)).nonzero(as_tuple=True)
            pairs = (codes[row, place] * images + image_index[row]).unique()  # of an n-gram and a picture
            found, pictures = (pairs // images).unique_consecutive(return_counts=True)
            often = pictures >= MIN_IMAGES
            ngrams.codes = torch.cat([ngrams.codes[:-1], found[often], ngrams.codes[-1:]])
            seen.append(pictures[often])
        unknown = torch.ones(1)  # CIDEr-D counts them as seen once
        return cls(ngrams.codes, torch.log(images / torch.cat([*seen, unknown])), ngrams.base)

    def most_frequent(self, number: int) -> tuple["NGrams", torch.Tensor]:
        """Return at most so many of them, those in most pictures, and their numbers among these (G',).

        What precedes the last word of an n-gram is in as many pictures at least, so that it is kept as well.
        """
        rarest = self.idf[1:-1].sort().values[number:][:1]  # of those that are too many
        kept = self.idf < rarest if len(rarest) else torch.ones_like(self.idf, dtype=torch.bool)  # (G + 1,)
        kept[0] = kept[-1] = True
        number_of = kept.cumsum(0) - 1  # (G + 1,)
        inner = self.codes[kept][1:-1]
        codes = number_of[inner // self.base] * self.base + inner % self.base
        codes = torch.cat([self.codes[:1], codes, self.codes[-1:]])
        return NGrams(codes, self.idf[kept], self.base), kept[:-1].nonzero().squeeze(1)

    def encode(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield, for each n, the codes (C, T - n + 1) of the n-grams in captions (C, T); after an unknown one they are
        negative. Those of fewer words must be in `codes` by then.
        """
        words = tokens.clamp(max=self.base - 1)  # the largest is that of all words which no n-gram has
        numbers = tokens.new_zeros(len(tokens), tokens.shape[1] + 1)  # of what precedes each word: at first the root
        for n in range(MAX_NGRAM):
            codes = numbers[:, :-1] * self.base + words[:, n:]
            yield codes
            numbers = self.find(codes)

    def find(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the numbers of n-grams, -1 for unknown ones."""
        number = torch.searchsorted(self.codes, codes)
        return torch.where(self.codes[number] == codes, number, -1)

    def tf_idf(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, number and weight of each known n-gram in captions (C, T); for each row and n their norm is 1."""
        groups, numbers = [], []  # of each n-gram: which row and n it belongs to, and its number
        for n, codes in enumerate(self.encode(tokens)):
            row, place = (tokens[:, n:] != PAD).nonzero(as_tuple=True)
            groups.append(row * MAX_NGRAM + n)
            numbers.append(self.find(codes[row, place]))
        group, number = torch.cat(groups), torch.cat(numbers)
        unknown = group[number < 0]
        keys, times = (group * self.count + number)[number >= 0].unique(return_counts=True)
        group, number = keys // self.count, keys % self.count
        weight = times * self.idf[number]
        squares = torch.zeros(len(tokens) * MAX_NGRAM).index_add(0, group, weight**2)
        squares.index_add_(0, unknown, self.idf[-1].square().expand(len(unknown)))
        return group // MAX_NGRAM, number, weight / squares.sqrt().clamp(min=1e-12)[group]


def pool(features: torch.Tensor) -> torch.Tensor:
    """Return the mean over the regions of features (B, D) or (B, L, D)."""
    return features.float() if features.ndim == 2 else features.float().mean(1)
