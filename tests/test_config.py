"""Settings: every mistake is explained with its dotted name, and nothing is silently taken for something else."""

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

import config
from config import Config, flatten, load_config, read_yaml, restore_config, setting_names

ROOT = Path(config.__file__).parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def test_config_yaml_gives_every_setting_of_the_schema_its_default() -> None:
    names = list[str]()
    for name, field in Config.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            assert all(inner.is_required() for inner in section.model_fields.values())
            names += [f"{name}.{inner}" for inner in section.model_fields]
        else:
            assert field.is_required()
            names.append(name)
    assert list(flatten(read_yaml(config.CONFIG_YAML))) == names == setting_names()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe: Path) -> None:
    load_config(recipe)


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2E4", 2e4), ("1.5e+2", 150.0), (".5", 0.5), ("1", 1.0)])
def test_a_number_is_read_as_a_number_from_command_line_and_file(text: str, value: float, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"train:\n  lr: {text}\n")
    assert load_config(recipe).train.lr == load_config(overrides=[f"train.lr={text}"]).train.lr == value


def test_what_is_said_later_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train:\n  epochs: 7\n  seed: 7\n")
    loaded = load_config(recipe, ["train.seed=8", "train.seed=9"])
    assert (loaded.train.epochs, loaded.train.seed) == (7, 9)
    assert loaded.train.batch_size == load_config().train.batch_size


@pytest.mark.parametrize(
    ("name", "text"),
    [("run", "2024"), ("run", "1e3"), ("data.root", "1e3"), ("data.root", "true"), ("data.captions", "12.5")],
)
def test_a_setting_that_is_text_keeps_what_is_written(name: str, text: str) -> None:
    assert flatten(load_config(overrides=[f"{name}={text}"]).model_dump())[name] == text


def test_null_clears_an_optional_setting() -> None:
    assert load_config(overrides=["encoder.weights=null"]).encoder.weights is None


def test_an_equals_sign_may_stand_in_a_value() -> None:
    assert load_config(overrides=["data.root=a=b"]).data.root == "a=b"


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("train.lrr=1", "train.lr"), ("tran.epochs=3", "train.epochs"), ("epochs=3", "train.epochs")],
)
def test_an_unknown_setting_is_refused_with_the_nearest_name(word: str, nearest: str, refused: Callable) -> None:
    with refused(word.split("=")[0], f"'{nearest}'"):
        load_config(overrides=[word])


def test_an_unknown_setting_in_a_file_is_refused_with_that_file(tmp_path: Path, refused: Callable) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("decoder:\n  hiden_size: 3\n")
    with refused("decoder.hiden_size", "'decoder.hidden_size'", "mine.yaml"):
        load_config(recipe)


@pytest.mark.parametrize(
    "word",
    [
        *("train.lr=fast", "train.lr=true", "train.lr=-1", "train.lr=.nan", "train.lr=.inf", "train.lr=nan"),
        *("train.epochs=2.5", "train.epochs=0", "train.epochs='5'", "train.epochs=null", "train.epochs="),
        *("train.seed=-1", "train.precision=fp8"),
        *("encoder.frozen=1", "encoder.image_size=8", "decoder.dropout=1", "decoder.name=null"),
        *("encoder.stages=[layer3, null]", "search.forbidden=[1]"),
        *("data.root=null", "run=../elsewhere", "run=", "train.epochs=[1, 2]", "train.epochs=2024-01-01"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_with_its_dotted_path(word: str, refused: Callable) -> None:
    with refused(word.split("=")[0], "the command line"):
        load_config(overrides=[word])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.mirror=ja", "true or false"),
        ("run=../elsewhere", "start with a letter, a digit or _"),
        ("train.epochs=0", "greater than 0"),
    ],
)
def test_what_a_value_should_be_is_said_in_words(word: str, told: str, refused: Callable) -> None:
    with refused(word.split("=")[0], told):
        load_config(overrides=[word])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train.self_critical_consensus=2 encoder.frozen=false", ["train.self_critical_consensus", "encoder.frozen"]),
        ("train.self_critical_beam=true train.self_critical_samples=1", ["train.self_critical_beam", "samples=1"]),
        ("data.shards=a.tar encoder.frozen=false", ["data.shards", "encoder.frozen=true"]),
        ("train.augment=[random_crop]", ["train.augment", "encoder.frozen=false"]),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: str, told: list[str], refused: Callable) -> None:
    with refused(*told):
        load_config(overrides=words.split())


@pytest.mark.parametrize("word", ["train=5", "train=null", "encoder={}x"])
def test_a_section_set_to_a_value_is_refused(word: str, refused: Callable) -> None:
    with refused(f"'{word.split('=')[0]}'", "section"):
        load_config(overrides=[word])


def test_a_word_without_equals_sign_is_refused(refused: Callable) -> None:
    with refused("'faster'", "key.sub=value"):
        load_config(overrides=["faster"])


@pytest.mark.parametrize(
    "content",
    [b"train: [1", b"train:\n\tlr: 1", b"\xff\xfe\x00", b"a: &a [*a", b"- train", b"just words", b"x: " + b"[" * 5000],
    ids=["bracket", "tab", "encoding", "anchor", "list", "words", "deep"],
)
def test_a_file_that_holds_no_settings_is_refused_by_name(content: bytes, tmp_path: Path, refused: Callable) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_bytes(content)
    with refused("broken.yaml"):
        load_config(recipe)


def test_a_misspelt_recipe_is_guessed(refused: Callable) -> None:
    with refused("cannot read the config", "atention.yaml", "did you mean", "attention.yaml?"):
        load_config(RECIPES[0].with_name("atention.yaml"))


@pytest.mark.parametrize("name", ["absent.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused_by_name(name: str, tmp_path: Path, refused: Callable) -> None:
    with refused(str(tmp_path / name), "--config"):
        load_config(tmp_path / name)


@pytest.mark.parametrize("content", [b"1: 2\n", b"train:\n  1: 2\n"])
def test_a_setting_that_is_not_named_by_a_word_is_refused(content: bytes, tmp_path: Path, refused: Callable) -> None:
    recipe = tmp_path / "numbers.yaml"
    recipe.write_bytes(content)
    with refused("numbers.yaml"):
        load_config(recipe)


def test_an_empty_recipe_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml") == load_config()


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError):
        load_config().train.epochs = 6


FREE = {  # where things lie, and what does not touch the model's numbers
    **{"data.root": "elsewhere", "data.captions": "other.csv", "data.images": "pictures", "data.shards": "a.tar"},
    **{"data.cache": "elsewhere", "data.shard_rows": 7, "encoder.weights": "moved.pth", "train.num_workers": 7},
    **{"train.log_every": 7, "train.checkpoint_every": 7, "train.tensorboard": True},
}


def test_what_may_change_after_training_is_where_things_lie_and_how_captions_are_searched(refused: Callable) -> None:
    saved = load_config().model_dump()
    changes = FREE | {"search.beam": 7, "search.max_length": 9, "search.forbidden": ["dog"]}
    restored = restore_config(saved, [f"{name}={value}" for name, value in changes.items()])
    assert flatten(restored.model_dump()) == flatten(saved) | changes
    for name in set(setting_names()) - changes.keys():
        if not name.startswith("search."):
            with refused(f"{name} is fixed in the checkpoint", "train.start=FILE"):
                restore_config(saved, [f"{name}=other"])


def test_what_a_checkpoint_fixes_may_be_said_again() -> None:
    words = ["train.lr=1e-4", "encoder.stages=[layer4]"]
    trained = load_config(overrides=words)
    assert restore_config(trained.model_dump(), [*words, "train.epochs=5"]) == trained


def test_a_setting_younger_than_the_checkpoint_takes_its_default() -> None:
    saved = load_config(overrides=["train.epochs=9"]).model_dump()
    del saved["train"]["clip_norm"], saved["search"]
    restored = restore_config(saved)
    assert restored.search == load_config().search
    assert (restored.train.epochs, restored.train.clip_norm) == (9, load_config().train.clip_norm)


def test_an_unknown_setting_for_a_checkpoint_is_refused(refused: Callable) -> None:
    with refused("'search.max_length'"):
        restore_config(load_config().model_dump(), ["search.max_lenght=9"])


ALIASES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60))


@pytest.mark.parametrize(
    "text", [ALIASES, "train: &t {lr: *t}", "train: &t {b: &b [*t, *b]}", f"{'x' * 100_000}: 1", "[" * 10_000]
)
def test_a_file_that_unfolds_without_end_is_refused_at_once(text: str, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "endless.yaml").write_text(text)
    with refused("endless.yaml"):
        load_config(tmp_path / "endless.yaml")


def test_a_long_value_is_cut_in_the_message(refused: Callable) -> None:
    with refused("train.lr", "..."):
        load_config(overrides=[f"train.lr={'x' * 100_000}"])
