"""Settings: every mistake is explained with its dotted name, and nothing is silently taken for something else."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import BaseModel

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
    recipe.write_text("# nothing\n")
    assert load_config(recipe) == load_config()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        *(("run", "2024", "2024"), ("run", "1e3", "1e3"), ("data.root", "true", "true"), ("data.root", "a=b", "a=b")),
        *(("data.captions", "12.5", "12.5"), ("encoder.weights", "null", None)),
    ],
)
def test_a_setting_that_is_text_keeps_what_is_written(name: str, text: str, value: str | None) -> None:
    assert flatten(load_config(overrides=[f"{name}={text}"]).model_dump())[name] == value


@pytest.mark.parametrize(
    ("words", "told"),
    [
        *(("train.lrr=1", "'train.lr'"), ("tran.epochs=3", "'train.epochs'"), ("epochs=3", "'train.epochs'")),
        *(("train=5", "section"), ("train=null", "section"), ("encoder={}x", "section"), ("faster", "key.sub=value")),
        *((f"train.lr={value}", "the command line") for value in ("fast", "true", "-1", ".nan", ".inf", "nan")),
        *((f"train.epochs={value}", "the command line") for value in ("2.5", "'5'", "null", "", "[1,2]", "2024-01-01")),
        *((word, "the command line") for word in ("train.seed=-1", "train.precision=fp8", "encoder.frozen=1", "run=")),
        *((word, "the command line") for word in ("encoder.image_size=8", "decoder.dropout=1", "decoder.name=null")),
        *((word, "the command line") for word in ("encoder.stages=[layer3,null]", "search.forbidden=[1]")),
        *(("data.root=null", "the command line"), (f"train.lr={'x' * 100_000}", "...")),
        *(("train.epochs=0", "greater than 0"), ("train.mirror=ja", "true or false")),
        # numbers that are none of a setting, or too small to compute with
        *((f"train.epochs={number}", "the command line") for number in ("0x" + "f" * 5000, "9" * 401, "9" * 5000)),
        *((f"train.lr={number}", "the command line") for number in ("9" * 401, "0x" + "1" * 5000, "1e999")),
        *(("train.seed=18446744073709551616", "1000000000"), ("data.min_count=2000000000", "1000000000")),
        *(
            ("search.temperature=1e-50", "1e-6"),
            ("search.top_p=1e-50", "greater than or equal to"),
            ("search.top_k=1e3", "integer"),
        ),
        *((f"encoder.frozen={word}", "true or false") for word in ("on", "no", "yes", "OFF", "y")),
        *(
            ("data.weights=[1e308]", "1000"),
            ("data.weights=[1e-320]", "0.001"),
            ("train.accumulate=1000000000", "10000"),
        ),
        ("run=../elsewhere", "start with a letter, a digit or _"),
        ("train.self_critical_consensus=2 encoder.frozen=false", "encoder.frozen"),
        ("train.self_critical_beam=true train.self_critical_samples=1", "samples=1"),
        ("data.shards=a.tar encoder.frozen=false", "encoder.frozen=true"),
        ("train.augment=[random_crop]", "encoder.frozen=false"),
    ],
)
def test_a_mistake_is_refused_with_the_name_of_the_setting(words: str, told: str, refused: Callable) -> None:
    with refused(words.split("=")[0], told):
        load_config(overrides=words.split())


ALIASES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}}}\n" for n in range(1, 60))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        *((content, "") for content in (b"train: [1", b"train:\n\tlr: 1", b"\xff\xfe\x00", b"- train", b"just words")),
        *((content, "") for content in (b"1: 2\n", b"train:\n  1: 2\n", b"x: " + b"[" * 1000)),
        (b"decoder:\n  hiden_size: 3\n", "did you mean 'decoder.hidden_size'?"),
        (b"train:\n  lr: 1\ndata:\n  min_count: 1\ntrain:\n  epochs: 2\n", "(line 5) has train twice in one place"),
        (b"train:\n  lr: 1\n  lr: 2\n", "(line 3) has lr twice in one place; keep one of them"),
        (b"train: {lr: 1, 'lr': 2}", "(line 1) has lr twice"),
        *((b'data: {%b: "a\\0b"}' % name, f"data.{name.decode()} = 'a") for name in (b"cache", b"root", b"shards")),
        # what unfolds without end
        *((content, "") for content in (b"a: &a [*a]", b"train: &t {lr: *t}", b"train: &t {b: &b [*t, *b]}")),
        *((content, "") for content in (ALIASES.encode(), b"x" * 100_000 + b": 1")),
    ],
    ids=lambda value: ascii(value[:20]),
)
def test_a_file_with_a_mistake_is_refused_by_name(content: bytes, told: str, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with refused("mine.yaml", told):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("words", [["on", "no"], ["yes", "NO", "off"], ["y", "1:30", "2024-01-01", "010x", "1_000"]])
def test_words_are_words(words: list[str]) -> None:
    """PyYAML reads YAML 1.1, where these are truth values, minutes, dates and numbers."""
    assert load_config(overrides=[f"search.forbidden=[{', '.join(words)}]"]).search.forbidden == words


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_devices_and_endless_files_are_no_settings(tmp_path: Path, refused: Callable) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(1 << 40)
    for path in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with refused(f"{path} is no file but a folder, a pipe or a device; name a file"):
            load_config(path)
    with refused("huge.yaml is too large: at most 1,048,576 bytes are read"):
        load_config(tmp_path / "huge.yaml")
    with refused("loop.yaml: Too many levels of symbolic links"):
        load_config(tmp_path / "loop.yaml")


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, refused: Callable) -> None:
    with refused(str(tmp_path / "absent.yaml"), "--config"):
        load_config(tmp_path / "absent.yaml")
    with refused(f"{tmp_path} is no file but a folder"):
        load_config(tmp_path)
    with refused("cannot read the config", "atention.yaml", "did you mean", "attention.yaml?"):
        load_config(RECIPES[0].with_name("atention.yaml"))


FREE = {  # where things lie, and what does not touch the model's numbers
    **{"data.root": "elsewhere", "data.captions": "other.csv", "data.images": "pictures", "data.shards": "a.tar"},
    **{"data.cache": "elsewhere", "data.shard_rows": 7, "encoder.weights": "moved.pth", "train.num_workers": 7},
    **{"train.log_every": 7, "train.checkpoint_every": 7, "train.tensorboard": True, "data.broken": "skip"},
    **{"train.keep_every": 7, "train.wandb": True, "encoder.precision": "int8"},
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
