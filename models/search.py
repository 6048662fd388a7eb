"""Caption search, written once for every decoder: greedy, beam and sampling, batched over pictures and hypotheses.

It knows nothing but the decoder interface: what depends on the picture alone stays in `memory`, one row per picture,
and only the small state follows the hypotheses. B pictures, K hypotheses of each side by side, N = B K, V words.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from config import SearchConfig
from data.vocab import EOS, PAD, SOS, UNK
from models.decoder import Decoder, Memory, State

INF = float("inf")
NEVER = [PAD, SOS, UNK]  # words that are never written
WORTH_NARROWING = 0.9  # share of the rows still needed above which leaving the others out is not worth its copies


@dataclass(frozen=True)
class Hypothesis:
    """A caption as it was found.

    Attributes:
        ids: its words, without `<sos>` and `<eos>`.
        log_prob: natural logarithm of the probability the decoder gives it, `<eos>` included where it was written.
        score: what ranks it: `log_prob / length ** length_penalty`, the length counting `<eos>`, and what
            `models.consensus` adds.
        attention: where the decoder looked as it wrote each word (words, A, L), or None.
    """

    ids: list[int]
    log_prob: float
    score: float
    attention: torch.Tensor | None = field(default=None, compare=False)


@dataclass
class Running:
    """Hypotheses still being written. Those with log-probability minus infinity have ended and only fill the tensor.

    Attributes:
        pictures: which pictures they are of (B,); memory: one row per picture; state: one row per hypothesis.
        words: `<sos>` and what is written (N, 1 + t); log_prob: (B, K).
        attention: (N, t, A, L), where it is kept.
    """

    pictures: torch.Tensor
    memory: Memory
    state: State
    words: torch.Tensor
    log_prob: torch.Tensor
    attention: torch.Tensor | None = None

    def follow(self, rows: torch.Tensor) -> None:
        """Go on with the hypotheses `rows` alone, in this order; one may be taken several times."""
        self.words = self.words[rows]
        self.state = tuple(part[rows] for part in self.state)
        self.attention = None if self.attention is None else self.attention[rows]

    def part(self, kept: torch.Tensor, width: int) -> "Running":
        """Return the pictures that `kept` (B,) marks, with `width` hypotheses each; more than that have ended."""
        part = copy.copy(self)
        part.pictures, part.memory = self.pictures[kept], tuple(rows[kept] for rows in self.memory)
        log_prob, place = self.log_prob[kept].topk(width)  # (B', width)
        part.log_prob = log_prob
        first = kept.nonzero() * self.log_prob.shape[1]  # (B', 1)
        part.follow((first + place).flatten())
        return part


def search(
    decoder: Decoder,
    features: torch.Tensor,
    options: SearchConfig,
    num_captions: int = 1,
    forbidden: tuple[int, ...] = (),
    keep_attention: bool = False,
) -> list[list[Hypothesis]]:
    """Return the `num_captions` best hypotheses for each picture, the best first.

    With `options.temperature` 0 this is beam search. A hypothesis that ends keeps its place, so that the beam narrows:
    a beam of 1 is greedy search, and one of K finds K captions. A picture is done when no running hypothesis can
    overtake the best that ended; what reaches `options.max_length` is taken as it is. With a temperature above 0 the
    captions are drawn, independently of each other, from PyTorch's global generator.

    Args:
        features: standardised, (B, D) or (B, L, D).
        num_captions: a narrower beam is widened to it. A tiny vocabulary may have fewer captions to give.
        forbidden: word ids that are never written, beside `<pad>`, `<sos>` and `<unk>`.
        keep_attention: fill `Hypothesis.attention` where the decoder has one.
    """
    return Search(decoder, features, options, num_captions, forbidden, keep_attention).run()


class Search:
    """One search: what `search` was asked for, and what has been found of each picture so far."""

    def __init__(
        self,
        decoder: Decoder,
        features: torch.Tensor,
        options: SearchConfig,
        num_captions: int,
        forbidden: tuple[int, ...],
        keep_attention: bool,
    ) -> None:
        self.decoder, self.features, self.options = decoder, features, options
        self.num_captions, self.forbidden, self.keep_attention = num_captions, forbidden, keep_attention
        self.width = num_captions if options.temperature else max(options.beam, num_captions)
        self.choose: Choose = partial(draw, options=options) if options.temperature else best_of_beam
        self.found: list[list[Hypothesis]] = [[] for _ in features]
        self.ended_scores = torch.full((len(features), self.width), -INF, device=features.device)  # the best first

    @torch.inference_mode()
    def run(self) -> list[list[Hypothesis]]:
        memory = self.decoder.prepare(self.features)
        pictures = torch.arange(len(self.features), device=self.features.device)
        words = torch.full_like(pictures, SOS).unsqueeze(1)  # (B, 1)
        log_prob = torch.zeros(words.shape, device=words.device)
        running: Running | None = Running(pictures, memory, self.decoder.start(memory), words, log_prob)
        while running:
            self.advance(running)
            running = self.narrow(running)
        return [sorted(each, key=lambda one: -one.score)[: self.num_captions] for each in self.found]

    def advance(self, running: Running) -> None:
        """Write one more word of each hypothesis."""
        logits, running.state, attention = self.decoder.step(running.words[:, -1], running.state, running.memory)
        if self.keep_attention and attention is not None:
            seen = [] if running.attention is None else [running.attention]
            running.attention = torch.cat([*seen, attention.unsqueeze(1)], dim=1)  # (N, t, A, L)
        log_probs = allow(logits.float().log_softmax(1), running.words, self.options, self.forbidden)  # (N, V)
        places = self.ended_scores[running.pictures].isneginf().sum(1)  # (B,) left in the beam
        running.log_prob, rows, tokens = self.choose(running.log_prob, log_probs, places)  # (B, K), (N,), (N,)
        running.follow(rows)
        running.words = torch.cat([running.words, tokens.unsqueeze(1)], dim=1)
        self.collect(running)

    def collect(self, running: Running) -> None:
        """Move the hypotheses that have ended, and all at the last step, to those found of their pictures."""
        length = running.words.shape[1] - 1
        last = length == self.options.max_length
        ended = (running.log_prob > -INF) & (last | (running.words[:, -1].view_as(running.log_prob) == EOS))  # (B, K)
        scores = running.log_prob / length**self.options.length_penalty  # (B, K)
        rows = ended.flatten().nonzero().squeeze(1)
        owners = running.pictures[rows // ended.shape[1]].tolist()
        log_probs, ranks = running.log_prob[ended].tolist(), scores[ended].tolist()
        written = running.words[rows, 1:].tolist()
        for row, owner, ids, log_prob, score in zip(rows.tolist(), owners, written, log_probs, ranks, strict=True):
            ids = ids[:-1] if ids[-1] == EOS else ids
            attention = None if running.attention is None else running.attention[row, : len(ids)]
            self.found[owner].append(Hypothesis(ids, log_prob, score, attention))
        both = torch.cat([self.ended_scores[running.pictures], scores.masked_fill(~ended, -INF)], dim=1)
        self.ended_scores[running.pictures] = both.topk(self.width).values
        running.log_prob = running.log_prob.masked_fill(ended, -INF)

    def narrow(self, running: Running) -> Running | None:
        """Return what is to go on, without the pictures that are done and as wide as the widest beam, or None."""
        ended = self.ended_scores[running.pictures]  # (B, K)
        reachable = running.log_prob.amax(1) / self.options.max_length**self.options.length_penalty  # (B,)
        undecided = reachable > ended[:, self.num_captions - 1]
        if not undecided.any():
            return None
        places = ended.isneginf().sum(1)[undecided].max()
        width = min(int(places), running.log_prob.shape[1])
        if int(undecided.sum()) * width > WORTH_NARROWING * running.log_prob.numel():
            return running
        return running.part(undecided, width)


def allow(
    log_probs: torch.Tensor, words: torch.Tensor, options: SearchConfig, forbidden: tuple[int, ...]
) -> torch.Tensor:
    """Set the log-probabilities (N, V) of words that may not follow `words` (N, 1 + t) to minus infinity, in place.

    `<eos>` stays possible where nothing else is.
    """
    end = log_probs[:, EOS].clamp(min=-1e9)  # (N,)
    log_probs[:, [*NEVER, *forbidden]] = -INF
    if options.no_repeat_ngram:
        rows, repeated = repeating(words[:, 1:], options.no_repeat_ngram)
        log_probs[rows, repeated] = -INF
    if words.shape[1] <= options.min_length:
        log_probs[:, EOS] = -INF
        end = end.where(log_probs.isneginf().all(1), -INF)
    log_probs[:, EOS] = end
    return log_probs


def repeating(words: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row, word) pairs: the words that would complete an n-gram already in `words` (N, t)."""
    if words.shape[1] < n:
        nothing = words.new_empty(0)
        return nothing, nothing
    windows = words.unfold(1, n, 1)  # (N, t - n + 1, n)
    tail = words[:, words.shape[1] - n + 1 :].unsqueeze(1)  # (N, 1, n - 1)
    rows, places = (windows[:, :, :-1] == tail).all(2).nonzero(as_tuple=True)
    return rows, windows[rows, places, -1]


Choose = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def best_of_beam(
    log_prob: torch.Tensor, log_probs: torch.Tensor, places: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Extend each picture's hypotheses by the words that make the most probable ones.

    Args:
        log_prob: (B, K) so far; log_probs: (B K, V) of the next word.
        places: how many hypotheses each picture may have (B,).

    Returns the new log_prob (B, K'), and for each of the B K' hypotheses the row it extends and its new word.
    """
    pictures, before = log_prob.shape
    width = int(places.max())
    likely, words = log_probs.topk(min(width, log_probs.shape[1]))  # (B K, K'): the best of all are among these
    each = likely.shape[1]
    extended = (log_prob.unsqueeze(2) + likely.view(pictures, before, each)).flatten(1)  # (B, K K')
    best, index = extended.topk(min(width, extended.shape[1]))  # (B, K')
    best = best.masked_fill(torch.arange(best.shape[1], device=best.device) >= places.unsqueeze(1), -INF)
    first = before * torch.arange(pictures, device=best.device).unsqueeze(1)  # (B, 1)
    return best, (first + index // each).flatten(), words.view(pictures, -1).gather(1, index).flatten()


def draw(
    log_prob: torch.Tensor, log_probs: torch.Tensor, places: torch.Tensor, options: SearchConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Extend each hypothesis by a word drawn from the tempered distribution, cut to its most probable words.

    Top-k: Fan et al. 2018. Top-p: the smallest set of words with at least this probability (Holtzman et al. 2020).
    Arguments and result are those of `best_of_beam`; log-probabilities stay the decoder's own.
    """
    tempered = (log_probs - log_probs.amax(1, keepdim=True)) / options.temperature  # (N, V), at most 0
    ordered, order = tempered.sort(dim=1, descending=True)
    probs = ordered.softmax(1)
    cut = probs.cumsum(1) - probs >= options.top_p
    if options.top_k:
        cut[:, options.top_k :] = True
    each = max(1, int(places.max()) // log_prob.shape[1])  # all from the one at the start, then one from each
    drawn = probs.masked_fill(cut, 0).multinomial(each, replacement=True)  # (N, each) places in the order
    tokens = order.gather(1, drawn).flatten()  # (N,)
    rows = torch.arange(len(log_probs), device=tokens.device).repeat_interleave(each)  # (N,)
    extended = log_prob.flatten()[rows] + log_probs[rows, tokens]
    return extended.view(len(log_prob), -1), rows, tokens
