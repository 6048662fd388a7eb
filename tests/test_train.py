from cli import run_script

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY

import train
from config import load_config
from data import annotations
from data.dataset import Batch, Share
from data.features import encode_pictures
from data.vocab import build_vocab
from models.consensus import pool
from models.model import CaptionModel
from train import Progress
from training.optim import learning_rate
from training.runs import LOG_COLUMNS
from utils import load_checkpoint

SCRIPT = Path(train.__file__)
FAST = [*TINY, "train.epochs=3", "train.warmup_steps=2", "train.log_every=1", "decoder.dropout=0.3"]

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run train.py's `main` with these words on the command line and return its exit code."""

    def command(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        return run_script(train.main)

    return command


def log_of(name: str) -> str:
    return Path("runs", name, "loss_log.txt").read_text()


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", str(SCRIPT), *FAST, *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout
    assert any(line in printed for printed in process.stdout), process.stderr and process.stderr.read()


def test_a_run_leaves_what_the_design_says(archive: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "run=first") == 0
    log = pd.read_csv("runs/first/loss_log.txt", sep="\t")
    assert log["epoch"].tolist() == [1, 2, 3]
    assert log.columns.tolist() == list(LOG_COLUMNS)
    files = {path.name for path in Path("runs/first").iterdir()}
    assert files == {".lock", "config.yaml", "splits.json", "checkpoints.pth", "last.pth", "loss_log.txt"}
    printed = capsys.readouterr().out
    assert re.search(r"Epoch \[1/3\] Step \[1/2\] Loss \d\.\d{4} Perplexity \d+\.\d", printed)
    assert "next: python inference_visualize.py --run first, python evaluate.py --split val --run first" in printed
    assert "warning" not in printed


def test_a_warm_up_longer_than_training_is_warned_of(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "train.epochs=1", "train.warmup_steps=3") == 0
    assert "warning: train.lr is never reached: train.warmup_steps=3, of 2 steps in all\n" in capsys.readouterr().out


def test_a_finished_run_says_so_when_it_is_resumed(archive: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*FAST, "run=mine", "train.epochs=2", "train.patience=1", "train.lr=1e-9") == 0
    before = log_of("mine")
    capsys.readouterr()
    assert run("--resume", "--config", "configs/lstm.yaml") == 2
    assert "leave --config out" in capsys.readouterr().err
    assert run("--resume", "--run", "mine", "train.epochs=2") == 0
    advice = "python train.py --config runs/mine/config.yaml run=NAME train.start=runs/mine/checkpoints.pth"
    assert f"runs/mine is finished; to train on: {advice}\n" in capsys.readouterr().out
    assert log_of("mine") == before


def test_the_log_tells_teacher_forced_from_generated(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*FAST, "train.epochs=1")
    assert re.search(r"teacher-forced val: loss .* greedy val captions: BLEU-4", capsys.readouterr().out)


def test_self_critical_epochs_draw_captions_without_any_dropout(tiny_config: Callable) -> None:
    model = CaptionModel.build(tiny_config("decoder.num_layers=2"), build_vocab(["a dog runs"], 1)).train()
    train.disable_dropout(model)
    features, tokens = torch.ones(1, 512), torch.tensor([[1, 4, 5]])
    once, again = (model.decoder(features, tokens, torch.tensor([0]))[0] for _ in range(2))
    assert torch.equal(once, again)


def test_the_best_epoch_is_the_one_with_the_best_generated_captions() -> None:
    rows = [{"epoch": 1, "val_loss": 2.0, "val_cider": 10.0}, {"epoch": 2, "val_loss": 2.5, "val_cider": 30.0}]
    assert Progress(history=rows).best["epoch"] == 2


def test_of_equally_good_captions_those_with_the_lowest_loss_are_best() -> None:
    rows = [{"epoch": number, "val_loss": loss, "val_cider": 0.0} for number, loss in enumerate([4.0, 2.0, 3.0], 1)]
    assert Progress(history=rows).best["epoch"] == 2


def test_a_restarted_job_goes_on_with_the_run_it_was_in(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def restarted(*words: str) -> tuple[str | None, bool]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        args = train.parse_args()
        train.resume_after_restart(args)
        return args.run, args.resume

    assert restarted("run=mine") == (None, False)
    Path("runs/mine").mkdir(parents=True)
    Path("runs/mine/last.pth").touch()
    assert restarted("run=mine") == ("mine", True)
    assert restarted("--resume", "--run", "mine") == ("mine", True)
    assert restarted("--resume") == (None, True)  # the newest, which it is


def test_a_killed_run_goes_on_digit_for_digit(archive: Path, run: Run) -> None:
    assert run(*FAST, "run=whole") == 0
    process = start("run=killed", "train.checkpoint_every=1")
    wait_for(process, "Epoch [2/3] Step [1/2]")
    process.kill()
    process.wait()
    assert run("--resume", "--run", "killed") == 0
    assert log_of("killed") == log_of("whole")
    whole, killed = (load_checkpoint(f"runs/{name}/last.pth")["decoder"] for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


CRITICAL = (
    *("train.start=runs/first/checkpoints.pth", "train.epochs=2", "train.mirror=true"),
    *("train.self_critical_epochs=2", "train.self_critical_samples=2"),
)


def test_self_critical_training_goes_on_from_a_trained_model(archive: Path, run: Run) -> None:
    attention = [*FAST, "decoder.name=attention", "train.doubly_stochastic=1"]
    assert run(*attention, "run=first") == 0
    assert run(*attention, *CRITICAL, "run=second", "train.self_critical_lr=1e-9", "train.ema=0") == 0
    first, second = (load_checkpoint(f"runs/{name}/checkpoints.pth") for name in ("first", "second"))
    assert second["vocabulary"] == first["vocabulary"]
    assert torch.equal(second["feature_mean"], first["feature_mean"])
    torch.testing.assert_close(second["decoder"], first["decoder"])
    assert second["scores"]["val_cider"] == first["scores"]["val_cider"]


def test_self_critical_training_is_resumed_digit_for_digit(archive: Path, run: Run) -> None:
    assert run(*FAST, "decoder.name=transformer", "run=first") == 0
    words = [*FAST, "decoder.name=transformer", *CRITICAL]
    assert run(*words, "run=whole") == 0
    process = start(*words, "run=killed", "train.checkpoint_every=1")
    wait_for(process, "Epoch [2/2] Step [1/2]")
    process.kill()
    process.wait()
    assert run("--resume", "--run", "killed") == 0
    assert log_of("killed") == log_of("whole")
    whole, killed = (load_checkpoint(f"runs/{name}/last.pth") for name in ("whole", "killed"))
    assert all(torch.equal(whole["decoder"][name], killed["decoder"][name]) for name in whole["decoder"])


def test_the_last_epochs_are_self_critical_with_a_learning_rate_of_their_own(archive: Path, run: Run) -> None:
    words = ["train.epochs=3", "train.self_critical_epochs=1", "train.lr=1e-2", "train.self_critical_lr=1e-3"]
    assert run(*FAST, *words, "run=both") == 0
    rates = pd.read_csv("runs/both/loss_log.txt", sep="\t")["lr"].tolist()
    expected = [learning_rate(*schedule) for schedule in ((1, 4, 2, 1e-2), (3, 4, 2, 1e-2), (1, 2, 2, 1e-3))]
    assert rates == pytest.approx(expected, abs=1e-8)


def test_a_start_of_other_shapes_is_refused_with_the_settings_that_differ(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "run=first", "train.epochs=1") == 0
    other = ("decoder.hidden_size=31", "encoder.image_size=null", "encoder.name=resnet34")
    assert run(*FAST, *CRITICAL, "run=second", "decoder.dropout=0", *other) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "runs/first/checkpoints.pth" in error
    assert "another encoder.name (resnet18 there, resnet34 here), encoder.image_size (32 there, null here)" in error
    assert error.endswith("with: encoder.name=resnet18 encoder.image_size=32 decoder.hidden_size=32")
    assert not Path("runs/second").exists()


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_saves_says_how_to_go_on_and_loses_nothing(archive: Path, run: Run) -> None:
    assert run(*FAST, "run=whole") == 0
    process = start("run=stopped")
    wait_for(process, "Epoch [2/3] Step [1/2]")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "python train.py --resume --run stopped" in output
    assert "Traceback" not in errors
    assert run("--resume", "run=stopped") == 0
    assert log_of("stopped") == log_of("whole")


def test_an_existing_run_is_kept(archive: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(*FAST, "run=mine", "train.epochs=1")
    before = log_of("mine")
    assert run(*FAST, "run=mine") == 2
    assert re.search("error: .*--resume.*run=.*--overwrite", capsys.readouterr().err)
    assert log_of("mine") == before
    assert run(*FAST, "run=mine", "train.epochs=2", "--overwrite") == 0
    assert len(log_of("mine").splitlines()) == 3


def test_overwriting_leaves_alone_what_the_scripts_did_not_write(archive: Path, run: Run) -> None:
    run(*FAST, "run=mine", "train.epochs=1")
    Path("runs/mine/notes.txt").write_text("keep me")
    stale = [Path("runs/mine", name) for name in ("loss_curve.png", "scores-val.json", "predictions-test.json")]
    for path in stale:
        path.write_text("of the old run")
    run(*FAST, "run=mine", "train.epochs=1", "--overwrite")
    assert Path("runs/mine/notes.txt").is_file()
    assert not any(path.exists() for path in stale)


@pytest.mark.parametrize("name", ["sample", "mine"])
def test_only_the_samples_own_run_starts_again_unasked(name: str, archive: Path, run: Run) -> None:
    words = [*FAST, f"run={name}", "train.epochs=1", "data.format=sample", "encoder.image_size=32"]
    assert run(*words) == 0
    assert run(*words) == (0 if name == "sample" else 2)


def test_a_bad_dataset_does_not_cost_the_run_that_was_to_be_overwritten(archive: Path, run: Run) -> None:
    run(*FAST, "run=mine", "train.epochs=1")
    (archive / "images" / "00.jpg").unlink()
    assert run(*FAST, "run=mine", "--overwrite") == 2
    assert load_checkpoint("runs/mine/checkpoints.pth")


def test_training_stops_early_when_captions_get_no_better(archive: Path, run: Run) -> None:
    assert run(*FAST, "run=patient", "train.epochs=50", "train.patience=2", "train.lr=1e-9") == 0
    assert len(log_of("patient").splitlines()) == 1 + 3


def test_with_no_dataset_and_nothing_asked_the_sample_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "train.seed=3"])
    config = train.choose_config(train.parse_args())
    assert (config.run, config.data.format, config.train.seed) == ("sample", "sample", 3)
    assert "no dataset at archive/" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["data.root=elsewhere"], ["--config", str(SCRIPT.with_name("config.yaml"))]])
def test_a_dataset_asked_for_and_missing_is_an_error(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert "there is no captions file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda root: (root / "images/03.jpg").write_bytes(b"\xff\xd8\xff half a picture"), ["03.jpg", "cannot read"]),
        (lambda root: (root / "images/03.jpg").unlink(), ["names 1 of 12 pictures", "03.jpg"]),
        (lambda root: (root / "captions.csv").write_text("picture;text\n"), ["captions.csv", "image,caption"]),
        (lambda root: (root / "Flickr_8k.devImages.txt").unlink(), ["no val pictures"]),
    ],
)
def test_bad_data_ends_in_one_sentence(
    break_it: Callable[[Path], object], words: list[str], archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(archive)
    assert run(*FAST) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert all(word in errors[-1] for word in words)
    assert not Path("runs").exists()


def test_the_vocabulary_knows_training_captions_only(archive: Path, run: Run) -> None:
    captions = archive / "captions.csv"
    captions.write_text(captions.read_text() + "08.jpg,zebra zebra zebra\n00.jpg,giraffe\n")
    assert run(*FAST, "train.epochs=1") == 0
    words = load_checkpoint("runs/flickr8k/last.pth")["vocabulary"]["words"]
    assert "giraffe" in words
    assert "zebra" not in words


def test_an_unfrozen_backbone_is_trained_but_not_its_batchnorm_statistics(archive: Path, run: Run) -> None:
    assert run(*FAST, "encoder.frozen=false", "train.epochs=1", "train.num_workers=0", "train.lr=0.1") == 0
    trained = load_checkpoint("runs/flickr8k/last.pth")["backbone"]
    config = load_config(overrides=[*TINY, "encoder.frozen=false"])
    untouched = CaptionModel.build(config, build_vocab(["a b"], 1)).encoder.backbone.state_dict()
    moved = {name for name in trained if not torch.equal(trained[name], untouched[name])}
    assert moved
    assert not any("running" in name or "num_batches" in name for name in moved)


@pytest.mark.parametrize(
    "words", [[], ["encoder.frozen=false", "encoder.stages=[layer4]", "train.num_workers=0", "train.encoder_lr=3e-3"]]
)
def test_a_run_that_ranks_by_consensus_keeps_what_people_say_of_training_pictures(
    words: list[str], archive: Path, run: Run
) -> None:
    assert run(*FAST, "train.epochs=1", "search.consensus=5", *words) == 0
    saved = load_checkpoint("runs/flickr8k/checkpoints.pth")
    assert len(saved["consensus"]["pictures"]) == 8
    assert len(saved["consensus"]["lengths"]) == 40
    model = CaptionModel.from_checkpoint("runs/flickr8k/checkpoints.pth")
    (picture, *_), folder = annotations.load(model.config.data)["image"], Path("archive/images")
    features = encode_pictures(model, [picture], folder, torch.device("cpu")).take([picture])
    consensus = model.consensus
    assert consensus
    looks = torch.nn.functional.normalize(pool(features) - consensus.centre)  # (1, D)
    # What is remembered is what the backbone in the file sees, whose weights are averages, not the last ones.
    torch.testing.assert_close(looks, consensus.pictures[:1], atol=2e-3, rtol=0)
    assert model.caption(folder / picture)


def test_what_is_not_trained_to_the_end_captions_without_consensus(
    archive: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.Trainer, "add_consensus", lambda trainer: None)
    assert run(*FAST, "train.epochs=1", "search.consensus=5") == 0
    model = CaptionModel.from_checkpoint("runs/flickr8k/checkpoints.pth")
    assert model.caption(next(Path("archive/images").iterdir()))


def test_what_people_say_is_added_to_a_finished_run(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "train.epochs=1") == 0
    before = load_checkpoint("runs/flickr8k/checkpoints.pth")
    assert before["consensus"] is None
    for weight in (3, 7):
        assert run("--resume", f"search.consensus={weight}") == 0
        assert "what people say of 8 training pictures" in capsys.readouterr().out
        after = load_checkpoint("runs/flickr8k/checkpoints.pth")
        assert after["config"]["search"] == before["config"]["search"] | {"consensus": weight}
        assert len(after["consensus"]["pictures"]) == 8
    assert after["scores"] == before["scores"]
    torch.testing.assert_close(after["decoder"], before["decoder"], rtol=0, atol=0)


def test_a_seeded_split_is_kept_with_the_run(archive: Path, run: Run) -> None:
    for path in archive.glob("Flickr_8k.*"):
        path.unlink()
    assert run(*FAST, "train.epochs=1") == 0
    splits = json.loads(Path("runs/flickr8k/splits.json").read_text())
    assert [len(splits[name]) for name in ("train", "val", "test")] == [10, 1, 1]


def test_a_loss_that_is_not_finite_stops_and_spares_the_checkpoints(
    archive: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, seen = train.Trainer.step, list[set[str]]()

    def watched(self: train.Trainer, batch: Batch, share: Share, lr: float) -> torch.Tensor:
        seen.append({self.train_set.images[place] for place in batch.images})  # type: ignore[union-attr]
        return step(self, batch, share, lr)

    monkeypatch.setattr(train.Trainer, "step", watched)
    monkeypatch.setattr(train, "learning_rate", lambda step, *_: float("nan") if step == 4 else 1e-4)
    assert run(*FAST, "decoder.name=attention", "train.batch_size=10") == 2  # batches of two pictures
    error = capsys.readouterr().err
    assert "the loss became NaN or infinite in step 6 of runs" in error and "of step 4" in error
    assert set(re.findall(r"0\d.jpg", error)) == seen[5] != seen[4]
    assert all(torch.isfinite(t).all() for t in load_checkpoint("runs/flickr8k/last.pth")["decoder"].values())


def test_a_start_that_is_not_there_is_refused_with_the_recipe_that_makes_it(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "train.start=runs/attention/checkpoints.pth") == 2
    error = capsys.readouterr().err
    assert "runs/attention/checkpoints.pth" in error and "--config configs/attention.yaml" in error
    assert not Path("runs").exists()


def test_resuming_without_a_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--resume") == 2
    assert "no run under runs/ holds a last.pth" in capsys.readouterr().err


def test_a_last_pth_that_was_not_left_by_training_is_refused(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run(*FAST, "train.epochs=1")
    shutil.copy("runs/flickr8k/checkpoints.pth", "runs/flickr8k/last.pth")
    assert run("--resume") == 2
    assert "lacks its averaged" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_never_kept_though_the_loss_was(
    archive: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = train.clip_gradients

    def poison(optimiser: torch.optim.AdamW, limit: float) -> torch.Tensor:
        optimiser.param_groups[0]["params"][0].grad.fill_(math.inf)
        return clip(optimiser, limit)

    assert run(*FAST, "train.epochs=1") == 0
    before = {name: Path("runs/flickr8k", name).read_bytes() for name in ("last.pth", "checkpoints.pth")}
    monkeypatch.setattr(train, "clip_gradients", poison)
    assert run(*FAST, "run=other", "train.log_every=100") == 2
    assert "in step 1 of runs" in capsys.readouterr().err
    assert load_checkpoint("runs/other/last.pth")["progress"]["step"] == 0
    assert not Path("runs/other/checkpoints.pth").exists()
    assert before == {name: Path("runs/flickr8k", name).read_bytes() for name in before}


def test_weights_that_are_not_finite_are_never_kept_though_loss_and_gradient_were(
    archive: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*FAST, "train.epochs=1", "train.batch_size=100", "train.lr=3e38", "train.ema=0") == 2
    assert "in step 1 of runs" in capsys.readouterr().err
    assert not Path("runs/flickr8k/checkpoints.pth").exists()
    assert all(torch.isfinite(t).all() for t in load_checkpoint("runs/flickr8k/last.pth")["decoder"].values())
