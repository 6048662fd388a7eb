"""Caption search for every decoder: greedy, beam search and sampling, batched over images and hypotheses.

It knows nothing but the decoder interface: what depends on the image alone stays in `memory`, one row per image, and
only the small state follows the hypotheses. B images, K hypotheses of each side by side, N = B K, V words.
"""

import copy
from dataclasses import dataclass, field

import torch

from config import SearchConfig
from data.vocab import EOS, PAD, SOS, UNK
from models.decoder import Decoder, Memory, State

INF = float("inf")
NEVER = [PAD, SOS, UNK]  # never generated
WORTH_NARROWING = 0.9  # compact the beam only if less than this share of its rows remains: compacting copies them


@dataclass(frozen=True)
class Hypothesis:
    """A caption that search has found."""

    ids: list[int]  # without `<sos>` and `<eos>`
    log_prob: float  # of the decoder, with that of `<eos>` where it was written
    score: float  # what ranks it: `log_prob` with the length penalty, and what `models.consensus` adds
    attention: torch.Tensor | None = field(default=None, compare=False)  # alphas of each word (words, A, L)
    cider: float | None = None  # what consensus expects, of 10 at most


@torch.inference_mode()
def search(
    decoder: Decoder,
    features: torch.Tensor,
    options: SearchConfig,
    num_captions: int = 1,
    forbidden: tuple[int, ...] = (),
    keep_attention: bool = False,
    bonus: torch.Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Return the `num_captions` best hypotheses for each image, the best first.

    With `options.temperature` 0 this is beam search. A hypothesis that ends keeps its slot in the beam, so that a beam
    of 1 is greedy search, and one of K finds K captions. An image is done when no running hypothesis can overtake the
    best ones that have ended; a caption of `options.max_length` words is taken without `<eos>`. With a temperature
    above 0 the captions are drawn, independently of each other, from PyTorch's global generator.

    Args:
        features: standardised, (B, D) or (B, L, D).
        num_captions: a narrower beam is widened to it. A tiny vocabulary may have fewer captions to give.
        forbidden: word ids that are never written, besides `<pad>`, `<sos>` and `<unk>`.
        keep_attention: fill `Hypothesis.attention` where the decoder has one.
        bonus: what a beam search adds to the log-probability of a word that is new in its caption (B, V).
    """
    memory, images = decoder.prepare(features), torch.arange(len(features), device=features.device)
    words = torch.full_like(images, SOS).unsqueeze(1)  # (B, 1): at first an image has one hypothesis
    log_prob = torch.zeros(words.shape, device=features.device)
    beam: Beam | None = Beam(images, memory, decoder.start(memory), words, log_prob)
    found = Finished(features, options, num_captions, bonus)
    while beam:
        logits, beam.state, alphas = decoder.step(beam.words[:, -1], beam.state, beam.memory)
        if keep_attention and alphas is not None:
            before = [] if beam.attention is None else [beam.attention]
            beam.attention = torch.cat([*before, alphas.unsqueeze(1)], dim=1)  # (N, t, A, L)
        log_probs = exclude(logits.float().log_softmax(1), beam.words, options, forbidden)  # (N, V)
        slots = found.open_slots(beam.images)  # (B,)
        if options.temperature:
            beam.log_prob, rows, tokens = sample(beam.log_prob, log_probs, slots, options)
        else:
            if bonus is not None:
                rows = beam.images.repeat_interleave(beam.log_prob.shape[1])  # (N,)
                log_probs = log_probs + bonus[rows].scatter(1, beam.words, 0)
            beam.log_prob, rows, tokens = best_of_beam(beam.log_prob, log_probs, slots)  # (B, K), (N,), (N,)
        beam.reorder(rows)
        beam.words = torch.cat([beam.words, tokens.unsqueeze(1)], dim=1)  # (N, 1 + t)
        found.collect_ended(beam)
        beam = found.narrow(beam)
    return [sorted(each, key=lambda one: -one.score)[:num_captions] for each in found.hypotheses]


@dataclass
class Beam:
    """Hypotheses being written. Those with log-probability minus infinity have ended and remain as padding."""

    images: torch.Tensor  # (B,): the rows of their images in `features`
    memory: Memory  # one row per image
    state: State  # one row per hypothesis
    words: torch.Tensor  # (N, 1 + t): `<sos>` and the words so far
    log_prob: torch.Tensor  # (B, K)
    attention: torch.Tensor | None = None  # (N, t, A, L): alphas of the words so far, where they are kept

    def reorder(self, rows: torch.Tensor) -> None:
        """Keep only the hypotheses `rows`, in this order; one may be repeated."""
        self.words = self.words[rows]
        self.state = tuple(part[rows] for part in self.state)
        self.attention = None if self.attention is None else self.attention[rows]

    def part(self, kept: torch.Tensor, width: int) -> "Beam":
        """Return the hypotheses of the images marked in `kept` (B,), the `width` best of each."""
        part = copy.copy(self)
        part.images, part.memory = self.images[kept], tuple(rows[kept] for rows in self.memory)
        part.log_prob, slots = self.log_prob[kept].topk(width)  # (B', width) each
        first = kept.nonzero() * self.log_prob.shape[1]  # (B', 1)
        part.reorder((first + slots).flatten())
        return part


class Finished:
    """The hypotheses that have ended, by image."""

    def __init__(
        self, features: torch.Tensor, options: SearchConfig, num_captions: int, bonus: torch.Tensor | None
    ) -> None:
        self.options, self.num_captions, self.bonus = options, num_captions, bonus
        width = num_captions if options.temperature else max(options.beam, num_captions)
        self.hypotheses: list[list[Hypothesis]] = [[] for _ in features]
        self.scores = torch.full((len(features), width), -INF, device=features.device)  # the best first

    def open_slots(self, images: torch.Tensor) -> torch.Tensor:
        """Return how many hypotheses of each of these images are still to be found (B,)."""
        return self.scores[images].isneginf().sum(1)

    def collect_ended(self, beam: Beam) -> None:
        """Collect the hypotheses that have ended; at `max_length`, all of them."""
        length = beam.words.shape[1] - 1
        last = length == self.options.max_length
        ended = (beam.log_prob > -INF) & (last | (beam.words[:, -1].view_as(beam.log_prob) == EOS))  # (B, K)
        # the length counts `<eos>`; with a penalty of 0 short captions win, since each word makes one less probable
        scores = beam.log_prob / length**self.options.length_penalty  # (B, K)
        rows = ended.flatten().nonzero().squeeze(1)
        images = beam.images[rows // ended.shape[1]]
        numbers = (rows, images, beam.words[rows, 1:], beam.log_prob[ended], scores[ended])
        for row, image, ids, log_prob, score in zip(*(each.tolist() for each in numbers), strict=True):
            if self.bonus is not None:
                log_prob -= float(self.bonus[image, list(set(ids))].sum())
            ids = ids[:-1] if ids[-1] == EOS else ids
            attention = None if beam.attention is None else beam.attention[row, : len(ids)]
            self.hypotheses[image].append(Hypothesis(ids, log_prob, score, attention))
        both = torch.cat([self.scores[beam.images], scores.masked_fill(~ended, -INF)], dim=1)
        self.scores[beam.images] = both.topk(self.scores.shape[1]).values
        beam.log_prob = beam.log_prob.masked_fill(ended, -INF)

    def narrow(self, beam: Beam) -> Beam | None:
        """Drop images that are done, and slots that none of the others needs; returns None once all images are done.

        An image is done when the best running hypothesis could not overtake the last of those wanted, even if the rest
        of its words were certain and there were as many of them as possible.
        """
        best = beam.log_prob.amax(1) if self.bonus is None else beam.log_prob.amax(1) + self.bonus[beam.images].sum(1)
        reachable = best / self.options.max_length**self.options.length_penalty  # (B,)
        undecided = reachable > self.scores[beam.images, self.num_captions - 1]
        if not undecided.any():
            return None
        width = min(int(self.open_slots(beam.images)[undecided].max()), beam.log_prob.shape[1])
        if int(undecided.sum()) * width > WORTH_NARROWING * beam.log_prob.numel():
            return beam
        return beam.part(undecided, width)


def exclude(
    log_probs: torch.Tensor, words: torch.Tensor, options: SearchConfig, forbidden: tuple[int, ...]
) -> torch.Tensor:
    """Set the log-probabilities (N, V) of words that may not follow `words` (N, 1 + t) to minus infinity, in place.

    `<eos>` stays possible where nothing else is.
    """
    end = log_probs[:, EOS].clamp(min=-1e9)  # (N,)
    log_probs[:, [*NEVER, *forbidden]] = -INF
    n = options.no_repeat_ngram
    if 0 < n < words.shape[1]:  # words that would complete an n-gram which is already there
        windows = words[:, 1:].unfold(1, n, 1)  # (N, t - n + 1, n)
        tail = words[:, words.shape[1] - n + 1 :].unsqueeze(1)  # (N, 1, n - 1)
        rows, starts = (windows[:, :, :-1] == tail).all(2).nonzero(as_tuple=True)
        log_probs[rows, windows[rows, starts, -1]] = -INF
    if words.shape[1] <= options.min_length:
        log_probs[:, EOS] = -INF
        end = end.where(log_probs.isneginf().all(1), -INF)
    log_probs[:, EOS] = end
    return log_probs


def best_of_beam(
    log_prob: torch.Tensor, log_probs: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Extend each image's hypotheses by the words that make the most probable ones.

    `log_prob` (B, K) is that of the hypotheses so far, `log_probs` (B K, V) are those of each next word, and `slots` is
    how many hypotheses an image may have (B,). Returns the new log_prob (B, K'), and for each its old row and new word.
    """
    images, beam = log_prob.shape
    width = int(slots.max())  # K'
    top, words = log_probs.topk(min(width, log_probs.shape[1]))  # (B K, M): the best K' of all are among these
    each = top.shape[1]
    extended = (log_prob.unsqueeze(2) + top.view(images, beam, each)).flatten(1)  # (B, K M)
    best, index = extended.topk(min(width, extended.shape[1]))  # (B, K')
    best = best.masked_fill(torch.arange(best.shape[1], device=best.device) >= slots.unsqueeze(1), -INF)
    first = beam * torch.arange(images, device=best.device).unsqueeze(1)  # (B, 1)
    return best, (first + index // each).flatten(), words.view(images, -1).gather(1, index).flatten()


def sample(
    log_prob: torch.Tensor, log_probs: torch.Tensor, slots: torch.Tensor, options: SearchConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Extend each hypothesis by a word drawn from the tempered distribution, truncated to its most probable words.

    Top-k: Fan et al. 2018. Top-p (nucleus): the smallest set of words with at least this probability (Holtzman et al.
    2020). Arguments and result are those of `best_of_beam`; the log-probabilities stay the decoder's own.
    """
    tempered = (log_probs - log_probs.amax(1, keepdim=True)) / options.temperature  # (N, V), at most 0
    ordered, order = tempered.sort(dim=1, descending=True)
    probs = ordered.softmax(1)
    excluded = probs.cumsum(1) - probs >= options.top_p
    if options.top_k:
        excluded[:, options.top_k :] = True
    each = max(
        1, int(slots.max()) // log_prob.shape[1]
    )  # all captions start from one `<sos>`; later each draws one word
    drawn = probs.masked_fill(excluded, 0).multinomial(each, replacement=True)  # (N, each) indices into the order
    tokens = order.gather(1, drawn).flatten()  # (N each,)
    rows = torch.arange(len(log_probs), device=tokens.device).repeat_interleave(each)  # (N each,)
    extended = log_prob.flatten()[rows] + log_probs[rows, tokens]
    return extended.view(len(log_prob), -1), rows, tokens
