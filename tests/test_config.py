"""Settings: every mistake is explained with its dotted path, and nothing is silently taken for something else."""

from cli import Parser, UserError, run_script

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError

import config
from config import Config, flatten, load_config, read_yaml, restore_config

ROOT = Path(config.__file__).parent
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


def fields(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    names: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            names |= fields(inner, f"{prefix}{name}.")
        else:
            names[f"{prefix}{name}"] = field
    return names


def test_config_yaml_and_the_schema_name_the_same_settings() -> None:
    assert set(flatten(read_yaml(config.CONFIG_YAML))) == set(fields(Config))


def test_every_default_lives_in_config_yaml() -> None:
    assert all(field.is_required() for field in fields(Config).values())


def test_what_is_free_after_training_exists() -> None:
    assert set(fields(Config)) >= config.FREE_AFTER_TRAINING


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
        *(
            "train.epochs=2.5",
            "train.epochs=0",
            "train.epochs='5'",
            "train.epochs=null",
            "train.epochs=",
            "train.seed=-1",
        ),
        *("encoder.frozen=1", "encoder.image_size=8", "decoder.dropout=1", "decoder.name=null", "data.language=xx"),
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


def test_self_critical_epochs_are_a_part_of_all(refused: Callable) -> None:
    with refused("train.self_critical_epochs", "train.epochs"):
        load_config(overrides=["train.self_critical_epochs=6"])


def test_rewards_by_consensus_need_a_frozen_backbone(refused: Callable) -> None:
    with refused("train.self_critical_consensus", "encoder.frozen"):
        load_config(overrides=["train.self_critical_consensus=2", "encoder.frozen=false"])


def test_patience_that_would_end_a_run_before_its_self_critical_epochs_is_refused(refused: Callable) -> None:
    with refused("train.patience", "train.self_critical_epochs"):
        load_config(overrides=["train.epochs=9", "train.self_critical_epochs=3", "train.patience=2"])


def test_a_self_critical_beam_of_one_compares_nothing(refused: Callable) -> None:
    with refused("train.self_critical_beam", "self_critical_samples=1"):
        load_config(overrides=["train.self_critical_beam=true", "train.self_critical_samples=1"])


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
    with refused("cannot read the config", "scts.yaml", "did you mean", "scst.yaml?"):
        load_config(RECIPES[0].with_name("scts.yaml"))


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


def test_a_saved_config_comes_back_equal() -> None:
    trained = load_config(overrides=["train.lr=1e-4", "run=mine"])
    assert restore_config(trained.model_dump()) == trained


@pytest.mark.parametrize("word", ["decoder.hidden_size=8", "train.lr=1", "data.min_count=1", "train.seed=1"])
def test_what_a_checkpoint_fixes_cannot_be_said_anew(word: str, refused: Callable) -> None:
    with refused(word.split("=")[0], "fixed"):
        restore_config(load_config().model_dump(), [word])


def test_what_a_checkpoint_fixes_may_be_said_again() -> None:
    trained = load_config(overrides=["train.lr=1e-4", "encoder.stages=[layer4]"])
    assert (
        restore_config(trained.model_dump(), ["train.lr=1e-4", "encoder.stages=[layer4]", "train.epochs=5"]) == trained
    )


def test_where_things_lie_and_how_to_search_can_be_said_anew() -> None:
    restored = restore_config(load_config().model_dump(), ["data.root=else", "search.max_length=9"])
    assert (restored.data.root, restored.search.max_length) == ("else", 9)


def test_a_setting_younger_than_the_checkpoint_takes_its_default() -> None:
    saved = load_config(overrides=["train.epochs=9"]).model_dump()
    del saved["train"]["clip_norm"], saved["search"]
    restored = restore_config(saved)
    assert restored.search == load_config().search
    assert (restored.train.epochs, restored.train.clip_norm) == (9, load_config().train.clip_norm)


def test_an_unknown_setting_for_a_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match=r"'search\.max_length'"):
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


def test_a_name_cannot_write_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("there is no \x1b]0;title\x07 \u202efile\n of that name; check it")

    assert run_script(main) == 2
    assert capsys.readouterr().err == r"error: there is no \x1b]0;title\x07 \u202efile\n of that name; check it" + "\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--epochs 3", "there is no --epochs; write train.epochs=3"),
        ("run=mine --batch-size=32 --resume", "there is no --batch-size; write train.batch_size=32"),
        ("--train.lr 1e-3", "there is no --train.lr; write train.lr=1e-3"),
        ("--frozen --resume", "there is no --frozen; write encoder.frozen=…"),
        ("--name x", "there is no --name; write encoder.name=x or decoder.name=x"),
        ("--fast", "there is no --fast; there are --config, --resume, and settings such as train.epochs=3"),
        ("-e 3", "there is no -e; there are --config, --resume, and settings such as train.epochs=3"),
    ],
)
def test_an_option_that_there_is_not_is_refused_with_the_setting_that_there_is(
    line: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        parser = Parser()
        parser.add_argument("--config", metavar="FILE")
        parser.add_argument("--resume", action="store_true")
        parser.parse_options_and_settings(config.setting_names())

    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    assert run_script(main) == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_settings_may_stand_anywhere_and_a_value_may_look_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = Parser()
    parser.add_argument("--images", nargs="+")
    parser.add_argument("--out")
    line = "train.lr=1 --images a b search.beam=5 --out beam=5 run=mine"
    monkeypatch.setattr(sys, "argv", ["script.py", *line.split()])
    args = parser.parse_options_and_settings(config.setting_names())
    assert (args.images, args.out) == (["a", "b"], "beam=5")
    assert args.overrides == ["train.lr=1", "search.beam=5", "run=mine"]


def test_full_memory_is_told_with_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    def main(error: Exception) -> None:
        raise error

    on_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
    on_cpu = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
    settings = "train.batch_size, encoder.image_size or search.beam"
    for error in (on_gpu, on_cpu, MemoryError()):
        assert run_script(partial(main, error)) == 2
        assert capsys.readouterr().err == f"error: memory is full, a GPU's where one is used; lower {settings}\n"
    with pytest.raises(RuntimeError, match="mat1"):
        run_script(partial(main, RuntimeError("mat1 and mat2 shapes cannot be multiplied")))


def test_ctrl_c_is_told_with_what_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def main(*kept: str) -> None:
        raise KeyboardInterrupt(*kept)

    assert [run_script(main), run_script(partial(main, "half is done"))] == [130, 130]
    assert capsys.readouterr().err == "interrupted\ninterrupted; half is done\n"


def test_what_no_encoding_has_is_printed_escaped(tmp_path: Path) -> None:
    script = "import cli, sys; sys.exit(cli.run_script(lambda: print('caf\\udce9.jpg')))"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout.strip() == rb"caf\udce9.jpg"


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_during_the_imports_shows_no_traceback() -> None:
    script = "import cli, os, signal; os.kill(os.getpid(), signal.SIGINT); import torch"
    stopped = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (-signal.SIGINT, "interrupted\n")
    first = "from cli import"
    for name in ("train", "evaluate", "inference_visualize", "visualize_loss"):
        lines = (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()
        assert next(line for line in lines if re.match("import|from", line)).startswith(first)
