"""The file a trained model is kept in: what it holds, and a model built from it again.

A checkpoint holds plain values and tensors only: config, vocabulary, transform, trained tensors, and the backbone's
identity. A frozen backbone itself is not inside; it is found again by its sha256.
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, ValidationError
from torch import nn

from cli import UserError, say
from config import SHAPES, Config, Section, flatten, marked, restore_config
from data.transforms import Transform
from data.vocab import Vocabulary
from models import consensus
from models.compact_consensus import CompactConsensus
from models.confidence import INPUTS, Confidence
from models.consensus import Consensus
from models.encoder import EncoderCNN, file_sha256, find_weights, without_random_weights
from models.hub import is_on_hub, read_checkpoint
from models.model import CaptionModel, decoder_class_of
from models.saved import SavedConfidence, SavedEncoder, SavedTransform, SavedVocabulary
from utils import RUNS, how_to_make


class SavedModel(Section):
    """What a file says of its model, as plain values; what they mean is checked where they are used."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    config: dict[str, dict[str, Any] | str]
    vocabulary: SavedVocabulary
    transform: SavedTransform
    encoder: SavedEncoder
    backbone: dict[str, torch.Tensor] | None
    feature_mean: torch.Tensor
    feature_scale: torch.Tensor
    decoder: dict[str, torch.Tensor]


def model_state(model: CaptionModel) -> dict[str, Any]:
    """Return a model as plain values and tensors.

    The backbone's tensors are among them only where they cannot be found again: random or fine-tuned ones.
    """
    inside = not model.config.encoder.frozen or model.encoder.identity["source"] is None
    return {
        "config": model.config.model_dump(),
        "vocabulary": {"words": model.vocab.words, "language": model.vocab.language},
        "transform": asdict(model.transform),
        "encoder": model.encoder.identity,
        "backbone": model.encoder.backbone.state_dict() if inside else None,
        "feature_mean": model.feature_mean,
        "feature_scale": model.feature_scale,
        "decoder": model.decoder.state_dict(),
    }


def load_model(path: str | Path, overrides: list[str] | None = None, token: str | None = None) -> CaptionModel:
    """Return the trained model in a file, or in hf://user/name, in eval mode, with its consensus: that inside, or the
    consensus.pth beside it where its search uses that. `token` is the Hub's, see `models.hub.download`.

    Raises UserError when the file is damaged, or when its frozen backbone cannot be found again unchanged.
    """
    saved = read_checkpoint(path, token)
    model = model_from_state(saved, str(path), overrides).eval()
    model.confidence = restore_confidence(saved, path)
    if saved.get("consensus") is not None:
        model.consensus = restore_consensus(saved["consensus"], model, path)
        return model
    weight, beside = model.config.search.consensus, Path(path).with_name(consensus.FILE)
    if weight and not is_on_hub(path) and beside.is_file():
        model.consensus = Consensus.load(beside, model.encoder.feature_shape[-1], len(model.vocab))
    elif weight and any(word.startswith("search.consensus=") for word in overrides or []):
        raise consensus.missing_error(weight)
    elif weight:
        lacking = (
            f"{path} has none inside" if is_on_hub(path) else f"there is no {beside}, which training writes at its end"
        )
        say(f"searching without consensus: {lacking}")
        search = model.config.search.model_copy(update={"consensus": 0.0})
        model.config = model.config.model_copy(update={"search": search})
    return model


def model_from_state(saved: dict[str, Any], where: str, overrides: list[str] | None = None) -> CaptionModel:
    """Return the model whose `model_state` was `saved`; `where` names its file in errors."""
    check_parts(saved, where)
    saved = convert_floats(saved, torch.float16, torch.float32)
    config = restore_config(saved["config"], overrides, where)
    vocab, decoder_class = Vocabulary(**saved["vocabulary"]), decoder_class_of(config)

    # the decoder, before anything as large as a backbone is built
    mean, scale = saved["feature_mean"], saved["feature_scale"]  # (D,), (1,)
    statistics = {"feature_mean": torch.zeros(mean.numel()), "feature_scale": torch.ones(1)}
    check_tensors(statistics, {"feature_mean": mean, "feature_scale": scale}, where)
    if not scale > 0:
        raise UserError(f"{where} holds a feature_scale that is not positive; take another checkpoint")
    with torch.device("meta"), without_random_weights():
        decoder = decoder_class(config.decoder, len(mean), len(vocab))
    check_tensors(decoder.state_dict(), saved["decoder"], where)
    decoder.load_state_dict({name: tensor.contiguous() for name, tensor in saved["decoder"].items()}, assign=True)

    encoder = restore_encoder(config, saved, decoder_class.spatial, where)
    if encoder.feature_shape[-1] != len(mean):
        raise UserError(f"the tensor feature_mean in {where} does not fit its config; take another checkpoint")
    model = CaptionModel(config, vocab, Transform(**saved["transform"]), encoder, decoder)
    model.feature_mean, model.feature_scale = mean, scale
    return model


def restore_consensus(state: dict[str, torch.Tensor], model: CaptionModel, path: str | Path) -> CompactConsensus:
    """Return the consensus inside a checkpoint; raises UserError for a damaged one."""
    size, words = model.encoder.feature_shape[-1], len(model.vocab)
    whole = convert_floats(state, torch.float16, torch.float32)
    found = CompactConsensus.restore(whole, size, words) if isinstance(state, dict) else None
    if found is None:
        raise UserError(f"the consensus inside {path} is damaged; take another checkpoint")
    return found


def restore_confidence(saved: dict[str, Any], path: str | Path) -> Confidence | None:
    """Return the calibration inside a checkpoint, if any; raises UserError for a damaged one."""
    if saved.get("confidence") is None:
        return None
    with contextlib.suppress(ValidationError):
        state = SavedConfidence.model_validate(saved["confidence"])
        if len(state.weights) == len(INPUTS):
            return Confidence(tuple(state.weights), state.bias)
    raise UserError(f"the calibration inside {path} is damaged; make it anew with: python calibrate.py")


def model_from_start(config: Config) -> CaptionModel:
    """Return a model of this `config` that starts from the one in `train.start`.

    Raises UserError, naming them, for settings that would give it other shapes.
    """
    path = str(config.train.start)
    found = is_on_hub(path) or Path(path).is_file()
    if not found and (Path(__file__).parents[1] / path).is_file():  # pretrained/captioner.pth
        path, found = str(Path(__file__).parents[1] / path), True
    if not found:
        run = Path(path).parent
        make = f"make it with: {how_to_make(run.name)}, or name another one" if run.parent == RUNS else "check the path"
        raise UserError(f"there is no checkpoint at train.start = {path}; {make}")
    saved = read_checkpoint(path)
    check_parts(saved, path)
    there, here = (flatten(each.model_dump()) for each in (restore_config(saved["config"], where=path), config))
    differ = sorted(name for name in marked(SHAPES) if there[name] != here[name])
    if differ:
        values = [there[name] if isinstance(there[name], str) else json.dumps(there[name]) for name in differ]
        mend = " ".join(f"{name}={value}" for name, value in zip(differ, values, strict=True))
        raise UserError(
            f"train.start = {path} was trained with another {', '.join(differ)}; start from it with: {mend}"
        )
    return model_from_state(saved | {"config": config.model_dump()}, path)


def restore_encoder(config: Config, saved: dict[str, Any], spatial: bool, where: str) -> EncoderCNN:
    """Return the encoder of a checkpoint: its own backbone where it holds one, else the one with its sha256."""
    identity = saved["encoder"]
    if saved["backbone"] is not None:

        def fill(backbone: nn.Module) -> None:
            check_tensors(backbone.state_dict(), saved["backbone"], where)
            backbone.load_state_dict(saved["backbone"])

        encoder = EncoderCNN(config.encoder, spatial, fill=fill)
        encoder.identity = identity | {"source": None, "sha256": encoder.identity["sha256"]}  # as fine-tuned
        return encoder
    weights, source = config.encoder.weights, identity["source"]
    if source and weights == flatten(saved["config"]).get("encoder.weights") and Path(source).is_file():
        weights = source
    if not source or not weights:
        raise UserError(f"{where} neither holds its backbone nor says which file it is from; take another checkpoint")
    own = config.encoder.model_copy(update={"weights": weights})
    file = find_weights(own)
    if file_sha256(file) != identity["sha256"]:  # before a network is built, which may be huge
        raise UserError(
            f"{where} was trained on other backbone weights than {file} (another sha256); "
            f"give the file that was {source} with encoder.weights=FILE"
        )
    return EncoderCNN(own, spatial)


def convert_floats(values: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Return a checkpoint with its tensors of one precision in another: `models.publish` halves what is given away."""
    if isinstance(values, dict):
        return {name: convert_floats(value, before, after) for name, value in values.items()}
    return values.to(after) if isinstance(values, torch.Tensor) and values.dtype == before else values


def check_parts(saved: dict[str, Any], where: str) -> None:
    """Raise UserError for a file of this project that holds no model, such as consensus.pth, and for parts that are not
    what they should be.
    """
    for missing in (part for part in SavedModel.model_fields if part not in saved):
        raise UserError(f"{where} lacks its {missing}, so it is not a trained model; take another one")
    try:
        SavedModel.model_validate({part: saved[part] for part in SavedModel.model_fields})
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"the value of {place:.60} in {where} is none that training writes; take another checkpoint"
        ) from None


def check_tensors(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError unless the tensors `found` in the file `where` are finite and `own`'s by name and shape."""
    for name in sorted(own.keys() | found.keys(), key=str):
        kinds = [(part[name].shape, part[name].dtype) if name in part else None for part in (own, found)]
        if kinds[0] != kinds[1]:
            raise UserError(f"the tensor {name:.60} in {where} does not fit its config; take another checkpoint")
        if not found[name].isfinite().all():
            raise UserError(f"{where} holds NaN or infinite weights, first in {name}; take another checkpoint")
