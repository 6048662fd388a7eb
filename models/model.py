"""CaptionModel: encoder, decoder, vocabulary and transform as one thing. Its file is `models.checkpoint`'s business."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from cli import UserError
from config import Config, SearchConfig, pick
from data.transforms import Transform
from data.vocab import SPECIALS, UNK, Vocabulary
from models import imagenet
from models.attention import AttentionRNN
from models.consensus import Consensus, missing_error
from models.decoder import Decoder, DecoderRNN
from models.encoder import EncoderCNN, transform_for
from models.search import Hypothesis, search
from models.transformer import TransformerDecoder
from utils import pick_precision

DECODERS: dict[str, type[Decoder]] = {"lstm": DecoderRNN, "attention": AttentionRNN, "transformer": TransformerDecoder}


SEEN = 0.3  # probability from which a class counts, chosen on dev


@dataclass(frozen=True)
class Caption:
    """A decoded caption: its text, its words, and the scores of its hypothesis; see `models.search.Hypothesis`."""

    text: str
    words: tuple[str, ...]
    log_prob: float
    score: float
    attention: torch.Tensor | None = None


class CaptionModel(nn.Module):
    """From features, or pixels, to captions. `models.checkpoint.load_model(path)` returns a trained one."""

    feature_mean: torch.Tensor  # (D,)
    feature_scale: torch.Tensor  # (1,)

    def __init__(
        self, config: Config, vocab: Vocabulary, transform: Transform, encoder: EncoderCNN, decoder: Decoder
    ) -> None:
        super().__init__()
        self.config, self.vocab, self.transform = config, vocab, transform
        self.encoder, self.decoder = encoder, decoder
        self.consensus: Consensus | None = None  # ranks a beam's captions where `search.consensus` asks for it
        self.register_buffer("feature_mean", torch.zeros(encoder.feature_shape[-1]))
        self.register_buffer("feature_scale", torch.ones(1))

    @classmethod
    def build(cls, config: Config, vocab: Vocabulary) -> "CaptionModel":
        """Return a model with a pretrained encoder and a random decoder, drawn from `train.seed`."""
        torch.manual_seed(config.train.seed)
        decoder_class = decoder_class_of(config)
        encoder = EncoderCNN(config.encoder, spatial=decoder_class.spatial)
        decoder = decoder_class(config.decoder, encoder.feature_shape[-1], len(vocab))
        return cls(config, vocab, transform_for(config.encoder), encoder, decoder)

    @property
    def device(self) -> torch.device:
        return self.feature_mean.device

    @property
    def precision(self) -> torch.dtype:
        """The precision of `train.precision` on the model's device."""
        return pick_precision(self.config.train.precision, self.device)

    def autocast(self) -> torch.autocast:
        """Return the context in which the decoder is trained: bfloat16 where that is the precision."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)

    def fit_statistics(self, features: torch.Tensor) -> None:
        """Set what `standardise` needs from the features of P training pictures (P, D) or (P, L, D), on any device."""
        parts = features.flatten(0, -2).split(8192)  # (P or P L, D), as floats a few at a time, since grids are large
        rows = sum(map(len, parts))
        mean = sum((part.float().sum(0) for part in parts), torch.zeros(())) / rows  # (D,)
        squares = sum(((part.float() - mean).square().mean(1).sum() for part in parts), torch.zeros(()))
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_((squares / rows).sqrt().clamp(min=1e-6))

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Centre features (…, D) on their mean over training pictures and scale them to a mean variance of 1.

        A backbone's features are positive, with a large common part that hides what tells pictures apart. One scale for
        all of them keeps the strong ones strong; a scale for each would amplify the noise of the weak ones.
        """
        return (features.float() - self.feature_mean) / self.feature_scale

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """Return standardised features (B, D) or (B, L, D), given raw ones or uint8 pixels (B, 3, S, S)."""
        if features.dtype == torch.uint8:
            features = self.encoder(self.transform.normalise(features))
        return self.standardise(features)

    def forward(
        self, features: torch.Tensor, tokens: torch.Tensor, image_index: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher forcing: return the hidden states (N, T, H) and alphas (N, T, A, L) or None; see `Decoder.forward`.

        The features are raw ones, or uint8 pixels (B, 3, S, S).
        """
        return self.decoder(self.encode(features), tokens, image_index)

    def generate(
        self,
        features: torch.Tensor,
        options: SearchConfig | None = None,
        num_captions: int = 1,
        keep_attention: bool = False,
    ) -> list[list[Caption]]:
        """Return the best captions for each row of raw features (B, D) or (B, L, D), the best first.

        `options` default to the model's own; see `models.search.search`. Raises UserError for an entry of
        `search.forbidden` that is several words, for a `search.consensus` without consensus.pth, for `search.classes`
        without a classifier, and when the model's numbers are not finite.
        """
        options = options or self.config.search
        rank = options.by_consensus(num_captions)
        if rank and self.consensus is None:
            raise missing_error(options.consensus)
        wanted = max(num_captions, options.beam) if rank else num_captions
        standardised, forbidden = self.standardise(features.to(self.device)), self.forbidden_ids(options.forbidden)
        bonus = self.class_bonus(features, options.classes) if options.classes and not options.temperature else None
        found = search(self.decoder, standardised, options, wanted, forbidden, keep_attention, bonus)
        if not all(found):
            raise UserError("the model's scores are NaN or infinite, so that it writes nothing; use another checkpoint")
        if rank and self.consensus:
            found = [each[:num_captions] for each in self.consensus.rank(features, found, options.consensus)]
        return [[self.caption(hypothesis) for hypothesis in hypotheses] for hypotheses in found]

    def caption(self, hypothesis: Hypothesis) -> Caption:
        words = tuple(self.vocab.words[i] for i in hypothesis.ids)
        text = self.vocab.decode(hypothesis.ids)
        return Caption(text, words, hypothesis.log_prob, hypothesis.score, hypothesis.attention)

    def class_bonus(self, features: torch.Tensor, weight: float) -> torch.Tensor:
        """Return what `search.classes` adds to the log-probability of each word (B, V): `weight` times the probability
        that the picture shows what it names, by the backbone's own classifier, where that is at least SEEN.
        """
        probs = self.encoder.classify(features.to(self.device))  # (B, 1000)
        if probs is None:
            raise UserError(
                f"search.classes = {weight:g} needs ImageNet's classifier, which {self.config.encoder.name} with these "
                "weights has not; set it to 0"
            )
        seen = probs.new_zeros(len(probs), len(self.vocab)).index_add(1, self.class_words, probs)  # (B, V)
        seen[:, : len(SPECIALS)] = 0  # words that the vocabulary does not have
        return weight * seen.where(seen >= SEEN, 0)

    @cached_property
    def class_words(self) -> torch.Tensor:
        """The vocabulary's id of each class in a plain word (1000,): that of `<unk>` where it has no such word."""
        ids = [self.vocab.numericalize(word) for word in imagenet.plain_words()]
        return torch.tensor([each[0] if len(each) == 1 else UNK for each in ids], device=self.device)

    def forbidden_ids(self, words: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of words that are not to be written; raises UserError for an entry that is several words."""
        ids = {word: self.vocab.numericalize(word) for word in words}
        for word, found in ids.items():
            if len(found) > 1:
                raise UserError(f"search.forbidden has '{word:.60}', which is more than one word; forbid single words")
        return tuple(i for found in ids.values() for i in found)


def decoder_class_of(config: Config) -> type[Decoder]:
    """Return the class that `decoder.name` names; raises UserError for an unknown one, or one without attention where
    the loss needs it.
    """
    decoder_class = pick(DECODERS, config.decoder.name, "decoder.name")
    if config.train.doubly_stochastic and not decoder_class.spatial:
        raise UserError("train.doubly_stochastic needs a decoder with attention; set it to 0, or change decoder.name")
    return decoder_class
