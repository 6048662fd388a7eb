"""The schema of config.yaml (strict, typed, frozen), and how settings are read and explained.

`load_config` reads config.yaml (every default lives there), lays a recipe and `key.sub=value` overrides over it, and
explains a mistake with the dotted name of the setting and the nearest valid name.
"""

import difflib
import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cli import UserError, shorten
from cli.files import read_file

CONFIG_YAML = Path(__file__).parent / "config.yaml"

# Marks of fields, inside Annotated:
FREE = "may change after training: where things lie, and what does not touch the model's numbers"
SHAPES = "the model's tensors depend on it: a run that starts from another one must have the same value"

Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0, le=10**9)]
NonNegativeInt = Annotated[int, Field(ge=0, le=10**9)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]


def as_place(text: str) -> str:
    """Return a file or folder; ~ is the home folder."""
    if "\0" in text:
        raise ValueError("a path holds no zero bytes")
    return os.path.expanduser(text)


Place = Annotated[str, AfterValidator(as_place)]
Size = Annotated[int, Field(ge=1, le=8192)]
Member = TypeVar("Member")

MOST_DIGITS = 30  # of a whole number
MOST_BYTES = 1 << 20  # of a file of settings
MEMBERS = 100  # of a table, that are listed at most: timm has thousands of networks

# Kinds of mistakes for which pydantic's own words would puzzle a reader.
PLAIN = {
    "bool_type": "it should be true or false",
    "string_pattern_mismatch": "it should start with a letter, a digit or _, then have these, . and -",
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    root: Annotated[Place | Annotated[list[Place], Field(min_length=1)], FREE]
    weights: list[Annotated[float, Field(ge=0.001, le=1000)]] | None
    captions: Annotated[Place | None, FREE]
    images: Annotated[Place | None, FREE]
    shards: Annotated[Place | None, FREE]
    format: str  # one of data.formats.READERS
    language: Annotated[str, SHAPES]  # one of data.vocab.TOKENISERS
    min_count: PositiveInt
    broken: Annotated[Literal["refuse", "skip"], FREE]
    cache: Annotated[Place, FREE]
    shard_rows: Annotated[PositiveInt, FREE]

    @property
    def source(self) -> str:
        """Return where captions and pictures come from, for messages."""
        return self.shards or " and ".join(self.roots)

    @property
    def roots(self) -> list[str]:
        return [self.root] if isinstance(self.root, str) else self.root

    @model_validator(mode="after")
    def check_roots(self) -> Self:
        if len(self.roots) > 1 and (self.captions or self.images or self.format == "sample"):
            raise ValueError(
                "data.captions, data.images and data.format=sample speak of one dataset, and data.root names several; "
                "leave them out, or put captions and pictures of each dataset where they are found (docs/data.md)"
            )
        return self


class EncoderConfig(Section):
    name: Annotated[str, SHAPES]  # any that models.backbones.FAMILIES know
    weights: Annotated[Place | None, FREE]
    frozen: bool
    stages: list[Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]] | None  # some are called 0, 1 …
    stride_in_1x1: Annotated[bool, SHAPES]
    image_size: Annotated[int | None, Field(ge=32, le=1024), SHAPES]
    precision: Annotated[Literal["auto", "int8"], FREE]


class DecoderConfig(Section):
    name: Annotated[str, SHAPES]  # one of models.model.DECODERS
    embed_size: Annotated[Size, SHAPES]
    hidden_size: Annotated[Size, SHAPES]
    num_layers: Annotated[int, Field(ge=1, le=64), SHAPES]
    num_heads: Annotated[int, Field(ge=1, le=64), SHAPES]
    encoder_layers: Annotated[int, Field(ge=0, le=64), SHAPES]
    dropout: Fraction


class TrainConfig(Section):
    loss: str  # one of training.losses.LOSSES
    start: Place | None
    epochs: PositiveInt
    batch_size: PositiveInt | Literal["auto"]
    accumulate: Annotated[int, Field(ge=1, le=10_000)]
    lr: PositiveFloat
    encoder_lr: PositiveFloat
    weight_decay: NonNegativeFloat
    warmup_steps: NonNegativeInt
    clip_norm: PositiveFloat
    label_smoothing: Fraction
    doubly_stochastic: NonNegativeFloat
    self_critical_samples: PositiveInt
    self_critical_beam: bool
    self_critical_consensus: Annotated[float, Field(ge=0, le=1000)]
    mirror: bool
    corners: Annotated[int, Field(ge=0, le=4)]
    augment: list[str]  # some of data.transforms.AUGMENTATIONS
    ema: Fraction
    patience: PositiveInt | None
    seed: NonNegativeInt
    precision: Literal["auto", "fp32", "bf16"]
    num_workers: Annotated[int, Field(ge=0, le=256), FREE]
    log_every: Annotated[PositiveInt, FREE]
    checkpoint_every: Annotated[PositiveInt, FREE]
    keep_every: Annotated[PositiveInt | None, FREE]
    tensorboard: Annotated[bool, FREE]
    wandb: Annotated[bool, FREE]

    @model_validator(mode="after")
    def check_self_critical(self) -> Self:
        if self.self_critical_beam and self.self_critical_samples == 1:
            raise ValueError(
                "train.self_critical_beam compares the captions of a beam, and train.self_critical_samples=1 is a "
                "single one; raise it"
            )
        return self


class SearchConfig(Section):
    beam: Annotated[int, Field(ge=1, le=100)]
    length_penalty: Annotated[float, Field(ge=0, le=10)]
    max_length: Annotated[int, Field(ge=1, le=1000)]
    min_length: NonNegativeInt
    no_repeat_ngram: NonNegativeInt
    forbidden: list[str]
    consensus: Annotated[float, Field(ge=0, le=1000)]
    classes: Annotated[float, Field(ge=0, le=1000)]
    temperature: Annotated[float, Field(ge=0, le=100)]
    top_k: NonNegativeInt
    top_p: Annotated[float, Field(ge=1e-6, le=1)]

    @model_validator(mode="after")
    def check_temperature(self) -> Self:
        if 0 < self.temperature < 1e-6:
            raise ValueError(
                f"search.temperature = {self.temperature} is too small to compute with; take 1e-6 at least, or 0 to "
                "search without drawing"
            )
        return self

    def by_consensus(self, num_captions: int = 1) -> bool:
        """Whether a beam gives several captions, and consensus is to rank them."""
        return self.consensus > 0 and self.temperature == 0 and max(self.beam, num_captions) > 1

    def greedy(self) -> "SearchConfig":
        """Return the same search with a beam of 1, as training validates."""
        return self.model_copy(update={"beam": 1, "temperature": 0.0, "consensus": 0.0, "classes": 0.0})


class Config(Section):
    """Everything a run is made from; `model_dump()` gives the plain values kept in checkpoints."""

    run: Annotated[str, Field(pattern=r"^[\w][\w.-]*$")]
    data: DataConfig
    encoder: EncoderConfig
    decoder: DecoderConfig
    train: TrainConfig
    search: SearchConfig

    @model_validator(mode="after")
    def check_encoder(self) -> Self:
        if self.train.self_critical_consensus and not self.encoder.frozen:
            raise ValueError(
                "train.self_critical_consensus compares pictures by the features of a frozen backbone; leave "
                "encoder.frozen=true, or train without it"
            )
        if self.encoder.precision == "int8" and not self.encoder.frozen:
            raise ValueError(
                "encoder.precision=int8 goes with encoder.frozen=true: the 8-bit copy of a backbone is made only once; "
                "set encoder.precision=auto"
            )
        if self.data.shards and not self.encoder.frozen:
            raise ValueError(
                "data.shards goes with encoder.frozen=true: a trained backbone reads single pictures, in an order of "
                "its own"
            )
        if self.train.augment and self.encoder.frozen:
            raise ValueError(
                "train.augment changes pictures at random each time they are read, and a frozen backbone reads each "
                "once; set encoder.frozen=false, or take train.mirror and train.corners"
            )
        return self


def marked(mark: str) -> set[str]:
    """Return the dotted names of the settings whose field has this mark, FREE or SHAPES."""
    return {
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        for name, inner in field.annotation.model_fields.items()
        if mark in inner.metadata
    }


def pick(table: Mapping[str, Member], name: str, setting: str) -> Member:
    """Return the member of a table, such as that of all decoders, that a setting names.

    Raises UserError for an unknown name, with the nearest one.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1)
    more = ", …" if len(table) > MEMBERS else ""
    hint = f"did you mean {near[0]}?" if near else f"take one of: {', '.join(islice(table, MEMBERS))}{more}"
    raise UserError(f"{setting} = {shorten(name)} is unknown; {hint}")


class _Loader(yaml.SafeLoader):
    """A loader of YAML 1.2, where PyYAML's own reads 1.1: `1e-3` is a number, and `on`, `no`, 1:30 and 2024-01-01 are
    text. It refuses a name that stands twice, of which PyYAML drops the first, and aliases, which can be endless.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set[str]()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in names:
                raise Twice(None, None, key.value, key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int | str:
        """Return the number, or its digits where they are too many for any setting."""
        base = {"0x": 16, "0o": 8}.get(node.value[:2], 10)
        return node.value if len(node.value) > MOST_DIGITS else int(node.value.removeprefix("0o"), base)

    def construct_fraction(self, node: yaml.ScalarNode) -> float:
        return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


class Twice(yaml.constructor.ConstructorError):
    """A name that stands twice in one place."""


for _kind, _pattern, _construct in (
    ("null", r"null|Null|NULL|~|", yaml.SafeLoader.construct_yaml_null),
    ("bool", r"true|True|TRUE|false|False|FALSE", yaml.SafeLoader.construct_yaml_bool),
    ("int", r"[-+]?\d+|0o[0-7]+|0x[\da-fA-F]+", _Loader.construct_integer),
    (
        "float",
        r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _Loader.construct_fraction,
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def load_config(
    recipes: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] | None = None
) -> Config:
    """Return config.yaml with a recipe, or several, and then the `key.sub=value` overrides laid over it; later wins.

    Raises UserError for an unreadable file, an unknown setting, or a value of the wrong kind.
    """
    values = flatten(read_yaml(CONFIG_YAML))
    origin = dict.fromkeys(values, CONFIG_YAML.name)
    several = [recipes] if isinstance(recipes, str | Path) else recipes or []
    layers = [(str(recipe), flatten(read_yaml(Path(recipe)))) for recipe in several]
    for where, layer in [*layers, ("the command line", parse_overrides(overrides or [], values))]:
        values = lay_over(values, layer, where)
        origin |= dict.fromkeys(layer, where)
    return validate(values, origin)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise UserError for settings that no checkpoint takes: unknown ones, and wrong values of what may change."""
    values = flatten(read_yaml(CONFIG_YAML))
    layer = parse_overrides(overrides, values)
    lay_over(values, layer, "the command line")
    free = {name: value for name, value in layer.items() if is_free(name)}
    validate(values | free, dict.fromkeys(layer, "the command line"))


def is_free(name: str) -> bool:
    """Whether a setting may be changed after training: it is FREE, or one of the search."""
    return name in marked(FREE) or name.startswith("search.")


def restore_config(
    saved: dict[str, Any], overrides: Sequence[str] | None = None, where: str = "the checkpoint"
) -> Config:
    """Return a Config from the plain values kept in a checkpoint; settings younger than it take their defaults.

    Raises UserError for overrides that differ from what the checkpoint fixes: only FREE settings and those of the
    search can still be changed.
    """
    values = lay_over(flatten(read_yaml(CONFIG_YAML)), flatten(saved), where)
    layer = parse_overrides(overrides or [], values)
    changed = lay_over(values, layer, "the command line")
    for name in layer:
        if layer[name] != values[name] and not is_free(name):
            raise UserError(
                f"{name} is fixed in the checkpoint, as {reprlib.repr(values[name])}; train a new run to change it, "
                "with train.start=FILE to keep what was learned"
            )
    return validate(changed, dict.fromkeys(values, where) | dict.fromkeys(layer, "the command line"))


def change_search(config: Config, settings: dict[str, Any]) -> Config:
    """Return `config` with these settings of `search` in place of its own; raises UserError for what they cannot be."""
    layer = {f"search.{name}": value for name, value in settings.items()}
    return validate(lay_over(flatten(config.model_dump()), layer, "the call"), dict.fromkeys(layer, "the call"))


def lay_over(values: dict[str, Any], layer: dict[str, Any], where: str) -> dict[str, Any]:
    """Return `values` with those of `layer` in their place; raises UserError for a setting that there is not."""
    for name in layer:
        if name not in values:
            raise UserError(unknown_setting(name, where, values))
    return values | layer


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.load(read_file(path, MOST_BYTES).decode(), Loader=_Loader)
    except OSError as error:
        near = difflib.get_close_matches(
            path.name, {other.name for other in path.parent.glob("*.yaml")} - {path.name}, n=1
        )
        hint = f"did you mean {path.with_name(near[0])}?" if near else "check the path after --config"
        raise UserError(f"cannot read the config {path}: {error.strerror}; {hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        if isinstance(error, Twice):
            raise UserError(f"{path}{line} has {shorten(error.problem)} twice in one place; keep one of them") from None
        raise UserError(f"{path}{line} is not valid YAML; compare it with config.yaml") from None
    if not isinstance(loaded or {}, dict):
        raise UserError(f"{path} does not hold settings such as 'train:'; compare it with config.yaml")
    return loaded or {}


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"train": {"lr": 1}}` into `{"train.lr": 1}`; settings lie no deeper, and YAML's aliases may be endless."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = {f".{name}": each for name, each in value.items()} if isinstance(value, dict) else {"": value}
        flat |= {f"{key}{name}": each for name, each in inner.items()}
    return flat


def parse_overrides(overrides: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Read `key.sub=value` words; a value is YAML, but where the default is text it is taken as written."""
    parsed: dict[str, Any] = {}
    for word in overrides:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"'{shorten(word)}' is neither an option nor a setting; write settings as key.sub=value")
        if name == "data.shards" and name in parsed:
            raise UserError("data.shards is given several times, as a shell makes of braces; write it in quotes")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = text
        takes_text = isinstance(defaults.get(name), str) or name in ("data.captions", "data.images", "data.shards")
        is_other = isinstance(value, {"data.root": list, "train.batch_size": int}.get(name, ()))
        parsed[name] = text if takes_text and value is not None and not is_other else value
    return parsed


def unknown_setting(name: str, where: str, known: dict[str, Any]) -> str:
    sections = sorted({k.split(".")[0] for k in known if "." in k})
    if name in sections:
        return f"{where} sets '{name}' to a plain value, but it is a section; set '{name}.…' as in config.yaml"
    name = shorten(name)
    near = [known_name for known_name in known if known_name.split(".")[-1] == name.split(".")[-1]]
    near += difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "config.yaml lists every setting"
    return f"unknown setting '{name}' in {where}; {hint}"


def validate(values: dict[str, Any], origin: dict[str, str]) -> Config:
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[key] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        errors = error.errors(include_url=False)
    first = [each for each in errors if each["loc"][:2] == errors[0]["loc"][:2]][-1]  # of what may be text or a list
    if first["type"] == "value_error" and len(first["loc"]) < 2:  # of a section's validator, which says it all
        raise UserError(str(first["ctx"]["error"]))
    name = ".".join(map(str, first["loc"][:2]))
    places = "".join(f"[{place}]" for place in first["loc"][2:] if isinstance(place, int))
    expected = PLAIN.get(first["type"]) or re.sub(
        "^[A-Z]", lambda letter: letter[0].lower(), first["msg"].removeprefix("Value error, ")
    )
    raise UserError(
        f"{name}{places} = {reprlib.repr(first['input'])} (from {origin.get(name, 'config.yaml')}) cannot be used: "
        f"{expected}; config.yaml says what it means"
    )


def setting_names() -> list[str]:
    """Return the name of every setting, such as train.lr."""
    return list(flatten(read_yaml(CONFIG_YAML)))
