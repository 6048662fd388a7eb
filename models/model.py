"""CaptionModel: encoder, decoder, vocabulary and transform as one thing, and the file it is kept in."""

from cli import UserError

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

import distributed
from config import Config, SearchConfig, change_search, flatten, restore_config
from data.dataset import Features
from data.features import Extractor
from data.transforms import Transform, open_picture, upright
from data.vocab import Vocabulary
from models.attention import AttentionRNN
from models.consensus import Consensus
from models.contents import check
from models.decoder import Decoder, DecoderRNN
from models.encoder import EncoderCNN, tensors_sha256, transform_for
from models.search import Hypothesis, search
from models.transformer import TransformerDecoder
from utils import load_checkpoint

DECODERS: dict[str, type[Decoder]] = {"lstm": DecoderRNN, "attention": AttentionRNN, "transformer": TransformerDecoder}
# What a model's tensors depend on: one that goes on from another has to agree with it in these.
SHAPING = (
    *("data.language", "encoder.name", "encoder.stride_in_1x1", "encoder.image_size", "decoder.name"),
    *("decoder.embed_size", "decoder.hidden_size", "decoder.num_layers", "decoder.num_heads", "decoder.encoder_layers"),
)
LEAST_PART = 1 / 40  # of a classifier's weights are its backbone's: AlexNet has 1 / 25
Picture = str | os.PathLike[str] | Image.Image
CAPTION_BATCH = 160  # pictures searched together: fewer waste calls, and beams of more overflow a processor's cache


@dataclass(frozen=True)
class Caption:
    """A caption for people, with what the search knows of it; see `models.search.Hypothesis`."""

    text: str
    words: tuple[str, ...]
    log_prob: float
    score: float
    attention: torch.Tensor | None = None


class CaptionModel(nn.Module):
    """From pictures to captions.

    `CaptionModel.build(config, vocab)` makes an untrained one, `CaptionModel.from_checkpoint(path)` a trained one;
    the checkpoint is all it takes.
    """

    def __init__(
        self, config: Config, vocab: Vocabulary, transform: Transform, encoder: EncoderCNN, decoder: Decoder
    ) -> None:
        super().__init__()
        self.config, self.vocab, self.transform = config, vocab, transform
        self.encoder, self.decoder = encoder, decoder
        self.consensus: Consensus | None = None  # fitted at the end of training, where `search.consensus` asks for it
        size = encoder.feature_shape[-1]
        self.feature_mean: torch.Tensor
        self.feature_scale: torch.Tensor
        self.register_buffer("feature_mean", torch.zeros(size))
        self.register_buffer("feature_scale", torch.ones(1))

    @classmethod
    def build(cls, config: Config, vocab: Vocabulary) -> "CaptionModel":
        """Return a model with pretrained encoder and random decoder, drawn from `train.seed`."""
        torch.manual_seed(config.train.seed)
        kind = decoder_of(config)
        encoder = EncoderCNN(config.encoder, grid=kind.grid)
        decoder = kind(config.decoder, encoder.feature_shape[-1], len(vocab))
        return cls(config, vocab, transform_for(config.encoder), encoder, decoder)

    @classmethod
    def from_checkpoint(cls, path: str | Path, overrides: list[str] | None = None) -> "CaptionModel":
        """Return the trained model in the file `path`, in eval mode.

        Raises UserError when the file is damaged, or when its frozen backbone cannot be found again unchanged.
        """
        return cls.from_state(load_checkpoint(path), str(path), overrides).eval()

    @classmethod
    def from_state(cls, saved: dict[str, Any], where: str, overrides: list[str] | None = None) -> "CaptionModel":
        """Return the model whose `state()` was `saved`; `where` names its file in errors."""
        check(saved, where)
        saved = to_float32(saved)
        config = restore_config(saved["config"], overrides, where)
        vocab = Vocabulary(**saved["vocabulary"])
        kind = decoder_of(config)
        encoder = restore_encoder(config, saved, kind.grid, where)
        size = encoder.feature_shape[-1]
        with torch.device("meta"):
            decoder = kind(config.decoder, size, len(vocab))
        check_tensors(decoder.state_dict(), saved["decoder"], where)
        decoder.load_state_dict(saved["decoder"], assign=True)
        model = cls(config, vocab, Transform(**saved["transform"]), encoder, decoder)
        statistics = {name: saved[name] for name in ("feature_mean", "feature_scale")}
        check_tensors({name: getattr(model, name) for name in statistics}, statistics, where)
        model.feature_mean, model.feature_scale = statistics.values()
        if saved.get("consensus"):
            model.consensus = Consensus.from_state(saved["consensus"], size, len(vocab), where)
        return model

    @classmethod
    def from_start(cls, config: Config, path: str) -> "CaptionModel":
        """Return a model of this `config` that has learned all that the one in the file `path` has.

        Raises UserError, naming them, for settings that would give it other shapes.
        """
        saved = load_checkpoint(path)
        check(saved, path)
        own, asked = (flatten(each.model_dump()) for each in (restore_config(saved["config"], where=path), config))
        differ = [name for name in SHAPING if own[name] != asked[name]]
        if differ:
            values = ", ".join(f"{name} ({as_yaml(own[name])} there, {as_yaml(asked[name])} here)" for name in differ)
            mend = " ".join(f"{name}={as_yaml(own[name])}" for name in differ)
            raise UserError(f"train.start = {path} was trained with another {values}; go on from it with: {mend}")
        return cls.from_state(saved | {"config": config.model_dump(), "consensus": None}, path)

    def state(self) -> dict[str, Any]:
        """Return the model as plain values and tensors.

        The backbone's tensors are among them only where they cannot be found again: random or fine-tuned ones.
        """
        inside = not self.config.encoder.frozen or self.encoder.identity["source"] is None
        return {
            "config": self.config.model_dump(),
            "vocabulary": self.vocab.state(),
            "transform": asdict(self.transform),
            "encoder": self.encoder.identity,
            "backbone": self.encoder.backbone.state_dict() if inside else None,
            "feature_mean": self.feature_mean,
            "feature_scale": self.feature_scale,
            "decoder": self.decoder.state_dict(),
            "consensus": self.consensus.state() if self.consensus else None,
        }

    def standardise(self, features: torch.Tensor) -> torch.Tensor:
        """Centre features (…, D) on their mean over training pictures and scale them to variance 1 on average.

        Backbones give positive features with a large common part, which drowns what tells pictures apart. One scale for
        all keeps the strong features strong; a scale for each would blow up the noise of the weak ones.
        """
        return (features.float() - self.feature_mean) / self.feature_scale

    def fit_statistics(self, features: torch.Tensor) -> None:
        """Set what `standardise` needs from the features of P training pictures (P, D) or (P, L, D), on any device."""
        parts = features.flatten(0, -2).split(8192)  # (P or P L, D), in floats a few at a time: grids are large
        cells = sum(map(len, parts))
        mean = sum((part.float().sum(0) for part in parts), torch.zeros(())) / cells  # (D,)
        squares = sum(((part.float() - mean).square().mean(1).sum() for part in parts), torch.zeros(()))
        self.feature_mean.copy_(mean)
        self.feature_scale.copy_((squares / cells).sqrt().clamp(min=1e-6))

    def forward(
        self, pictures: torch.Tensor, tokens: torch.Tensor, owner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Teacher forcing: return the decoder's hidden states (N, T, H) and attention (N, T, A, L).

        `pictures` are features (B, D) or (B, L, D), or uint8 pixels (B, 3, S, S); `owner` (N,) their row per caption.
        """
        return self.decoder.hidden(self.encode(pictures), tokens, owner)

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return what the decoder reads: standardised features (B, D) or (B, L, D) of features or uint8 pixels."""
        if pictures.dtype == torch.uint8:
            pictures = self.encoder(self.transform.normalise(pictures))
        return self.standardise(pictures)

    def describe(
        self,
        features: torch.Tensor,
        options: SearchConfig | None = None,
        num_captions: int = 1,
        keep_attention: bool = False,
    ) -> list[list[Caption]]:
        """Return the best captions for each row of encoded pictures (B, D) or (B, L, D), the best first.

        `options` default to the checkpoint's own; see `models.search.search`. Raises UserError for words of
        `search.forbidden` that are several, for a `search.consensus` without what it asks, and when the model's
        numbers are not finite.
        """
        options = options or self.config.search
        consensus = self.asked_consensus(options, num_captions)
        device = next(self.decoder.parameters()).device
        standardised = self.standardise(features.to(device))
        wanted = max(num_captions, options.beam) if consensus else num_captions
        found = search(self.decoder, standardised, options, wanted, self.forbidden(options.forbidden), keep_attention)
        if not all(found):
            raise UserError("the model's scores are NaN or infinite, so that it writes nothing; use another checkpoint")
        if consensus:
            found = [each[:num_captions] for each in consensus.rank(features, found, options.consensus)]
        return [[self.read_out(hypothesis) for hypothesis in each] for each in found]

    def asked_consensus(self, options: SearchConfig, num_captions: int = 1) -> Consensus | None:
        """Return what ranks a beam's captions, where `search.consensus` asks for it; raises UserError without it."""
        if not options.by_consensus(num_captions):
            return None
        if self.consensus is None:
            raise UserError(
                f"search.consensus = {options.consensus:g} compares captions with those of training pictures, which "
                "this checkpoint does not hold; set it to 0, or add them, where its run and data are: python train.py "
                f"--resume --run NAME search.consensus={options.consensus:g}"
            )
        return self.consensus

    def forbidden(self, words: Sequence[str]) -> tuple[int, ...]:
        """Return the ids of words that are not to be written; raises UserError for what is cut into several."""
        ids = {word: self.vocab.numericalize(word) for word in words}
        for word, found in ids.items():
            if len(found) > 1:
                raise UserError(f"search.forbidden has '{word:.60}', which are several words; forbid one of them")
        return tuple(i for found in ids.values() for i in found)

    def read_out(self, hypothesis: Hypothesis) -> Caption:
        words = tuple(self.vocab.words[i] for i in hypothesis.ids)
        return Caption(
            self.vocab.decode(hypothesis.ids), words, hypothesis.log_prob, hypothesis.score, hypothesis.attention
        )

    def caption(self, images: Picture | Iterable[Picture], **settings: Any) -> list[str]:
        """Return a caption of each of these pictures, files or opened ones, or of the one.

        `settings` are those of `search` in config.yaml, such as beam=3 or length_penalty=1, in place of the
        checkpoint's own. Each call first makes a fast copy of the encoder: give it many pictures rather than one.

        Raises UserError for a setting that is none, and for a file that cannot be read.
        """
        options = change_search(self.config, settings).search
        pictures = [images] if isinstance(images, str | os.PathLike | Image.Image) else list(images)
        extractor = Extractor(self, next(self.decoder.parameters()).device)
        captions = []
        for first in range(0, len(pictures), CAPTION_BATCH):
            batch = pictures[first : first + CAPTION_BATCH]
            openers = [
                partial(upright, each) if isinstance(each, Image.Image) else partial(open_picture, Path(each))
                for each in batch
            ]
            features = torch.cat([extractor(pixels) for pixels in extractor.read(openers)])
            captions += [best.text for best, *_ in self.describe(features, options)]
        return captions

    def caption_all(
        self, features: Features, names: Sequence[str], options: SearchConfig | None = None
    ) -> dict[str, str]:
        """Return a caption for each of the pictures `names` among `features`; several processes share the work."""
        mine, captions = distributed.share(names), dict[str, str]()
        with tqdm(total=len(mine), desc="captioning", unit="img", disable=distributed.bar_hidden()) as bar:
            for first in range(0, len(mine), CAPTION_BATCH):
                batch = mine[first : first + CAPTION_BATCH]
                best = self.describe(features.take(batch), options)
                captions |= {name: each[0].text for name, each in zip(batch, best, strict=True)}
                bar.update(len(batch))
        found = dict(distributed.gather(list(captions.items())))
        return {name: found[name] for name in names}


def decoder_of(config: Config) -> type[Decoder]:
    """Return the class that `decoder.name` names; raises UserError where there is none, or one that cannot attend."""
    kind = DECODERS.get(config.decoder.name)
    if kind is None:
        raise UserError(f"decoder.name = {config.decoder.name:.60} is no decoder; take one of: {', '.join(DECODERS)}")
    if config.train.doubly_stochastic and not kind.grid:
        raise UserError("train.doubly_stochastic is for decoders with attention; set it to 0 or another decoder.name")
    return kind


def to_float32(values: Any) -> Any:
    """Return a checkpoint with its halves as floats: `models.publish` halves what is given away."""
    if isinstance(values, dict):
        return {name: to_float32(value) for name, value in values.items()}
    return values.float() if isinstance(values, torch.Tensor) and values.dtype == torch.float16 else values


def restore_encoder(config: Config, saved: dict[str, Any], grid: bool, where: str) -> EncoderCNN:
    identity = saved["encoder"]
    if saved["backbone"] is not None:
        refuse_small(saved["backbone"], config.encoder.name, where)
        encoder = EncoderCNN(config.encoder, grid, load=False)
        check_tensors(encoder.backbone.state_dict(), saved["backbone"], where)
        encoder.backbone.load_state_dict(saved["backbone"])
        encoder.identity = identity | {"source": None, "sha256": tensors_sha256(encoder.backbone)}  # what it has become
        return encoder
    weights = config.encoder.weights
    source = identity["source"]
    if source and weights == saved["config"]["encoder"].get("weights") and Path(source).is_file():
        weights = source
    encoder = EncoderCNN(config.encoder.model_copy(update={"weights": weights}), grid)
    if encoder.identity["sha256"] != identity["sha256"]:
        raise UserError(
            f"{where} was trained on other backbone weights than {encoder.identity['source']} (another sha256); "
            f"give the file that was {identity['source']} with encoder.weights=FILE"
        )
    return encoder


def as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def refuse_small(backbone: dict[str, torch.Tensor], name: str, where: str) -> None:
    """Raise UserError rather than build a huge network for a file that cannot hold it."""
    if name in torchvision.models.list_models(torchvision.models):
        whole = torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"]  # with its classifier
        if sum(tensor.numel() for tensor in backbone.values()) < LEAST_PART * whole:
            raise UserError(f"{where} holds less than a {name}; take another checkpoint")


def check_tensors(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError unless the tensors `found` in the file `where` are finite and `own`'s by name and shape."""
    shapes, found_shapes = ({name: (each.shape, each.dtype) for name, each in part.items()} for part in (own, found))
    if shapes != found_shapes:
        names = sorted(name for name in own.keys() | found.keys() if shapes.get(name) != found_shapes.get(name))
        raise UserError(
            f"the tensors in {where} do not fit its config (first: {names[0]:.60}); take another checkpoint"
        )
    poisoned = sorted(name for name, tensor in found.items() if not tensor.isfinite().all())
    if poisoned:
        raise UserError(f"{where} holds NaN or infinite weights (first: {poisoned[0]}); take another checkpoint")
