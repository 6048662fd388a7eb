"""CaptionModel: encoder, decoder, vocabulary and transform as one thing. Its file is `models.checkpoint`'s business."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module

import torch
from torch import nn

from cli import UserError
from config import Config, SearchConfig, pick
from data.transforms import Transform
from data.vocab import SPECIALS, UNK, Vocabulary
from models import imagenet
from models.attention import AttentionRNN
from models.confidence import LIKELY, MOST_NAMED, UNSURE, Confidence, evidence, names
from models.consensus import Expectation, missing_error
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
    confidence: float | None = None  # the chance that it is right, where the model is calibrated
    perhaps: tuple[str, ...] = ()  # likely things in the picture that an unsure caption does not name


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
        self.consensus: Expectation | None = None  # ranks a beam's captions where `search.consensus` asks for it
        self.confidence: Confidence | None = None  # says how sure captions are, once `calibrate.py` has run
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

    @classmethod
    def from_pretrained(
        cls, name: str, revision: str | None = None, token: str | None = None, overrides: list[str] | None = None
    ) -> "CaptionModel":
        """Return the trained model in the repository user/name of the Hugging Face Hub, in eval mode; see `models.hub`.

        `overrides` are settings such as "search.beam=3". Raises UserError for one that cannot be had or used.
        """
        name = f"hf://{name.removeprefix('hf://')}" + (f"@{revision}" if revision else "")
        return import_module("models.checkpoint").load_model(name, overrides, token)  # by name: it imports this module

    def push_to_hub(
        self, name: str, revision: str | None = None, token: str | None = None, private: bool | None = None
    ) -> str:
        """Put what `models.publish` makes of the model into user/name on the Hugging Face Hub; returns its address.

        A new repository is public unless `private`, and gets a model card. Raises UserError where that is refused.
        """
        name = f"hf://{name.removeprefix('hf://')}" + (f"@{revision}" if revision else "")
        return import_module("models.publish").push(self, name, private=private, token=token)

    @property
    def device(self) -> torch.device:
        return self.feature_mean.device

    @property
    def precision(self) -> torch.dtype:
        """The precision of `train.precision` on the model's device."""
        return pick_precision(self.config.train.precision, self.device)

    @property
    def encoder_precision(self) -> torch.dtype:
        """The precision of `encoder.precision`; 8 bits are for processors alone."""
        return torch.int8 if self.config.encoder.precision == "int8" and self.device.type == "cpu" else self.precision

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
        found, probs = self.find(features, options, num_captions, keep_attention)
        captions = [[self.caption(hypothesis) for hypothesis in hypotheses] for hypotheses in found]
        if self.confidence:
            chances = iter(self.confidence.chances(self.evidence(found, probs, options)))
            for row, (own, hypotheses) in enumerate(zip(captions, found, strict=True)):
                for number, hypothesis in enumerate(hypotheses):
                    chance = next(chances)
                    unsure = chance is not None and chance < UNSURE
                    perhaps = self.perhaps(hypothesis, probs[row]) if unsure and probs is not None else ()
                    own[number] = replace(own[number], confidence=chance, perhaps=perhaps)
        return captions

    def find(
        self, features: torch.Tensor, options: SearchConfig, num_captions: int = 1, keep_attention: bool = False
    ) -> tuple[list[list[Hypothesis]], torch.Tensor | None]:
        """Return the best hypotheses for each row of raw features, see `generate`, and the probabilities of ImageNet's
        classes (B, 1000) where the backbone has its classifier, on the processor.
        """
        rank = options.by_consensus(num_captions)
        if rank and self.consensus is None:
            raise missing_error(options.consensus)
        wanted = max(num_captions, options.beam) if rank else num_captions
        features = features.to(self.device)
        standardised, forbidden = self.standardise(features), self.forbidden_ids(options.forbidden)
        probs = self.encoder.classify(features)
        probs = None if probs is None else probs.cpu()
        bonus = self.class_bonus(probs, options.classes) if options.classes and not options.temperature else None
        found = search(self.decoder, standardised, options, wanted, forbidden, keep_attention, bonus)
        if not all(found):
            raise UserError("the model's scores are NaN or infinite, so that it writes nothing; use another checkpoint")
        if self.consensus:
            found = self.consensus.rank(features, found, options.consensus if rank else 0)
        return [each[:num_captions] for each in found], probs

    def caption(self, hypothesis: Hypothesis) -> Caption:
        words = tuple(self.vocab.words[i] for i in hypothesis.ids)
        text = self.vocab.decode(hypothesis.ids)
        return Caption(text, words, hypothesis.log_prob, hypothesis.score, hypothesis.attention)

    def evidence(
        self, found: list[list[Hypothesis]], probs: torch.Tensor | None, options: SearchConfig
    ) -> torch.Tensor:
        """Return what a confidence in hypotheses is estimated from (N, 4), given what `find` returns."""
        kinds = torch.zeros(len(found), len(self.kind_words)) if probs is None else self.kinds(probs)  # (B, K)
        return evidence(found, options.max_length, kinds, self.kind_words)

    def perhaps(self, hypothesis: Hypothesis, probs: torch.Tensor) -> tuple[str, ...]:
        """Return the likely things in a picture that its caption does not name, given ImageNet's classes (1000,)."""
        (kinds,) = self.kinds(probs.unsqueeze(0))  # (K,)
        likely = kinds.masked_fill(names(hypothesis, self.kind_words), 0).topk(MOST_NAMED)
        pairs = zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
        return tuple(imagenet.name_of_kind(kind, probs) for prob, kind in pairs if prob >= LIKELY)

    def class_bonus(self, probs: torch.Tensor | None, weight: float) -> torch.Tensor:
        """Return what `search.classes` adds to the log-probability of each word (B, V): `weight` times the probability
        that the picture shows what it names, where that is at least SEEN, given those of ImageNet's classes (B, 1000).
        """
        if probs is None:
            raise UserError(
                f"search.classes = {weight:g} needs ImageNet's classifier, which {self.config.encoder.name} with these "
                "weights has not; set it to 0"
            )
        seen = torch.zeros(len(probs), len(self.vocab)).index_add(1, self.kind_words, self.kinds(probs))  # (B, V)
        seen[:, : len(SPECIALS)] = 0  # words that the vocabulary does not have
        return weight * seen.where(seen >= SEEN, 0).to(self.device)

    def kinds(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the probability of each kind of thing (B, K), given those of ImageNet's classes (B, 1000): zeros where
        the vocabulary is not English.
        """
        kinds = torch.zeros(len(probs), len(self.kind_words))
        known = bool((self.kind_words != UNK).any())
        return kinds.index_add(1, imagenet.kind_of_class(), probs.float()) if known else kinds

    @cached_property
    def kind_words(self) -> torch.Tensor:
        """The vocabulary's id of each kind's word (K,): that of `<unk>` where it has no such word."""
        return torch.tensor(self.vocab.look_up(imagenet.kinds()))

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
