"""What train.py promises: files, exit codes and sentences, and a run that goes on digit for digit after any stop."""

import contextlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY
from dataset_files import run as call_script

import evaluate
import inference_visualize
import train
import utils
import visualize_loss
from captioning import Captioner
from config import load_config
from data import sample
from data.transforms import open_picture
from data.vocab import build_vocab
from models.model import CaptionModel
from training.state import Progress
from utils import load_checkpoint

SCRIPT = Path(train.__file__)
FAST = (*TINY, "train.epochs=3", "train.warmup_steps=2", "train.log_every=1", "decoder.dropout=0.3")
CRITICAL = (
    *("train.loss=self_critical", "train.start=runs/first/checkpoints.pth", "train.epochs=2"),
    *("train.self_critical_samples=2", "train.mirror=true"),
)
FILES = {".lock", "config.yaml", "splits.json", "checkpoints.pth", "last.pth", "loss_log.txt"}
Run = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(call: Callable[..., int]) -> Run:
    """Run train.py with these words on the command line and return its exit code."""
    return lambda *words: call(train.main, *words)


@pytest.fixture(scope="module")
def finished(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny dataset and `runs/first`, trained for three epochs; printed.txt is what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(drawn, folder / "archive")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        assert call_script(train.main, *FAST, "run=first") == 0
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


@pytest.fixture
def first(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/first` in a copy of that folder, the working folder; models are large, and only replaced."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pth") else shutil.copy2)(source, target)

    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, copy_function=copy)
    monkeypatch.chdir(tmp_path)
    return Path("runs/first")


def log_of(name: str) -> str:
    return Path("runs", name, "loss_log.txt").read_text()


def last_line(capsys: Capture) -> str:
    """Return the one sentence that a script ended with."""
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    return errors[-1]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_its_settings_and_two_checkpoints(finished: Path) -> None:
    folder, printed = finished / "runs/first", (finished / "printed.txt").read_text()
    log = pd.read_csv(folder / "loss_log.txt", sep="\t")
    scores = ["train_loss", "val_loss", "val_perplexity", "val_bleu4", "val_cider"]
    assert log.columns.tolist() == ["epoch", "step", "lr", *scores]
    assert log[["epoch", "step"]].values.tolist() == [[1, 2], [2, 4], [3, 6]]
    assert {path.name for path in folder.iterdir()} == FILES
    assert printed.startswith(f"writing to {finished / 'runs/first'}, and to the cache {finished / 'cache'}\n")
    assert re.search(r"\ndata: archive/captions.csv: train 8 pictures with 40 captions, val 2 .*, test 2 ", printed)
    assert re.search(r"Epoch \[1/3\] Step \[1/2\] Loss \d\.\d{4} Perplexity \d+\.\d", printed)
    assert re.search(r"Epoch \[1/3\] .* teacher-forced val: loss .* greedy val captions: BLEU-4 .*, CIDEr", printed)
    assert "    08.jpg: " in printed
    assert "next: python inference_visualize.py --run first, python evaluate.py --split val --run first" in printed
    assert "warning" not in printed
    assert "scores of fewer than 30 val pictures are mostly chance" in printed
    best = load_checkpoint(folder / "checkpoints.pth")["scores"]
    assert best in log.to_dict("records") and best["val_cider"] == log["val_cider"].max()


def test_gradients_are_clipped(first: Path, run: Run) -> None:
    assert run(*FAST, "run=still", "train.clip_norm=1e-12") == 0  # which leaves the weights where they were
    still, moved = (pd.read_csv(f"runs/{name}/loss_log.txt", sep="\t")["val_loss"] for name in ("still", "first"))
    assert still.max() - still.min() < 0.01 < still.iloc[-1] - moved.iloc[-1]


@pytest.mark.parametrize(
    ("losses", "ciders", "best"), [([2, 2.5, 3], [10, 30, 20], 2), ([4, 2, 3], [0, 0, 0], 2), ([4, 2, 2], [0, 0, 0], 2)]
)
def test_the_best_epoch_has_the_best_captions_or_of_equals_the_lowest_loss(
    losses: list[float], ciders: list[float], best: int
) -> None:
    rows = [{"epoch": n, "val_loss": a, "val_cider": b} for n, a, b in zip((1, 2, 3), losses, ciders, strict=True)]
    assert Progress(history=rows).best["epoch"] == best


def test_training_stops_early_when_captions_get_no_better(archive: Path, run: Run, capsys: Capture) -> None:
    assert run(*FAST, "run=patient", "train.epochs=50", "train.patience=2", "train.lr=1e-9") == 0
    assert len(log_of("patient").splitlines()) == 1 + 3
    assert "no better CIDEr for 2 epochs: stopped early\n" in capsys.readouterr().out


def test_the_vocabulary_knows_training_captions_only(archive: Path, run: Run) -> None:
    captions = archive / "captions.csv"
    captions.write_text(captions.read_text() + "08.jpg,zebra zebra zebra\n00.jpg,giraffe\n")
    assert run(*FAST, "train.epochs=1") == 0
    words = load_checkpoint("runs/flickr8k/last.pth")["vocabulary"]["words"]
    assert "giraffe" in words and "zebra" not in words


def test_a_vocabulary_that_min_count_empties_is_told(archive: Path, run: Run, capsys: Capture) -> None:
    assert run(*FAST, "train.epochs=1", "data.min_count=35") == 0
    assert re.search(
        r"warning: data\.min_count=35 leaves \d+ of \d+ different words, \d+% of what the captions say; "
        r"data\.min_count=1 keeps them all",
        capsys.readouterr().out,
    )
    assert run(*FAST, "train.epochs=1", "run=all", "data.min_count=1") == 0
    assert "warning" not in capsys.readouterr().out


def test_accumulated_batches_learn_as_one_large_batch_does(archive: Path, run: Run) -> None:
    exact = ("decoder.dropout=0", "train.label_smoothing=0", *FAST[:-1])
    assert run(*exact, "run=large", "train.batch_size=20") == 0
    assert run(*exact, "run=parts", "train.batch_size=5", "train.accumulate=4") == 0
    large, parts = (pd.read_csv(f"runs/{name}/loss_log.txt", sep="\t") for name in ("large", "parts"))
    assert large["step"].tolist() == parts["step"].tolist()
    for column in ("train_loss", "val_loss"):
        assert parts[column].tolist() == pytest.approx(large[column].tolist(), abs=2e-3)


def test_checkpoints_of_steps_are_kept_where_that_is_asked_for(archive: Path, run: Run) -> None:
    assert run(*FAST, "train.keep_every=2") == 0
    kept = sorted(Path("runs/flickr8k").glob("step-*.pth"))
    assert [path.name for path in kept] == ["step-0000002.pth", "step-0000004.pth", "step-0000006.pth"]
    assert call_script(inference_visualize.main, "--checkpoint", kept[0], "archive/images/00.jpg", "--out", "out") == 0
    assert run(*FAST, "--overwrite", "train.epochs=1") == 0
    assert not list(Path("runs/flickr8k").glob("step-*.pth"))


def test_pictures_of_ones_own_are_learned_from_the_pretrained_captioner(archive: Path, run: Run) -> None:
    shutil.copytree(archive, "mine", ignore=shutil.ignore_patterns("Flickr*"))
    assert run("--config", "own", "data.root=mine", "train.epochs=1", "train.mirror=false", "train.log_every=9") == 0
    assert call_script(inference_visualize.main, "--run", "own", "mine/images/00.jpg", "--out", "out") == 0
    assert len(Path("out/captions.csv").read_text().splitlines()) == 2


def test_a_captioner_does_not_go_on_in_a_language_that_it_has_no_words_for(
    archive: Path, run: Run, capsys: Capture
) -> None:
    lines = "".join(f"{number:02}.jpg,Ein rotes Haus auf grünem Grund\n" for number in range(12))
    (archive / "captions.csv").write_text(f"image,caption\n{lines}")
    assert run("--config", "own", "data.root=archive", "train.mirror=false") == 2
    error = last_line(capsys)
    assert "knows only" in error and "of the words in these captions" in error and "train.start=null" in error


def test_a_quiet_run_prints_nothing_but_what_goes_wrong(archive: Path, run: Run, capsys: Capture) -> None:
    assert run(*FAST, "--quiet", "train.epochs=1") == 0
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""
    assert run(*FAST, "--quiet", "train.epochs=1") == 2
    assert "already exists" in capsys.readouterr().err


def test_a_trained_backbone_keeps_its_batchnorm_statistics(archive: Path, run: Run) -> None:
    words = ["encoder.frozen=false", "train.augment=[color_jitter, random_crop]", "train.num_workers=0", "train.lr=0.1"]
    assert run(*FAST, "train.epochs=1", *words) == 0
    trained = load_checkpoint("runs/flickr8k/last.pth")["backbone"]
    config = load_config(overrides=[*TINY, "encoder.frozen=false"])
    untouched = CaptionModel.build(config, build_vocab(["a b"], 1)).encoder.backbone.state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], untouched[name])}
    assert moved
    assert not any("running" in name or "num_batches" in name for name in moved)


def test_a_seeded_split_is_kept_with_the_run_and_what_a_killed_run_left_is_swept_away(archive: Path, run: Run) -> None:
    for path in archive.glob("Flickr_8k.*"):
        path.unlink()
    folder = Path("runs/flickr8k")
    folder.mkdir(parents=True)
    for name in (".last.pth.x1y2z3", ".config.yaml.abc", "config.yaml", "splits.json", ".lock"):
        (folder / name).touch()  # before its first checkpoint
    assert run(*FAST, "train.epochs=1") == 0
    splits = json.loads((folder / "splits.json").read_text())
    assert [len(splits[name]) for name in ("train", "val", "test")] == [10, 1, 1]
    assert {path.name for path in folder.iterdir()} == FILES


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("train.loss=crossentropy", ["train.loss = crossentropy is unknown", "did you mean cross_entropy?"]),
        ("decoder.name=atention", ["decoder.name = atention is unknown", "did you mean attention?"]),
        ("decoder.name=gpt", ["decoder.name = gpt is unknown", "lstm, attention, transformer"]),
        ("encoder.name=resnet81", ["encoder.name", "resnet81", "did you mean resnet18?"]),
        ("data.format=coko", ["data.format = coko is unknown", "did you mean coco?"]),
        ("data.language=zh-character", ["data.language", "did you mean zh-characters?"]),
        (
            "encoder.frozen=false train.augment=[random_crops]",
            ["train.augment = random_crops", "did you mean random_crop?"],
        ),
        ("train.doubly_stochastic=1", ["train.doubly_stochastic", "decoder.name"]),
        ("train.loss=self_critical", ["train.loss=self_critical", "train.start=runs/NAME/checkpoints.pth"]),
        ("--run mine", ["--run goes with --resume", "run=mine"]),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_any_data_is_read(
    words: str, told: list[str], archive: Path, run: Run, capsys: Capture
) -> None:
    (archive / "captions.csv").write_bytes(b"\xff\xfe broken")
    assert run(*FAST, *words.split()) == 2
    error = last_line(capsys)
    assert all(word in error for word in told), error
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [(), ("encoder.frozen=false", "train.lr=1e-5")])
def test_broken_pictures_may_be_skipped_and_are_counted(
    words: tuple[str, ...], run: Run, archive: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("03.jpg", "08.jpg"):  # one of train and one of val
        (archive / "images" / name).write_bytes(b"\xff\xd8\xff half a picture")
    assert run(*FAST, "data.broken=skip", *words) == 0
    printed = capsys.readouterr().out
    assert "left out 2 pictures (03.jpg, 08.jpg) that cannot be read" in printed
    for split, number in (("val", 1), ("test", 2)):
        assert call_script(evaluate.main, "--split", split, "--tokeniser", "words") == 0
        assert f"|n:{number}|" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (
            lambda root: (root / "images/03.jpg").write_bytes(b"\xff\xd8\xff half a picture"),
            ["03.jpg", "cannot read", "data.broken=skip"],
        ),
        (lambda root: (root / "images/03.jpg").unlink(), ["names 1 of 12 pictures", "03.jpg"]),
        (lambda root: (root / "captions.csv").write_text("foto;words\n"), ["captions.csv", "image;caption"]),
        (lambda root: (root / "Flickr_8k.devImages.txt").unlink(), ["no val pictures"]),
    ],
)
def test_bad_data_ends_in_one_sentence(
    break_it: Callable[[Path], object], told: list[str], archive: Path, run: Run, capsys: Capture
) -> None:
    break_it(archive)
    assert run(*FAST) == 2
    error = last_line(capsys)
    assert all(word in error for word in told), error
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["data.root=elsewhere"], ["--config", str(SCRIPT.with_name("config.yaml"))]])
def test_a_dataset_asked_for_and_missing_is_an_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert "there is no folder" in last_line(capsys)


def test_with_no_dataset_and_nothing_asked_the_sample_is_trained_again_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "COUNTS", {"train": 8, "dev": 2, "test": 2})
    words = [word for word in FAST if not word.startswith("data.")]
    for begun in ("no dataset at archive/", "runs/sample is started again"):
        assert run(*words, "train.epochs=1") == 0
        assert begun in capsys.readouterr().out
    assert load_checkpoint("runs/sample/last.pth")["config"]["data"]["format"] == "sample"
    words = ["run=mine", "data.root=cache/sample", "data.format=sample", *FAST, "train.epochs=1"]
    assert [run(*words) for _ in range(2)] == [0, 2]  # a run with another name is kept


def test_the_old_sample_is_there_until_a_new_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "COUNTS", {"train": 8, "dev": 2, "test": 2})
    words = [word for word in FAST if not word.startswith("data.")]
    assert run(*words, "train.epochs=1") == 0
    assert call_script(inference_visualize.main) == 0
    assert call_script(evaluate.main, "--tokeniser", "words") == 0
    old = {
        path: path.read_bytes() for path in Path("runs/sample").iterdir() if path.suffix in (".json", ".html", ".txt")
    }
    old[Path("runs/sample/checkpoints.pth")] = Path("runs/sample/checkpoints.pth").read_bytes()

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("training.monitor.Monitor.after_step", interrupt)
        assert run(*words, "train.epochs=1", "train.seed=5") == 130
    assert {path: path.read_bytes() for path in old} == old
    assert call_script(visualize_loss.main) == call_script(inference_visualize.main, "--limit", "1") == 0
    assert run("--resume") == 0  # of which no page and no score is there yet
    left = {path.name for path in Path("runs/sample").iterdir()}
    assert left >= {"checkpoints.pth", "loss_log.txt"} and not left & {
        "outputs",
        "predictions.json",
        "scores-test.json",
    }


# ---- runs that exist -------------------------------------------------------------------------------------------------


def test_a_run_is_overwritten_only_when_that_is_asked_for(first: Path, run: Run, capsys: Capture) -> None:
    before = log_of("first")
    assert run(*FAST, "run=first") == 2
    assert re.search("error: .*--resume.*run=.*--overwrite", last_line(capsys))
    picture = Path("archive/images/00.jpg").rename("00.jpg")
    assert run(*FAST, "run=first", "--overwrite") == 2  # bad data costs nothing
    assert log_of("first") == before and (first / "checkpoints.pth").is_file()

    picture.rename("archive/images/00.jpg")
    own = [first / name for name in ("notes.txt", ".notes.txt.swp")]
    stale = [first / n for n in ("loss_curve.png", "scores-val.json", "predictions-test.json", "consensus.pth")]
    for path in (*own, *stale):
        path.write_text("of the old run")
    assert run(*FAST, "run=first", "train.epochs=1", "--overwrite") == 0
    assert len(log_of("first").splitlines()) == 1 + 1
    assert all(path.is_file() for path in own)
    assert not any(path.exists() for path in stale)


def test_a_finished_run_says_so_when_it_is_resumed(first: Path, run: Run, capsys: Capture) -> None:
    before = log_of("first")
    assert run("--resume", "--config", "configs/lstm.yaml") == 2
    assert "leave --config out" in last_line(capsys)
    assert run("--resume", "--run", "first", "train.epochs=3") == 0
    advice = "python train.py --config runs/first/config.yaml run=NAME train.start=runs/first/checkpoints.pth"
    assert f"runs/first is finished; to train on: {advice}\n" in capsys.readouterr().out
    assert log_of("first") == before


def test_a_run_that_cannot_be_resumed_says_why(first: Path, run: Run, capsys: Capture) -> None:
    assert run("--resume", "train.lr=1") == 2
    assert "train.lr is fixed in the checkpoint" in last_line(capsys)
    shutil.copy("runs/first/checkpoints.pth", "runs/first/other.pth")
    os.replace("runs/first/other.pth", "runs/first/last.pth")
    assert run("--resume") == 2
    assert "runs/first/last.pth does not hold the whole state of a training run" in last_line(capsys)
    (first / "last.pth").unlink()
    assert run("--resume") == 2
    assert "no run under runs/ holds a last.pth" in last_line(capsys)


def add_captions() -> None:
    with open("archive/captions.csv", "a") as file:
        file.write("00.jpg,a caption more\n")


def remove_picture() -> None:
    table = Path("archive/captions.csv")
    table.write_text("".join(line for line in table.read_text().splitlines(True) if not line.startswith("03.jpg")))


def swap_lists() -> None:
    train_list, dev_list = Path("archive/Flickr_8k.trainImages.txt"), Path("archive/Flickr_8k.devImages.txt")
    train_list.write_text(train_list.read_text().replace("00.jpg", "08.jpg"))
    dev_list.write_text(dev_list.read_text().replace("08.jpg", "00.jpg"))


def change_caption() -> None:
    table = Path("archive/captions.csv")
    table.write_text(table.read_text().replace("a ", "the ", 1))


def swap_captions() -> None:
    table = Path("archive/captions.csv")
    header, first, second, *others = table.read_text().splitlines(True)
    table.write_text("".join([header, second, first, *others]))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (add_captions, "captions of the same pictures differ"),
        (change_caption, "captions of the same pictures differ"),
        (swap_captions, "captions of the same pictures differ"),
        (remove_picture, "pictures are gone (1, such as 03.jpg)"),
        (
            swap_lists,
            "held-out pictures are for training now (1, such as 08.jpg) and other pictures are held out now (1, ",
        ),
    ],
)
def test_a_run_is_not_resumed_with_other_data_unless_told_so(
    change: Callable[[], None], told: str, first: Path, run: Run, capsys: Capture
) -> None:
    change()
    assert run("--resume", "--run", "first") == 2
    error = last_line(capsys)
    assert told in error
    assert run(*error.partition("python train.py ")[2].split()) == 0
    assert told in capsys.readouterr().out
    assert run("--resume", "--run", "first") == 0  # it is the run's data from now on


def test_a_run_that_lost_its_splits_is_not_resumed_unless_told_so(first: Path, run: Run, capsys: Capture) -> None:
    (first / "splits.json").unlink()
    assert run("--resume", "--run", "first") == 2
    error = last_line(capsys)
    assert "the data of runs/first has changed since it began: its splits.json is lost" in error
    assert run(*error.partition("python train.py ")[2].split()) == run("--resume", "--run", "first") == 0


def test_a_run_is_resumed_where_its_dataset_has_moved_or_its_pictures_were_only_touched(first: Path, run: Run) -> None:
    for picture in Path("archive/images").iterdir():
        picture.touch()
    Path("archive").rename("elsewhere")
    assert run("--resume", "--run", "first", "data.root=elsewhere") == 0
    assert run("--changed-data") == 2


def test_a_job_that_torchrun_starts_again_goes_on_with_its_run(
    first: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    before = log_of("first")
    assert run(*FAST, "run=first") == run("--resume", "--run", "first") == 0
    assert capsys.readouterr().out.count("runs/first is finished") == 2
    assert log_of("first") == before
    (first / "last.pth").unlink()  # it died before its first checkpoint
    assert run(*FAST, "run=first", "train.epochs=1") == 0
    assert len(log_of("first").splitlines()) == 1 + 1


# ---- runs that are stopped -------------------------------------------------------------------------------------------


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(SCRIPT), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout
    assert any(line in printed for printed in process.stdout), process.stderr and process.stderr.read()


@pytest.mark.parametrize("words", [("decoder.name=attention",), CRITICAL], ids=["cross_entropy", "self_critical"])
def test_a_killed_run_goes_on_digit_for_digit(words: tuple[str, ...], first: Path, run: Run) -> None:
    words = (*FAST, *words, "train.batch_size=5")  # eight steps in an epoch, of which last.pth is in the middle
    assert run(*words, "run=whole") == 0
    process = start(*words, "run=killed", "train.checkpoint_every=1")
    wait_for(process, "Epoch [2/")
    wait_for(process, "Step [4/8]")
    process.kill()
    process.wait()
    assert run("--resume", "--run", "killed") == 0
    assert log_of("killed") == log_of("whole")
    whole, killed = (load_checkpoint(f"runs/{name}/last.pth")["decoder"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_a_run_is_trained_by_one_process_at_a_time_and_ctrl_c_saves_and_says_how_to_go_on(
    first: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    process = start(*FAST, "run=stopped")
    wait_for(process, "Epoch [2/3] Step [1/2]")
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(utils, "PATIENCE", 0.1)
    for words in (["--resume", "--run", "stopped"], [*FAST, "run=stopped", "--overwrite"]):
        assert run(*words) == 2
        who = f"another process ({process.pid} on {platform.node()}) is training in runs/stopped"
        assert f"{who}; wait until it ends, stop it, or start another run: run=NAME" in last_line(capsys)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; resume with: python train.py --resume --run stopped" in output
    assert "Traceback" not in errors
    assert run("--resume", "run=stopped") == 0
    assert log_of("stopped") == log_of("first")


# ---- runs that go on from others -------------------------------------------------------------------------------------


def test_self_critical_training_is_a_run_of_its_own_and_goes_on_from_what_was_learned(first: Path, run: Run) -> None:
    assert run(*FAST, *CRITICAL, "run=second", "train.lr=1e-7", "train.ema=0") == 0
    log = pd.read_csv("runs/second/loss_log.txt", sep="\t")
    assert log[["epoch", "step", "lr"]].values.tolist() == [[1, 2, 1e-7], [2, 4, 3e-8]]
    assert len(log_of("first").splitlines()) == 1 + 3
    before, after = (load_checkpoint(f"runs/{name}/checkpoints.pth") for name in ("first", "second"))
    assert after["vocabulary"] == before["vocabulary"]
    assert torch.equal(after["feature_mean"], before["feature_mean"])
    torch.testing.assert_close(after["decoder"], before["decoder"])
    assert after["scores"]["val_cider"] == before["scores"]["val_cider"]


def test_a_start_of_other_shapes_is_refused_with_the_settings_that_differ_and_a_missing_one_with_its_recipe(
    first: Path, run: Run, capsys: Capture
) -> None:
    other = ("decoder.hidden_size=31", "encoder.image_size=null", "encoder.name=resnet34", "decoder.dropout=0")
    assert run(*FAST, *CRITICAL, "run=second", *other) == 2
    error = last_line(capsys)
    assert "runs/first/checkpoints.pth was trained with another" in error
    assert "decoder.hidden_size, encoder.image_size, encoder.name; start from it with" in error
    assert error.endswith("with: decoder.hidden_size=32 encoder.image_size=32 encoder.name=resnet18")
    assert run(*FAST, "run=second", "train.start=runs/attention/checkpoints.pth") == 2
    error = last_line(capsys)
    assert "runs/attention/checkpoints.pth" in error and "--config configs/attention.yaml" in error
    assert not Path("runs/second").exists()


# ---- consensus.pth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [[], ["encoder.frozen=false", "encoder.stages=[layer4]", "train.num_workers=0", "train.encoder_lr=3e-3"]]
)
def test_a_run_that_ranks_by_consensus_writes_what_people_say_of_training_pictures(
    words: list[str], archive: Path, run: Run, capsys: Capture
) -> None:
    assert run(*FAST, "train.epochs=1", "search.consensus=5", *words) == 0
    assert "wrote runs/flickr8k/consensus.pth: a beam's captions are re-ranked by the human" in capsys.readouterr().out
    saved = load_checkpoint("runs/flickr8k/consensus.pth")
    assert (len(saved["embeddings"]), len(saved["lengths"])) == (8, 40)
    # What is remembered is what the backbone in the file sees, whose weights are averages, not the last ones.
    captioner = Captioner.load("runs/flickr8k/checkpoints.pth")
    picture = Path("archive/images/00.jpg")
    [features] = captioner.encode([partial(open_picture, picture)])
    pooled = torch.as_tensor(features).float() - saved["centre"]  # (D,)
    torch.testing.assert_close(pooled / pooled.norm(), saved["embeddings"][0].float(), atol=2e-3, rtol=0)
    assert captioner.caption(picture)


def test_consensus_is_added_to_a_finished_run(first: Path, run: Run, capsys: Capture) -> None:
    before = load_checkpoint(first / "checkpoints.pth")
    for weight, written in ((3, True), (7, False)):
        assert run("--resume", "--run", "first", f"search.consensus={weight}") == 0
        assert ("wrote runs/first/consensus.pth" in capsys.readouterr().out) == written
        after = load_checkpoint(first / "checkpoints.pth")
        assert after["config"]["search"] == before["config"]["search"] | {"consensus": weight}
    assert after["scores"] == before["scores"]
    torch.testing.assert_close(after["decoder"], before["decoder"], rtol=0, atol=0)
    (first / "consensus.pth").write_bytes(b"damaged")
    assert run("--resume", "--run", "first") == 0
    assert len(load_checkpoint(first / "consensus.pth")["embeddings"]) == 8
