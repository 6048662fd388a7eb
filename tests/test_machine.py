"""Machines as people have them: shells, locales, limits and notebooks that a program may not count on."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

import train
import visualize_loss

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a POSIX shell sets them up")
PLAIN_C = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}  # ASCII alone


def shell(script: str | None, *words: str, before: str = "", behind: str = "", **variables: str) -> tuple[int, str]:
    """Run a script by a shell, after `before` and with redirections `behind` it; returns its exit code and output."""
    command = f"{before} {shlex.join([sys.executable, str(script), *words])} {behind}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=os.environ | variables)
    return ended.returncode, ended.stdout + ended.stderr


def test_training_needs_few_files_no_terminal_no_short_names_and_no_locale(archive: Path) -> None:
    """72 files of features with 40 that may be open, a long TMPDIR, nobody who reads errors, ASCII, another backend."""
    views = ["train.mirror=true", "train.corners=4", "data.shard_rows=1", "train.epochs=1"]
    folder = Path("t" * 120)
    folder.mkdir()
    odd = {**PLAIN_C, "TMPDIR": str(folder.resolve()), "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    code, said = shell(train.__file__, *TINY, *views, before="ulimit -n 40;", behind="2>&-", **odd)
    assert code == 0 and "best epoch 1" in said, said
    pixels = ["run=pixels", "encoder.frozen=false", "train.num_workers=2", "train.epochs=1"]
    code, said = shell(train.__file__, *TINY, *pixels, before="ulimit -n 40;", behind="2>&- <&-", **odd)
    assert code == 0 and "best epoch 1" in said, said


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "qtagg", ""])
def test_a_curve_is_drawn_whatever_backend_a_notebook_has_left(backend: str, tmp_path: Path) -> None:
    row = dict.fromkeys(("epoch", "step", "lr", *visualize_loss.COLUMNS[1:]), "1")
    log = tmp_path / "run" / "loss_log.txt"
    log.parent.mkdir()
    log.write_text("\t".join(row) + "\n" + "\t".join(row.values()) + "\n")
    code, said = shell(visualize_loss.__file__, str(log.parent), MPLBACKEND=backend)
    assert (code, said) == (0, f"wrote {log.parent / 'loss_curve.png'}\n")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_mistake_has_its_exit_code_where_nobody_can_read_it(closed: str, tmp_path: Path) -> None:
    assert shell(visualize_loss.__file__, "--run", str(tmp_path / "nowhere"), behind=closed)[0] == 2


def test_a_place_that_the_locale_cannot_spell_is_one_sentence(archive: Path) -> None:
    Path("recipe.yaml").write_text("data:\n  cache: 日本\n", encoding="utf-8")
    words = [*TINY, "train.epochs=1", "--config", "recipe.yaml"]
    code, said = shell(train.__file__, *words, **PLAIN_C)
    assert code == 2 and said.splitlines()[-1].endswith("lacks; set PYTHONUTF8=1") and "Traceback" not in said, said
    assert shell(train.__file__, *words, **(PLAIN_C | {"PYTHONUTF8": "1"}))[0] == 0


def test_a_name_that_the_locale_cannot_spell_is_one_sentence(archive: Path) -> None:
    with open(archive / "captions.csv", "a", encoding="utf-8") as file:
        file.write("日本.jpg,a dog\n")
    for list_file in archive.glob("*Images.txt"):
        list_file.unlink()
    (archive / "images" / "00.jpg").rename(archive / "images" / "日本.jpg")
    code, said = shell(train.__file__, *TINY, "train.epochs=1", **PLAIN_C)
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and "Traceback" not in said, said
