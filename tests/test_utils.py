"""Checkpoints survive full disks and strangers, runs are found, signals noted, and noise comes from (seed, step)."""

import contextlib
import errno
import json
import os
import pickle
import platform
import signal
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import utils
from cli import UserError
from utils import (
    StopRequest,
    as_json,
    find_run,
    hold,
    load_checkpoint,
    pick_precision,
    save_checkpoint,
    seed_step,
    unique_name,
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, refused: Callable) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for place in (tmp_path / "pipe", tmp_path / "link", tmp_path):
        with refused(f"cannot write {place}: it is no file but a folder, a pipe or a device"):
            write_atomically(place, b"new")
    assert not (tmp_path / "pipe").is_file() and (tmp_path / "link").is_symlink()


def test_a_file_that_is_replaced_has_the_usual_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"1")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, full_disk: Callable, monkeypatch: pytest.MonkeyPatch, refused: Callable
) -> None:
    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})
    with refused(str(path), "make room"):  # a folder that cannot be made
        save_checkpoint(path / "a.pth", CHECKPOINT)
    with full_disk(20_000), refused(str(path), "make room"):
        save_checkpoint(path, CHECKPOINT)
    monkeypatch.setattr(os, "fsync", fail)  # as disks do that notice when they are flushed
    with refused(str(path), "No space left"):
        save_checkpoint(path, CHECKPOINT)
    assert load_checkpoint(path)["step"] == 1
    assert names(tmp_path) == ["last.pth"]


@pytest.mark.parametrize("letter", ["a", "é", "🐱", "\udcff"])
def test_a_file_may_have_the_longest_name_there_is(letter: str, tmp_path: Path) -> None:
    name = letter * (255 // len(os.fsencode(letter)))
    write_atomically(tmp_path / name, b"1")
    assert names(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"1"


def test_names_of_drawings_differ_and_fit_with_what_comes_behind_them() -> None:
    taken = dict[str, int]()
    assert [unique_name(name, taken) for name in ("a", "A", "a-2", "b")] == ["a", "A-2", "a-2-2", "b"]
    long = [unique_name("🐱" * 63, taken, ending) for ending in ("", "-attention", "", "-attention")]
    assert long == ["🐱" * 60, "🐱" * 57 + "-attention", "🐱" * 59 + "-2", "🐱" * 57 + "-attention-2"]
    assert [unique_name(name, taken) for name in (".", "..", "...hidden")] == ["picture", "picture-2", "hidden"]


def test_a_name_that_thousands_of_folders_have_is_numbered_without_trying_the_numbers_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried = mock.Mock(wraps=utils.cut_name)
    monkeypatch.setattr(utils, "cut_name", tried)
    taken = dict[str, int]()
    assert [unique_name("0001", taken) for _ in range(1000)] == ["0001", *(f"0001-{n}" for n in range(2, 1001))]
    assert tried.call_count <= 2000


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "replace", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"


# ---- files that are no checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_checkpoint_cut_short_is_refused(share: float, tmp_path: Path, refused: Callable) -> None:
    path = tmp_path / "last.pth"
    save_checkpoint(path, CHECKPOINT)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with refused("last.pth", "cut short"):
        load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_with_a_wrong_byte_is_read_or_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", {"words": ["a", "dog"], "weight": torch.ones(2)})
    content = (tmp_path / "a.pth").read_bytes()
    for place in range(0, len(content), 3):
        (tmp_path / "wrong.pth").write_bytes(content[:place] + b"\xe5" + content[place + 1 :])
        with contextlib.suppress(UserError):
            assert isinstance(load_checkpoint(tmp_path / "wrong.pth"), dict)


class Intruder:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("content", [b"not a checkpoint", pickle.dumps({"step": 1}), b"PK\x05\x06" + bytes(18)])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path, refused: Callable) -> None:
    (tmp_path / "other.pth").write_bytes(content)
    with refused("other.pth is not a checkpoint of this project (image-captioning/2), or was cut short"):
        load_checkpoint(tmp_path / "other.pth")


def test_a_torch_file_of_another_project_and_code_in_one_are_refused(tmp_path: Path, refused: Callable) -> None:
    path, evil = tmp_path / "other.pth", {"format": utils.CHECKPOINT_FORMAT, "x": Intruder(tmp_path / "intruded")}
    for saved in ({"weight": torch.ones(2)}, [1, 2], {"format": torch.ones(2)}, torch.ones(2), evil):
        torch.save(saved, path)
        with refused("other.pth is not a checkpoint of this project"):
            load_checkpoint(path)
    path.write_bytes(pickle.dumps(evil))
    with refused("other.pth is not a checkpoint of this project"):
        load_checkpoint(path)
    assert names(tmp_path) == ["other.pth"]
    torch.save(CHECKPOINT | {"format": "image-captioning/1"}, path)
    with refused("other.pth is not a checkpoint of this project (image-captioning/2)", "train again"):
        load_checkpoint(path)


def test_a_zip_that_swells_is_refused(tmp_path: Path, refused: Callable) -> None:
    save_checkpoint(tmp_path / "a.pth", CHECKPOINT)
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with refused("b.pth", "not a checkpoint"):
        load_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize("name", ["absent.pth", "."])
def test_a_checkpoint_that_is_not_there_is_refused(name: str, tmp_path: Path, refused: Callable) -> None:
    with refused(str(tmp_path / name), "no checkpoint"):
        load_checkpoint(tmp_path / name)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`make_run("a", 1000)` makes a run of this age in the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, mtime: int, file: str = "last.pth") -> Path:
        path = Path("runs", name, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (mtime, mtime))
        return path.parent

    return make


def test_a_run_is_found_by_name_or_path_or_as_the_newest_that_holds_the_file(make_run: Callable[..., Path]) -> None:
    old, new, other = make_run("b", 1000), make_run("a", 2000), make_run("c", 3000, "loss_log.txt")
    assert find_run("last.pth") == new
    assert find_run("loss_log.txt") == other
    assert find_run("last.pth", accept=lambda run: run != new) == old
    assert find_run("last.pth", "b") == old
    assert find_run("last.pth", str(old.resolve())) == old.resolve()


def test_a_run_that_is_not_there_is_refused_with_the_command_that_makes_it(
    make_run: Callable[..., Path], refused: Callable
) -> None:
    for name in (None, "absent"):
        with refused("last.pth", "python train.py"):
            find_run("last.pth", name)
    make_run("begun", 1000)
    commands = {"begun": "--resume --run begun", "attention": "--config configs/attention.yaml", "mine": "run=mine"}
    for name, command in commands.items():
        with refused(f"runs/{name} holds no checkpoints.pth", f"python train.py {command}"):
            find_run("checkpoints.pth", name)
    with refused("runs/begin holds no last.pth", "did you mean begun?"):
        find_run("last.pth", "begin")
    Path("runs/begin").mkdir()
    with refused("runs/begin holds no last.pth", "make it with"):
        find_run("last.pth", "begin")


# ---- signals, noise and the rest -------------------------------------------------------------------------------------


STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    outside = signal.signal(number, signal.SIG_DFL)  # nohup, too, may have started the tests
    before = [*map(signal.getsignal, STOPS)]
    with StopRequest():
        pass
    assert [*map(signal.getsignal, STOPS)] == before
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert [*map(signal.getsignal, STOPS)] == before
    signal.signal(number, outside)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    signal.signal(signal.SIGHUP, before)


def test_who_holds_a_lock_is_told(tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "PATIENCE", 0)
    with hold(tmp_path / "lock", "at work"):
        again = partial(hold, tmp_path / "lock", "at work", "wait")
        with refused(f"another process ({os.getpid()} on {platform.node()}) is at work; wait"), again():
            pass
        (tmp_path / "lock-holder").unlink()
        with refused("another process is at work; wait"), again():
            pass
    assert names(tmp_path) == ["lock"]


def test_a_second_interrupt_acts_at_once() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_noise_is_a_function_of_seed_and_step() -> None:
    def noise(seed: int, step: int) -> list[float]:
        seed_step(seed, step)
        return torch.rand(4).tolist()

    first = noise(3, 7)
    torch.rand(100)
    assert noise(3, 7) == first
    assert all(noise(seed, step) != first for seed, step in ((3, 8), (4, 7), (7, 3), (4, 6)))


def test_an_explicit_precision_is_honoured() -> None:
    assert pick_precision("fp32", CPU) == torch.float32
    assert pick_precision("bf16", CPU) == torch.bfloat16
    assert pick_precision("auto", CPU) in (torch.float32, torch.bfloat16)


def test_json_holds_any_file_name() -> None:
    name = os.fsdecode(b"caf\xe9 \xe7\x8b\x97.jpg")
    assert json.loads(as_json([name]).decode()) == [name]
