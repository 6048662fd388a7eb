"""Consensus re-ranking: of the captions a beam finds, the one that is most like what people say of such pictures.

Devlin et al. 2015 (arXiv:1505.04467) and Mao et al. 2015 (arXiv:1412.6632, appendix) take the candidate that is most
like the captions of the nearest training pictures. Here all training pictures vote, by kernel ridge regression: from a
picture's features it predicts the weights of n-grams that CIDEr-D compares, so that their product with a candidate's is
about the CIDEr-D that this one can expect. P pictures remembered, C captions of them, B pictures to caption, G n-grams.
"""

from cli import UserError

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from data.dataset import Flickr8kDataset, padded
from data.vocab import PAD
from models.regression import Regression
from models.search import Hypothesis

MOST = 8000  # pictures that are remembered: the regression solves as many equations
AT_ONCE = 500  # pictures whose cells are in memory together
RANKING = 2.0, 0.1  # sharpness and ridge of the regression that ranks captions, chosen on Flickr8k's dev pictures …
LEARNING = 4.0, 0.3  # … and of the one that training goes by: about the least error on train, each picture left out
CUT = 50  # words of a training caption: more say little, and one very long caption would make all take its room
LONGEST = 4  # words in an n-gram
SPREAD = 6.0  # standard deviation, in words, of CIDEr-D's penalty of other lengths
SEEN = 2  # pictures an n-gram is known from: those of a single one say nothing of others


class Consensus:
    """What people say of pictures, and how it follows from what these look like.

    Args:
        pictures: what P pictures look like: their features, less `centre`, as unit vectors (P, D).
        centre: the mean of their features (D,).
        captions: word ids of their captions, `<pad>` where these have ended (C, T); owner: whose they are (C,).
    """

    def __init__(
        self, pictures: torch.Tensor, centre: torch.Tensor, captions: torch.Tensor, owner: torch.Tensor
    ) -> None:
        self.pictures, self.centre, self.captions, self.owner = pictures, centre, captions, owner
        self.for_ranking, self.for_learning = Regression(pictures, *RANKING), Regression(pictures, *LEARNING)

    @classmethod
    def of(
        cls, encode: Callable[[Sequence[str]], torch.Tensor], dataset: Flickr8kDataset, images: Sequence[str]
    ) -> "Consensus":
        """Remember these of the dataset's pictures, with their captions.

        Args:
            encode: gives the features of some pictures (b, D) or (b, L, D); it is asked for a few at a time.
        """
        parts = [images[first : first + AT_ONCE] for first in range(0, len(images), AT_ONCE)]
        pooled = torch.cat([pool(encode(part)) for part in parts]).cpu()  # (P, D)
        centre = pooled.mean(0)
        place = {image: row for row, image in enumerate(images)}
        captions, owner = list[np.ndarray](), list[int]()
        for ids, image in zip(dataset.tokens, dataset.image_of.tolist(), strict=True):
            if len(ids) > 2 and dataset.images[image] in place:  # more than <sos> and <eos>
                captions.append(ids[1:-1][:CUT])
                owner.append(place[dataset.images[image]])
        return cls(F.normalize(pooled - centre), centre, padded(captions), torch.tensor(owner))

    def state(self) -> dict[str, torch.Tensor]:
        """Return all there is to keep; what is computed from it is not."""
        real = self.captions != PAD
        return {
            "pictures": self.pictures.half(),
            "centre": self.centre,
            "words": self.captions[real].int(),
            "lengths": real.sum(1).int(),
            "owner": self.owner.int(),
        }

    @classmethod
    def from_state(cls, saved: Mapping[str, Any], size: int, words: int, where: str) -> "Consensus":
        """Return what `state()` gave, of features of this size and a vocabulary of so many words.

        Raises UserError, which names the file `where`, for what does not fit together.
        """
        pictures, centre = saved["pictures"].float(), saved["centre"].float()
        ids, lengths, owner = (saved[name].long() for name in ("words", "lengths", "owner"))
        fits = pictures.ndim == 2 and pictures.shape[1:] == centre.shape == (size,) and 0 < len(pictures) <= MOST
        fits = fits and bool(pictures.isfinite().all() and centre.isfinite().all())
        fits = fits and ids.ndim == lengths.ndim == owner.ndim == 1 and len(lengths) == len(owner) > 0
        fits = fits and 0 < int(lengths.min()) <= int(lengths.max()) <= CUT and int(lengths.sum()) == len(ids)
        if not fits or not within(ids, words) or not within(owner, len(pictures)):
            raise UserError(f"{where} is damaged in its consensus, so it is not a trained model; take another one")
        return cls(F.normalize(pictures), centre, padded(np.split(ids.numpy(), lengths.cumsum(0)[:-1])), owner)

    def rank(
        self, features: torch.Tensor, found: Sequence[Sequence[Hypothesis]], weight: float
    ) -> list[list[Hypothesis]]:
        """Return the hypotheses `found` for each picture, the best first by their score with that of `expect` added.

        Args:
            features: raw ones, (B, D) or (B, L, D), on any device.
            weight: what an expected CIDEr-D of 1 (of 10; papers call it 100) adds.
        """
        tokens = padded([each.ids or [PAD] for hypotheses in found for each in hypotheses])  # (N, T)
        owner = torch.arange(len(found)).repeat_interleave(torch.tensor(list(map(len, found))))  # (N,)
        votes = self.for_ranking.votes(self.looks(features))  # (B, P)
        expected = iter((weight * self.expect(votes, tokens, owner)).tolist())
        scored = [[replace(each, score=each.score + next(expected)) for each in hypotheses] for hypotheses in found]
        return [sorted(each, key=lambda one: -one.score) for each in scored]

    def looks(self, features: torch.Tensor) -> torch.Tensor:
        """Return what pictures with these raw features (B, D) or (B, L, D) look like, as unit vectors (B, D)."""
        return F.normalize(pool(features).cpu() - self.centre)

    @torch.inference_mode()
    @torch.autocast("cpu", enabled=False)  # it has no sparse products
    def expect(self, votes: torch.Tensor, tokens: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        """Return about the CIDEr-D (N,), from 0 to 10, that captions (N, T) of the pictures `owner` (N,) can expect.

        It is Vedantam et al.'s (2015), with the rarity of n-grams among the remembered captions, but that n-grams which
        a caption repeats are not clipped, and that lengths are compared with the mean of those expected.

        Args:
            votes: how much each remembered picture has to say of each of B (B, P).
        """
        ngrams = self.mean_weights @ votes.T  # (G, B)
        lengths = votes @ self.lengths  # (B,)
        row, ngram, weight = self.ngrams.weigh(tokens)  # (entries,) each
        alike = torch.zeros(len(tokens)).index_add(0, row, weight * ngrams[ngram, owner[row]])  # (N,)
        longer = (tokens != PAD).sum(1) - lengths[owner]  # (N,) words
        return 10 / LONGEST * alike * torch.exp(-(longer**2) / (2 * SPREAD**2))

    @cached_property
    def ngrams(self) -> "NGrams":
        return NGrams(self.captions, self.owner)

    @cached_property
    def mean_weights(self) -> torch.Tensor:
        """What people say of each picture: the mean of its captions' n-gram weights, sparse (G, P)."""
        row, ngram, weight = self.ngrams.weigh(self.captions)
        picture = self.owner[row]
        each = weight / torch.bincount(self.owner, minlength=len(self.pictures))[picture]
        places, size = torch.stack([ngram, picture]), (self.ngrams.count, len(self.pictures))
        with warnings.catch_warnings(action="ignore"):  # of this layout, three times as fast, as of something new
            return torch.sparse_coo_tensor(places, each, size, check_invariants=True).to_sparse_csr()

    @cached_property
    def lengths(self) -> torch.Tensor:
        """The mean length of each picture's captions (P,), in words; that of all where it has none."""
        words = (self.captions != PAD).sum(1).float()  # (C,)
        total = torch.zeros(len(self.pictures)).index_add(0, self.owner, words)  # (P,)
        captions = torch.bincount(self.owner, minlength=len(self.pictures))  # (P,)
        return torch.where(captions > 0, total / captions, words.mean())


class NGrams:
    """The n-grams of 1 to 4 words that captions of SEEN pictures or more have, and what CIDEr-D weighs them by.

    An n-gram is numbered by the number of what precedes its last word, and this word.

    Args:
        captions: word ids (C, T), `<pad>` at their ends; owner: whose they are (C,).

    Attributes:
        count: how many n-grams there are.
    """

    def __init__(self, captions: torch.Tensor, owner: torch.Tensor) -> None:
        self.vocabulary, pictures = int(captions.max()) + 1, int(owner.max()) + 1
        self.known: list[torch.Tensor] = []  # for each n, sorted
        frequencies = []
        before = torch.zeros_like(captions)  # (C, T)
        for _ in range(LONGEST):
            codes = self.code(before, captions)  # (C, T)
            pairs = (codes * pictures + owner.unsqueeze(1))[codes >= 0].unique()
            ngrams, seen = (pairs // pictures).unique_consecutive(return_counts=True)
            self.known.append(ngrams[seen >= SEEN])
            frequencies.append(seen[seen >= SEEN])
            before = shifted(places_of(codes, self.known[-1]))
        self.count = sum(map(len, self.known))
        unknown = torch.ones(1)  # CIDEr-D takes them for seen once
        self.rarity = torch.log(pictures / torch.cat([*frequencies, unknown]))  # (G + 1,)

    def code(self, before: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return what stands for the n-grams that end with each word (C, T), given the numbers of what precedes it.

        It is -1 where there is no word, or none that is known, or where nothing known precedes it.
        """
        nothing = (before < 0) | (tokens == PAD) | (tokens >= self.vocabulary)
        return (before * self.vocabulary + tokens).masked_fill(nothing, -1)

    def weigh(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, number and weight of each known n-gram of captions (C, T); for each row and n their norm is 1."""
        row, n, number = self.look_up(tokens)
        every = self.count + tokens.shape[1] * LONGEST
        keys, times = ((row * LONGEST + n) * every + number).unique(return_counts=True)
        number, group = keys % every, keys // every
        weight = times * self.rarity[number.clamp(max=self.count)]
        norm = torch.zeros(len(tokens) * LONGEST).index_add(0, group, weight**2).sqrt().clamp(min=1e-12)
        known = number < self.count
        return group[known] // LONGEST, number[known], (weight / norm[group])[known]

    def look_up(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return row, n - 1 and number of each n-gram; unknown ones are numbered from `count` on, by their place."""
        numbers, before, first = list[torch.Tensor](), torch.zeros_like(tokens), 0
        for known in self.known:
            found = places_of(self.code(before, tokens), known)  # (C, T)
            numbers.append(torch.where(found < 0, -1, first + found))
            before, first = shifted(found), first + len(known)
        together = torch.stack(numbers, dim=1)  # (C, 4, T)
        place = torch.arange(tokens.shape[1])  # (T,)
        real = (tokens != PAD).unsqueeze(1) & (place >= torch.arange(LONGEST).unsqueeze(1))  # (C, 4, T)
        row, n, end = real.nonzero(as_tuple=True)
        own = self.count + end * LONGEST + n
        number = together[real]
        return row, n, torch.where(number < 0, own, number)


def forget(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint that holds no training captions, and searches without them."""
    config = checkpoint["config"]
    return checkpoint | {"consensus": None, "config": config | {"search": config["search"] | {"consensus": 0.0}}}


def places_of(codes: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Return the places of codes among the sorted `known`, -1 where they are not there."""
    if not len(known):
        return torch.full_like(codes, -1)
    place = torch.searchsorted(known, codes).clamp(max=len(known) - 1)
    return torch.where(known[place] == codes, place, -1)


def shifted(numbers: torch.Tensor) -> torch.Tensor:
    """Move what ends with each word (C, T) to the next word, which it precedes; nothing precedes the first."""
    return F.pad(numbers[:, :-1], (1, 0), value=-1)


def pool(features: torch.Tensor) -> torch.Tensor:
    """Return the mean over the cells of features (B, D) or (B, L, D)."""
    return features.float() if features.ndim == 2 else features.float().mean(1)


def within(numbers: torch.Tensor, end: int) -> bool:
    return bool(((numbers >= 0) & (numbers < end)).all())
