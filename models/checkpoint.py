"""The file a trained model is kept in: what it holds, and a model built from it again.

A checkpoint holds plain values and tensors only: config, vocabulary, transform, trained tensors, and the backbone's
identity. A frozen backbone itself is not inside; it is found again by its sha256.
"""

from cli import UserError

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torchvision
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from config import SHAPES, Config, flatten, marked, restore_config
from data.transforms import Transform
from data.vocab import Vocabulary
from models import consensus
from models.consensus import Consensus
from models.encoder import EncoderCNN, tensors_sha256
from models.model import CaptionModel, decoder_class_of
from utils import load_checkpoint

LEAST_SHARE = 1 / 40  # of a torchvision classifier's weights are its backbone's: of AlexNet's 1 / 25


def model_state(model: CaptionModel) -> dict[str, Any]:
    """Return a model as plain values and tensors.

    The backbone's tensors are among them only where they cannot be found again: random or fine-tuned ones.
    """
    inside = not model.config.encoder.frozen or model.encoder.identity["source"] is None
    return {
        "config": model.config.model_dump(),
        "vocabulary": model.vocab.state(),
        "transform": asdict(model.transform),
        "encoder": model.encoder.identity,
        "backbone": model.encoder.backbone.state_dict() if inside else None,
        "feature_mean": model.feature_mean,
        "feature_scale": model.feature_scale,
        "decoder": model.decoder.state_dict(),
    }


def load_model(path: str | Path, overrides: list[str] | None = None) -> CaptionModel:
    """Return the trained model in a file, in eval mode, with the consensus.pth beside it where its search uses that.

    Raises UserError when the file is damaged, or when its frozen backbone cannot be found again unchanged.
    """
    path = Path(path)
    model = model_from_state(load_checkpoint(path), str(path), overrides).eval()
    weight, beside = model.config.search.consensus, path.with_name(consensus.FILE)
    if weight and beside.is_file():
        model.consensus = Consensus.load(beside, model.encoder.feature_shape[-1], len(model.vocab))
    elif weight and any(word.startswith("search.consensus=") for word in overrides or []):
        raise consensus.missing(weight)
    elif weight:
        print(f"searching without consensus: there is no {beside}, which training writes at its end")
        search = model.config.search.model_copy(update={"consensus": 0.0})
        model.config = model.config.model_copy(update={"search": search})
    return model


def model_from_state(saved: dict[str, Any], where: str, overrides: list[str] | None = None) -> CaptionModel:
    """Return the model whose `model_state` was `saved`; `where` names its file in errors."""
    check_parts(saved, where)
    saved = to_float32(saved)
    config = restore_config(saved["config"], overrides, where)
    vocab = Vocabulary(**saved["vocabulary"])
    decoder_class = decoder_class_of(config)
    encoder = restore_encoder(config, saved, decoder_class.spatial, where)
    with torch.device("meta"):
        decoder = decoder_class(config.decoder, encoder.feature_shape[-1], len(vocab))
    check_tensors(decoder.state_dict(), saved["decoder"], where)
    decoder.load_state_dict(saved["decoder"], assign=True)
    model = CaptionModel(config, vocab, Transform(**saved["transform"]), encoder, decoder)
    statistics = {name: saved[name] for name in ("feature_mean", "feature_scale")}
    check_tensors({name: getattr(model, name) for name in statistics}, statistics, where)
    model.feature_mean, model.feature_scale = statistics.values()
    return model


def model_from_start(config: Config) -> CaptionModel:
    """Return a model of this `config` that goes on from the one in `train.start`.

    Raises UserError, naming them, for settings that would give it other shapes.
    """
    path = str(config.train.start)
    if not Path(path).is_file():
        run = Path(path).parent.name
        recipe = f"configs/{run}.yaml"
        known = (Path(__file__).parents[1] / recipe).is_file()
        raise UserError(
            f"there is no checkpoint at train.start = {path}; train it first (python train.py --config "
            f"{recipe if known else 'RECIPE'}) or name another"
        )
    saved = load_checkpoint(path)
    check_parts(saved, path)
    there, here = (flatten(each.model_dump()) for each in (restore_config(saved["config"], where=path), config))
    differ = sorted(name for name in marked(SHAPES) if there[name] != here[name])
    if differ:
        values = ", ".join(f"{name} ({as_yaml(there[name])} there, {as_yaml(here[name])} here)" for name in differ)
        mend = " ".join(f"{name}={as_yaml(there[name])}" for name in differ)
        raise UserError(f"train.start = {path} was trained with another {values}; go on from it with: {mend}")
    return model_from_state(saved | {"config": config.model_dump()}, path)


def as_yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def restore_encoder(config: Config, saved: dict[str, Any], spatial: bool, where: str) -> EncoderCNN:
    """Return the encoder of a checkpoint: its own backbone where it holds one, else the one with its sha256."""
    identity = saved["encoder"]
    if saved["backbone"] is not None:
        refuse_small(saved["backbone"], config.encoder.name, where)
        encoder = EncoderCNN(config.encoder, spatial, load=False)
        check_tensors(encoder.backbone.state_dict(), saved["backbone"], where)
        encoder.backbone.load_state_dict(saved["backbone"])
        encoder.identity = identity | {"source": None, "sha256": tensors_sha256(encoder.backbone)}  # as fine-tuned
        return encoder
    weights, source = config.encoder.weights, identity["source"]
    if source and weights == saved["config"]["encoder"].get("weights") and Path(source).is_file():
        weights = source
    encoder = EncoderCNN(config.encoder.model_copy(update={"weights": weights}), spatial)
    if encoder.identity["sha256"] != identity["sha256"]:
        raise UserError(
            f"{where} was trained on other backbone weights than {encoder.identity['source']} (another sha256); "
            f"give the file that was {identity['source']} with encoder.weights=FILE"
        )
    return encoder


def to_float32(values: Any) -> Any:
    """Return a checkpoint with its halves as floats: `models.publish` halves what is given away."""
    if isinstance(values, dict):
        return {name: to_float32(value) for name, value in values.items()}
    return values.float() if isinstance(values, torch.Tensor) and values.dtype == torch.float16 else values


# ---- checks before a model is built: a file from elsewhere may hold any plain values ---------------------------------


def whole_tensor(value: Any) -> torch.Tensor:
    """Pass on a tensor whose numbers are all stored: by its strides, one stored number can pass for many."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError("should be a tensor")
    if value.is_quantized or value.untyped_storage().nbytes() < value.nbytes:
        raise ValueError("should be a tensor that holds all its numbers")
    return value


Tensor = Annotated[Any, BeforeValidator(whole_tensor)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Words(Part):
    words: list[str]
    language: str


class Look(Part):
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class Identity(Part):
    name: str
    source: str | None
    sha256: str
    stride_in_1x1: bool


class Parts(BaseModel):
    """What a checkpoint must hold; it may hold more, such as the state of a training."""

    config: dict[str, dict[str, Any] | str]
    vocabulary: Words
    transform: Look
    encoder: Identity
    backbone: dict[str, Tensor] | None
    feature_mean: Tensor
    feature_scale: Tensor
    decoder: dict[str, Tensor]


def check_parts(saved: dict[str, Any], where: str) -> None:
    """Raise UserError unless `saved`, from the file `where`, holds the parts of a model, each of its kind."""
    try:
        Parts.model_validate(saved, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        part = ".".join(map(str, first["loc"][:2]))[:60]
        what = "lacks" if first["type"] == "missing" else "is damaged in"
        raise UserError(f"{where} {what} its {part}, so it is not a trained model; take another one") from None


def refuse_small(backbone: dict[str, torch.Tensor], name: str, where: str) -> None:
    """Raise UserError rather than build a huge network for a file that cannot hold it."""
    if name in torchvision.models.list_models(torchvision.models):
        whole = torchvision.models.get_model_weights(name)["DEFAULT"].meta["num_params"]  # with its classifier
        if sum(tensor.numel() for tensor in backbone.values()) < LEAST_SHARE * whole:
            raise UserError(f"{where} holds less than a {name}; take another checkpoint")


def check_tensors(own: dict[str, torch.Tensor], found: dict[str, torch.Tensor], where: str) -> None:
    """Raise UserError unless the tensors `found` in the file `where` are finite and `own`'s by name and shape."""
    shapes, found_shapes = ({name: (each.shape, each.dtype) for name, each in part.items()} for part in (own, found))
    if shapes != found_shapes:
        names = sorted(name for name in own.keys() | found.keys() if shapes.get(name) != found_shapes.get(name))
        raise UserError(
            f"the tensors in {where} do not fit its config (first: {names[0]:.60}); take another checkpoint"
        )
    not_finite = sorted(name for name, tensor in found.items() if not tensor.isfinite().all())
    if not_finite:
        raise UserError(f"{where} holds NaN or infinite weights (first: {not_finite[0]}); take another checkpoint")
