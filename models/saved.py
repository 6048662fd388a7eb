"""What the plain values of a checkpoint may be, whether they come in a file or from the Hugging Face Hub."""

from typing import Annotated, Literal

from pydantic import Field

from config import Section
from data.vocab import LONGEST_WORD

Mean = Annotated[float, Field(ge=0, le=1)]  # of colours from 0 to 1
Deviation = Annotated[float, Field(ge=1e-3, le=100)]


class SavedVocabulary(Section):
    """A `data.vocab.Vocabulary`."""

    words: list[Annotated[str, Field(max_length=LONGEST_WORD)]]
    language: str


class SavedTransform(Section):
    """A `data.transforms.Transform`."""

    image_size: Annotated[int, Field(ge=1, le=1024)]  # as encoder.image_size: a larger one could fill the memory
    mean: tuple[Mean, Mean, Mean]
    std: tuple[Deviation, Deviation, Deviation]
    interpolation: Literal["bilinear", "bicubic"]


class SavedEncoder(Section):
    """An `EncoderCNN.identity`: which weights the backbone has."""

    name: str
    source: str | None  # a file
    sha256: str
    stride_in_1x1: bool


class SavedConfidence(Section):
    """The state of a `models.confidence.Confidence`."""

    weights: list[float]
    bias: float
