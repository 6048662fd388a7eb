"""Training losses, by the name that `train.loss` gives: cross-entropy by teacher forcing, and self-critical training.

A loss is a module, so that DistributedDataParallel can run it. Given a batch it returns what is minimised, and the
plain negative log-likelihood per word, which is logged. N captions of B pictures, T words, H hidden size, V words.
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import nn

from config import SearchConfig
from data.dataset import Batch, Flickr8kDataset, pad
from data.vocab import EOS, PAD, SOS
from models.consensus import MAX_IMAGES, MAX_NGRAM, SIGMA, Consensus
from models.model import CaptionModel
from models.search import NEVER, search

ROW_MULTIPLE = 64
Words = Sequence[Hashable]
Output = Callable[[torch.Tensor], torch.Tensor]  # from hidden states (…, H) to logits (…, V)


class CrossEntropy(nn.Module):
    """Teacher forcing: each word is predicted from the preceding words of the ground-truth caption."""

    by_image = False  # batches are of captions of similar length, unless the model needs those of a picture together

    def __init__(self, model: CaptionModel, dataset: Flickr8kDataset) -> None:
        super().__init__()
        self.model, self.config = model, model.config.train

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, alphas = self.model(batch.features, batch.inputs, batch.image_index)  # (N, T, H), (N, T, A, L)
        loss, nll = cross_entropy(self.model.decoder.output, hidden, batch.targets, self.config.label_smoothing)
        if self.config.doubly_stochastic:
            loss = loss + self.config.doubly_stochastic * doubly_stochastic_penalty(alphas, batch.targets)
        return loss, nll


def cross_entropy(
    output: Output, hidden: torch.Tensor, targets: torch.Tensor, smoothing: float = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the label-smoothed cross-entropy, and the plain negative log-likelihood; both are means over target words.

    Args:
        hidden: (N, T, H); targets: (N, T), `<pad>` where a caption has ended: padding counts in neither.
    """
    mask = targets != PAD  # (N, T)
    log_probs = masked_logits(output, hidden, mask).float().log_softmax(1)  # (words, V)
    nll = -log_probs.gather(1, targets[mask].unsqueeze(1)).mean()
    if smoothing == 0:
        return nll, nll.detach()
    return (1 - smoothing) * nll - smoothing * log_probs.mean(), nll.detach()


def masked_logits(output: Output, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the logits (words, V) of hidden (N, T, H) where `mask` (N, T) is True: not at padding.

    They are computed for a multiple of ROW_MULTIPLE rows: oneDNN compiles a kernel for each new number of rows.
    """
    words = int(mask.sum())
    first = mask.flatten().argsort(descending=True, stable=True)[
        : -(-words // ROW_MULTIPLE) * ROW_MULTIPLE
    ]  # words, in order
    return output(hidden.flatten(0, 1)[first])[:words]


def doubly_stochastic_penalty(alphas: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the doubly stochastic penalty (Xu et al. 2015, equation 14): regions are attended to about once in all.

    A region's attention should sum to 1 over the words of a caption.

    It is the mean over captions, heads and regions, where the paper sums over regions: a weight of 1 here is its 1 / L.

    Args:
        alphas: (N, T, A, L), summing to 1 over L; targets: (N, T), `<pad>` where a caption has ended.
    """
    mask = (targets != PAD)[:, :, None, None]  # (N, T, 1, 1)
    return (1 - (alphas * mask).sum(1)).square().mean()


class SelfCritical(nn.Module):
    """Self-critical sequence training (Rennie et al. 2017): REINFORCE, with CIDEr-D as reward.

    For each picture `train.self_critical_samples` captions are sampled, or, with `train.self_critical_beam`, found by
    beam search of that width (Cornia et al. 2020): training then improves what search will choose from. The baseline is
    the mean reward of the picture's other captions (Luo 2020); with a single one, the greedy caption's reward.

    The reward is CIDEr-D against the picture's own captions, which the decoder may have memorised. With
    `train.self_critical_consensus` the CIDEr-D predicted from the captions of all other pictures is added
    (models.consensus), which generalises better to new pictures.

    Args:
        dataset: its captions are the references of the reward.
    """

    by_image = True

    def __init__(self, model: CaptionModel, dataset: Flickr8kDataset) -> None:
        super().__init__()
        self.model = model
        self.samples = model.config.train.self_critical_samples
        self.greedy = model.config.search.greedy()
        unrestricted = {"top_k": 0, "top_p": 1.0, "min_length": 0, "no_repeat_ngram": 0}  # whatever inference is set to
        sampling = {"beam": self.samples} if model.config.train.self_critical_beam else {"temperature": 1.0}
        self.sampling = self.greedy.model_copy(update=unrestricted | sampling)
        references: list[list[Words]] = [[] for _ in dataset.images]
        for number, image in enumerate(dataset.image_of.tolist()):
            references[image].append([*dataset.tokens[number].tolist(), EOS])
        self.cider, self.mirrored_id = CiderReward(references), dataset.mirrored_id.tolist()
        self.consensus_weight = model.config.train.self_critical_consensus
        if self.consensus_weight and dataset.features:
            remembered = dataset.sample_images(MAX_IMAGES)
            row_of = {image: row for row, image in enumerate(remembered)}
            self.own_row = torch.tensor([row_of.get(image, -1) for image in dataset.images])  # (P,)
            self.consensus = Consensus.fit(dataset.features.take, dataset, remembered)

    def train(self, mode: bool = True) -> "SelfCritical":
        """Keep dropout off, so that captions are sampled from the distribution whose gradient is taken."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
            if isinstance(module, nn.LSTM):
                module.dropout = 0.0  # not eval(): cuDNN's LSTM has a backward pass in training mode alone
        return self

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the policy-gradient loss (REINFORCE), a mean over words, and the captions' own NLL per word."""
        model = self.model
        features = model.encode(batch.features)
        captions = self.sample(features, self.sampling, self.samples)  # B K captions
        image_index = torch.arange(len(features), device=features.device).repeat_interleave(self.samples)  # (B K,)

        # advantage: by how much each caption's reward exceeds the baseline
        rewards = self.rewards(captions, batch).to(features.device)  # (B, K)
        if self.samples > 1:
            baseline = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)  # (B, K)
        else:
            baseline = self.rewards(self.sample(features, self.greedy, 1), batch).to(features.device)
        advantage = (rewards - baseline).flatten()  # (B K,)

        # log-probabilities of the captions' words, by teacher forcing
        tokens = pad([[SOS, *ids] for ids in captions]).to(features.device)  # (B K, 1 + T)
        hidden, _ = model.decoder(features, tokens[:, :-1], image_index)  # (B K, T, H)
        mask = tokens[:, 1:] != PAD  # (B K, T)
        caption, place = mask.nonzero(as_tuple=True)  # (words,) each
        logits = masked_logits(model.decoder.output, hidden, mask).float()  # (words, V)
        log_probs = logits.index_fill(1, torch.tensor(NEVER, device=logits.device), -math.inf).log_softmax(1)
        log_probs = log_probs.gather(1, tokens[caption, place + 1].unsqueeze(1)).squeeze(1)  # (words,)
        return -(advantage[caption] * log_probs).mean(), -log_probs.detach().mean()

    def sample(self, features: torch.Tensor, options: SearchConfig, count: int) -> list[list[int]]:
        """Return `count` captions of each picture, with `<eos>` where it was written."""
        found = search(self.model.decoder, features.detach(), options, count)
        captions = [hypothesis.ids for each in found for hypothesis in each]
        return [ids if len(ids) == options.max_length else [*ids, EOS] for ids in captions]

    def rewards(self, captions: list[list[int]], batch: Batch) -> torch.Tensor:
        """Return the reward (B, K) of K captions of each picture; for a mirrored one, left and right are swapped."""
        count = len(captions) // len(batch.image_ids)
        mirrored = batch.mirrored.repeat_interleave(count).tolist()  # (B K,)
        captions = [
            [self.mirrored_id[i] for i in ids] if turned else ids
            for ids, turned in zip(captions, mirrored, strict=True)
        ]
        rewards = torch.tensor(
            [self.cider(captions[row * count :][:count], image) for row, image in enumerate(batch.image_ids.tolist())]
        )  # (B, K)
        if self.consensus_weight:
            image_index = torch.arange(len(batch.image_ids)).repeat_interleave(count)  # (B K,)
            words = pad([[i for i in ids if i != EOS] or [PAD] for ids in captions])  # (B K, T)
            own = self.own_row[batch.image_ids.cpu()]  # (B,)
            weights = self.consensus.reward.weights(self.consensus.embed(batch.features), own)  # (B, P)
            expected = self.consensus.expected_cider(*self.consensus.mean(weights), words, image_index)  # (B K,)
            rewards += self.consensus_weight * expected.view_as(rewards)
        return rewards


LOSSES: dict[str, type[CrossEntropy] | type[SelfCritical]] = {
    "cross_entropy": CrossEntropy,
    "self_critical": SelfCritical,
}


class CiderReward:
    """CIDEr-D (Vedantam et al. 2015) of single captions, with document frequencies from all references.

    Args:
        references: the captions of each picture, as words or ids; `<eos>` counts as a word where it is given.
    """

    def __init__(self, references: Sequence[Sequence[Words]]) -> None:
        self.references = references
        self.frequency = Counter(
            ngram for captions in references for ngram in {n for words in captions for n in count_ngrams(words)}
        )
        self.log_images = math.log(len(references))

    def __call__(self, captions: Sequence[Words], image: int) -> list[float]:
        """Return the score of each caption of picture number `image`; the maximum is 10."""
        references = [(len(words), *self.tf_idf(words)) for words in self.references[image]]
        scores = []
        for caption in captions:
            weights, norms = self.tf_idf(caption)
            total = 0.0
            for length, other, other_norms in references:
                products = [0.0] * MAX_NGRAM
                for ngram in weights.keys() & other.keys():
                    products[len(ngram) - 1] += min(weights[ngram], other[ngram]) * other[ngram]
                cosines = sum(p / (a * b) for p, a, b in zip(products, norms, other_norms, strict=True) if p)
                total += cosines * math.exp(-((len(caption) - length) ** 2) / (2 * SIGMA**2))
            scores.append(10 * total / MAX_NGRAM / len(references))
        return scores

    def tf_idf(self, words: Words) -> tuple[dict[Words, float], list[float]]:
        """Return each n-gram's count times its inverse document frequency, and the norm for each n."""
        weights = {
            ngram: count * (self.log_images - math.log(max(1, self.frequency[ngram])))
            for ngram, count in count_ngrams(words).items()
        }
        squares = [0.0] * MAX_NGRAM
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares]


def count_ngrams(words: Words) -> Counter[Words]:
    return Counter(
        tuple(words[first : first + n]) for n in range(1, MAX_NGRAM + 1) for first in range(len(words) - n + 1)
    )
