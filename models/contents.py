"""What a checkpoint must hold before a model is built from it: untrusted files may hold any plain values."""

from cli import UserError

from typing import Annotated, Any

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError


def as_tensor(value: Any) -> torch.Tensor:
    """Pass on a tensor whose numbers are all there: one stored number can pass for any number of them."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        raise ValueError("should be a tensor")
    if value.is_quantized or value.untyped_storage().nbytes() < value.nbytes:
        raise ValueError("should be a tensor that holds all its numbers")
    return value


Tensor = Annotated[Any, BeforeValidator(as_tensor)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Words(Part):
    words: list[str]
    language: str


class Look(Part):
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Identity(Part):
    name: str
    source: str | None
    sha256: str
    stride_in_1x1: bool


class Remembered(Part):
    pictures: Tensor
    centre: Tensor
    words: Tensor
    lengths: Tensor
    owner: Tensor


class Contents(BaseModel):
    model_config = ConfigDict(strict=True)
    config: dict[str, dict[str, Any] | str]
    vocabulary: Words
    transform: Look
    encoder: Identity
    backbone: dict[str, Tensor] | None
    feature_mean: Tensor
    feature_scale: Tensor
    decoder: dict[str, Tensor]
    consensus: Remembered | None = None


def check(saved: dict[str, Any], where: str) -> None:
    """Raise UserError unless `saved`, of the file `where`, holds the parts of a model, each of its kind."""
    try:
        Contents.model_validate(saved)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        part = ".".join(map(str, first["loc"][:2]))[:60]
        what = "lacks" if first["type"] == "missing" else "is damaged in"
        raise UserError(f"{where} {what} its {part}, so it is not a trained model; take another one") from None
