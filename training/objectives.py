"""What training makes small: cross-entropy by teacher forcing, or the lack of CIDEr in the model's own captions."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn

from config import SearchConfig
from data.dataset import Batch, Flickr8kDataset, padded
from data.stream import StreamedDataset
from data.vocab import EOS, PAD, SOS
from models.consensus import LONGEST, MOST, SPREAD, Consensus
from models.decoder import first_rows
from models.model import CaptionModel
from models.search import NEVER, search

Words = Sequence[Hashable]


class Objective(nn.Module):
    """What training makes small, as one module, so that DistributedDataParallel can run it."""

    def __init__(self, model: CaptionModel, dataset: Flickr8kDataset | StreamedDataset) -> None:
        super().__init__()
        self.model = model
        self.self_critical: SelfCritical | None = None
        if model.config.train.self_critical_epochs:
            assert isinstance(dataset, Flickr8kDataset)  # of which `config.validate` has made sure
            self.self_critical = SelfCritical(model, dataset)

    def forward(self, batch: Batch, critical: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objective of this epoch, whether self-critical or not, and the plain loss per word."""
        if critical and self.self_critical:
            return self.self_critical(self.model, batch)
        return cross_entropy(self.model, batch)


def cross_entropy(model: CaptionModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the objective of teacher forcing and the plain negative log-likelihood per word."""
    config = model.config.train
    hidden, attention = model(batch.pictures, batch.inputs, batch.owner)  # (N, T, H), (N, T, A, L)
    objective, nll = caption_loss(model.decoder.output, hidden, batch.targets, config.label_smoothing)
    if config.doubly_stochastic:
        objective = objective + config.doubly_stochastic * uneven_looking(attention, batch.targets)
    return objective, nll


def caption_loss(
    output: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the label-smoothed objective and the plain negative log-likelihood, both means over real words.

    Args:
        output: makes logits of hidden (N, T, H); targets: (N, T), `<pad>` where a caption has ended.
    """
    real = targets != PAD  # (N, T)
    log_probs = real_logits(output, hidden, real).float().log_softmax(1)  # (words, V)
    nll = -log_probs.gather(1, targets[real].unsqueeze(1)).mean()
    if smoothing == 0:
        return nll, nll.detach()
    return (1 - smoothing) * nll - smoothing * log_probs.mean(), nll.detach()


def real_logits(
    output: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, real: torch.Tensor
) -> torch.Tensor:
    """Return the logits (words, V) of hidden (N, T, H) where there are words: `real` (N, T)."""
    return output(hidden.flatten(0, 1)[first_rows(real)])[: int(real.sum())]


def uneven_looking(attention: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the doubly stochastic penalty (Xu et al. 2015, equation 14): each cell wants to be looked at once.

    It is the mean over cells, where the paper has the sum: a weight of 1 here is one of 1 / L there.

    Args:
        attention: (N, T, A, L), each map of sum 1; targets: (N, T), `<pad>` where a caption has ended.
    """
    real = (targets != PAD)[:, :, None, None]  # (N, T, 1, 1)
    return (1 - (attention * real).sum(1)).square().mean()


class SelfCritical:
    """Self-critical sequence training (Rennie et al. 2017): what the model writes better than usual becomes likelier.

    Of each picture `train.self_critical_samples` captions are drawn, or, with `train.self_critical_beam`, found by a
    beam of as many (Cornia et al. 2020), so that what training improves is what beam search then chooses from. The
    usual is the mean reward of the others (Luo 2020), or, of a single one drawn, the reward of the greedy caption.

    The reward is CIDEr-D with the picture's own captions, which the decoder has come to know by heart. With
    `train.self_critical_consensus` it is also the CIDEr-D that the captions of all other pictures lead one to expect
    (models.consensus), of which none is this picture's own: what it teaches holds for new pictures, too.

    Args:
        dataset: its captions are the references of the reward.
    """

    def __init__(self, model: CaptionModel, dataset: Flickr8kDataset) -> None:
        self.samples = model.config.train.self_critical_samples
        self.greedy = model.config.search.greedy()
        self.never = torch.tensor(NEVER, device=model.feature_mean.device)
        plain = {"top_k": 0, "top_p": 1.0, "min_length": 0, "no_repeat_ngram": 0}
        written = {"beam": self.samples} if model.config.train.self_critical_beam else {"temperature": 1.0}
        self.written = self.greedy.model_copy(update=plain | written)  # whatever search may be told later
        references: list[list[Words]] = [[] for _ in dataset.images]
        for image, ids in zip(dataset.image_of, dataset.tokens, strict=True):
            references[image].append(ids[1:].tolist())
        self.reward, self.other_side = CiderReward(references), dataset.other_side.tolist()
        self.consensus_weight = model.config.train.self_critical_consensus
        if self.consensus_weight:
            assert dataset.features is not None  # of which `config.validate` has made sure
            remembered = dataset.spread(MOST)
            row = {image: row for row, image in enumerate(remembered)}
            self.own = torch.tensor([row.get(image, -1) for image in dataset.images])  # (images,)
            self.consensus = Consensus.of(dataset.features.take, dataset, remembered)

    def __call__(self, model: CaptionModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the objective, whose gradient is that of the expected reward, and the captions' own NLL per word."""
        pictures = model.encode(batch.pictures)
        captions = self.write(model, pictures, self.written, self.samples)  # B K captions
        owner = torch.arange(len(pictures), device=pictures.device).repeat_interleave(self.samples)  # (B K,)
        tokens = padded([[SOS, *ids] for ids in captions]).to(pictures.device)  # (B K, 1 + T)
        hidden, _ = model.decoder.hidden(pictures, tokens[:, :-1], owner)  # (B K, T, H)
        real = tokens[:, 1:] != PAD  # (B K, T)
        caption, place = real.nonzero(as_tuple=True)  # (words,) each
        logits = real_logits(model.decoder.output, hidden, real)  # (words, V)
        drawn_from = logits.float().index_fill(1, self.never, -math.inf).log_softmax(1)
        log_probs = drawn_from.gather(1, tokens[caption, place + 1].unsqueeze(1)).squeeze(1)  # (words,)
        advantage = self.advantage(model, pictures, captions, batch)[caption]  # (words,)
        return -(advantage * log_probs).mean(), -log_probs.detach().mean()

    def advantage(
        self, model: CaptionModel, pictures: torch.Tensor, captions: list[list[int]], batch: Batch
    ) -> torch.Tensor:
        """Return by how much each caption's reward exceeds the usual one (B K,)."""
        rewards = self.rewards(captions, batch).to(pictures.device)  # (B, K)
        if self.samples > 1:
            usual = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)  # (B, K)
        else:
            usual = self.rewards(self.write(model, pictures, self.greedy, 1), batch).to(pictures.device)
        return (rewards - usual).flatten()

    def rewards(self, captions: list[list[int]], batch: Batch) -> torch.Tensor:
        """Return the reward of each of K captions of each picture (B, K); of a mirrored one, left is right."""
        each = len(captions) // len(batch.images)
        mirrored = batch.mirrored.repeat_interleave(each).tolist()  # (B K,)
        seen = [
            [self.other_side[i] for i in ids] if turned else ids for ids, turned in zip(captions, mirrored, strict=True)
        ]
        rewards = torch.tensor(
            [self.reward(seen[place * each :][:each], image) for place, image in enumerate(batch.images.tolist())]
        )  # (B, K)
        if self.consensus_weight:
            rewards += self.consensus_weight * self.expected(seen, batch).view_as(rewards)
        return rewards

    def expected(self, captions: list[list[int]], batch: Batch) -> torch.Tensor:
        """Return about the CIDEr-D (B K,) that K captions of each picture can expect, by all other pictures."""
        owner = torch.arange(len(batch.images)).repeat_interleave(len(captions) // len(batch.images))
        words = padded([[i for i in ids if i != EOS] or [PAD] for ids in captions])  # (B K, T)
        looks, own = self.consensus.looks(batch.pictures), self.own[batch.images.cpu()]
        return self.consensus.expect(self.consensus.for_learning.votes(looks, own), words, owner)

    def write(self, model: CaptionModel, pictures: torch.Tensor, options: SearchConfig, count: int) -> list[list[int]]:
        """Return `count` captions of each picture, with `<eos>` where it was written."""
        found = search(model.decoder, pictures.detach(), options, count)
        captions = [hypothesis.ids for each in found for hypothesis in each]
        return [ids if len(ids) == options.max_length else [*ids, EOS] for ids in captions]


class CiderReward:
    """CIDEr-D (Vedantam et al. 2015) of single captions, document frequencies from all references.

    Args:
        references: the captions of each picture, as words or ids; `<eos>` counts as a word when it is given.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.references = references
        self.frequency = Counter(
            ngram for captions in references for ngram in {n for words in captions for n in count_ngrams(words)}
        )
        self.most = math.log(len(references))

    def __call__(self, captions: Sequence[Words], picture: int) -> list[float]:
        """Return the score of each caption of the picture in this place of the references; 10 is the highest."""
        references = [(len(words), *self.weigh(words)) for words in self.references[picture]]
        scores = []
        for caption in captions:
            weights, norms = self.weigh(caption)
            total = 0.0
            for length, other, other_norms in references:
                products = [0.0] * LONGEST
                for ngram in weights.keys() & other.keys():
                    products[len(ngram) - 1] += min(weights[ngram], other[ngram]) * other[ngram]
                cosines = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms, strict=True) if p)
                total += cosines * math.exp(-((len(caption) - length) ** 2) / (2 * SPREAD**2))
            scores.append(10 * total / LONGEST / len(references))
        return scores

    def weigh(self, words: Words) -> tuple[dict[Words, float], list[float]]:
        """Return each n-gram's count times its inverse document frequency, and the norms by length of n-gram."""
        weights = {
            ngram: count * (self.most - math.log(max(1, self.frequency[ngram])))
            for ngram, count in count_ngrams(words).items()
        }
        squares = [0.0] * LONGEST
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]


def count_ngrams(words: Words) -> Counter[Words]:
    return Counter(
        tuple(words[first : first + n]) for n in range(1, LONGEST + 1) for first in range(len(words) - n + 1)
    )
