"""Checkpoints survive full disks and strangers, runs are found, signals noted, and noise comes from (seed, step)."""

from cli import UserError

import contextlib
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import utils
from utils import (
    StopRequest,
    as_json,
    find_run,
    load_checkpoint,
    pick_precision,
    save_checkpoint,
    seed_step,
    write_atomically,
)

CHECKPOINT: dict[str, Any] = {"step": 3, "words": ["a", "dog"], "decoder": {"weight": torch.arange(50_000.0)}}
CPU = torch.device("cpu")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "new" / "a.pth", CHECKPOINT)
    loaded = load_checkpoint(tmp_path / "new" / "a.pth")
    assert (loaded["step"], loaded["words"]) == (3, ["a", "dog"])
    assert loaded.keys() == torch.load(tmp_path / "new" / "a.pth", weights_only=True).keys()
    assert torch.equal(loaded["decoder"]["weight"], CHECKPOINT["decoder"]["weight"])
    assert names(tmp_path / "new") == ["a.pth"]


def test_a_file_that_is_replaced_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"1")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, full_disk: Callable, refused: Callable
) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})
    with full_disk(20_000), refused(str(path), "make room"):
        save_checkpoint(path, CHECKPOINT)
    assert load_checkpoint(path)["step"] == 1
    assert names(tmp_path) == ["last.pth"]


def test_a_disk_that_is_full_when_flushed_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with refused(str(path), "No space left"):
        save_checkpoint(path, CHECKPOINT)
    assert load_checkpoint(path)["step"] == 1
    assert names(tmp_path) == ["last.pth"]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "runs").touch()
    with refused("runs"):
        save_checkpoint(tmp_path / "runs" / "a" / "last.pth", CHECKPOINT)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused(share: float, tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, CHECKPOINT)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with refused("last.pth", "cut short"):
        load_checkpoint(path)


def test_a_checkpoint_with_a_wrong_byte_is_read_or_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", {"words": ["a", "dog"], "weight": torch.ones(2)})
    content = (tmp_path / "a.pth").read_bytes()
    for place in range(len(content)):
        (tmp_path / "wrong.pth").write_bytes(content[:place] + b"\xe5" + content[place + 1 :])
        with contextlib.suppress(UserError):
            assert isinstance(load_checkpoint(tmp_path / "wrong.pth"), dict)


@pytest.mark.parametrize("content", [b"not a checkpoint", pickle.dumps({"step": 1}), b"PK\x05\x06" + bytes(18)])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    with refused("other.pth is not a checkpoint of this project, or was cut short"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("saved", [{"weight": torch.ones(2)}, [1, 2], {"format": torch.ones(2)}, torch.ones(2)])
def test_a_torch_file_of_another_project_is_refused(saved: Any, tmp_path: Path, refused: Callable) -> None:
    torch.save(saved, tmp_path / "other.pth")
    with refused("other.pth is not a checkpoint of this project"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(tmp_path: Path, refused: Callable) -> None:
    torch.save(CHECKPOINT | {"format": "image-captioning/1"}, tmp_path / "old.pth")
    with refused("old.pth was written by an older version of this project", "image-captioning/1", "train it again"):
        load_checkpoint(tmp_path / "old.pth")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, None])
def test_a_zip_that_swells_or_holds_other_things_is_refused(
    compression: int | None, tmp_path: Path, refused: Callable
) -> None:
    save_checkpoint(tmp_path / "a.pth", CHECKPOINT)
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", compression or zipfile.ZIP_STORED) as new,
    ):
        for name in old.namelist() if compression else []:
            new.writestr(name, old.read(name))
        new.writestr("readme.txt", "hello")
    with refused("b.pth", "not a checkpoint"):
        load_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_a_checkpoint_that_is_not_there_is_refused(name: str, tmp_path: Path, refused: Callable) -> None:
    with refused(str(tmp_path / name), "no checkpoint"):
        load_checkpoint(tmp_path / name)


class Intruder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("in_zip", [True, False])
def test_code_in_a_checkpoint_is_never_run(in_zip: bool, tmp_path: Path, refused: Callable) -> None:
    path, evil = tmp_path / "evil.pth", {"format": utils.CHECKPOINT_FORMAT, "x": Intruder(tmp_path / "intruded")}
    if in_zip:
        torch.save(evil, path)
    else:
        path.write_bytes(pickle.dumps(evil))
    with refused("evil.pth"):
        load_checkpoint(path)
    assert names(tmp_path) == ["evil.pth"]


def make_run(name: str, mtime: int, file: str = "last.pth") -> Path:
    path = Path("runs", name, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (mtime, mtime))
    return path.parent


def test_the_newest_run_that_holds_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    old, new, other = make_run("b", 1000), make_run("a", 2000), make_run("c", 3000, "loss_log.txt")
    assert find_run("last.pth") == new
    assert find_run("loss_log.txt") == other
    assert find_run("last.pth", accept=lambda run: run != new) == old


def test_a_run_that_is_not_there_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/begun").mkdir(parents=True)
    Path("runs/begun/last.pth").touch()
    commands = {"begun": "--resume --run begun", "attention": "--config configs/attention.yaml", "mine": "run=mine"}
    for name, command in commands.items():
        with refused(f"runs/{name} holds no checkpoints.pth", f"python train.py {command}"):
            find_run("checkpoints.pth", name)


def test_a_misspelt_run_is_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("sample", 1000)
    with refused("runs/sampel holds no last.pth", "did you mean sample?"):
        find_run("last.pth", "sampel")
    Path("runs/sampl").mkdir()
    with refused("runs/sampl holds no last.pth", "make it with"):
        find_run("last.pth", "sampl")


def test_a_named_run_is_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run("mine", 1000)
    make_run("newer", 2000)
    assert find_run("last.pth", "mine") == run
    assert find_run("last.pth", str(tmp_path / run)) == tmp_path / run


@pytest.mark.parametrize("name", [None, "absent"])
def test_no_run_is_one_sentence(
    name: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused("last.pth", "python train.py"):
        find_run("last.pth", name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        pass
    assert not stop.requested
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_acts_at_once() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def noise(seed: int, step: int) -> torch.Tensor:
    seed_step(seed, step)
    return torch.rand(4)


def test_noise_is_a_function_of_seed_and_step() -> None:
    first = noise(3, 7)
    torch.rand(100)
    assert torch.equal(noise(3, 7), first)


@pytest.mark.parametrize(("seed", "step"), [(3, 8), (4, 7), (7, 3), (4, 6)])
def test_neighbouring_steps_and_seeds_have_other_noise(seed: int, step: int) -> None:
    assert not torch.equal(noise(seed, step), noise(3, 7))


@pytest.mark.parametrize("asked", [None, "7"])
def test_few_kernels_are_kept_or_as_many_as_the_user_asks(asked: str | None) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    environment = {key: value for key, value in os.environ.items() if key != name} | ({name: asked} if asked else {})
    command = [sys.executable, "-c", f"import utils, os; print(os.environ['{name}'])"]
    root = Path(utils.__file__).parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == f"{asked or 400}\n"


def test_an_explicit_precision_is_honoured() -> None:
    assert pick_precision("fp32", CPU) == torch.float32
    assert pick_precision("bf16", CPU) == torch.bfloat16
    assert pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_json_holds_any_file_name() -> None:
    name = os.fsdecode(b"caf\xe9 \xe7\x8b\x97.jpg")
    assert json.loads(as_json([name]).decode()) == [name]
