"""The loss curve: which log is read, what is made of unfinished ones, and what is drawn."""

from cli import UserError, run_script

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import visualize_loss

HEADER = "epoch\tlr\ttrain_loss\tval_loss\tval_perplexity\tval_bleu4\tval_cider\n"
ROWS = [
    "1\t0.001\t4.0\t3.5\t33.1\t10.0\t30.0\n",
    "2\t0.001\t3.0\t3.0\t20.1\t18.0\t55.5\n",
    "3\t1e-05\t2.5\t3.1\t22.2\t17.0\t52.0\n",
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_run(name: str, log: str = HEADER + "".join(ROWS)) -> Path:
    path = Path("runs", name, "loss_log.txt")
    path.parent.mkdir(parents=True)
    path.write_text(log)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["visualize_loss.py", *words])
    return run_script(visualize_loss.main)


def test_without_arguments_it_draws_the_newest_run_and_says_which(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("new")
    os.utime(write_run("old"), (0, 0))
    assert run(monkeypatch) == 0
    curve = Path("runs", "new", "loss_curve.png")
    assert capsys.readouterr().out == f"newest run: {curve.parent}\nwrote {curve}\n"
    assert min(Image.open(curve).size) > 400
    assert not Path("runs", "old", "loss_curve.png").exists()


def test_several_runs_share_one_figure_in_the_current_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("lstm")
    write_run("attention", HEADER + ROWS[0])
    assert run(monkeypatch, "--run", "lstm", "runs/attention") == 0
    assert [path.name for path in home.rglob("*.png")] == ["loss_curve.png"]
    assert Path("loss_curve.png").exists()


def test_out_chooses_place_and_format(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run("lstm")
    assert run(monkeypatch, "--out", "figures/curve.svg") == 0
    assert "<svg" in Path("figures", "curve.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (HEADER, "has no finished epoch yet"),
        (HEADER + "1\t0.0", "has no finished epoch yet"),
        ("", "has no column epoch"),
        (HEADER.replace("val_cider", "cider") + ROWS[0], "has no column val_cider"),
        (HEADER + "1\toops\n" + ROWS[1], "line 2 does not hold one number per column"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_explained_in_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], log: str, complaint: str
) -> None:
    path = write_run("lstm", log)
    assert run(monkeypatch, "--run", "lstm") == 2
    error = capsys.readouterr().err
    assert complaint in error and str(path) in error and error.count("\n") == 1
    assert not Path("runs", "lstm", "loss_curve.png").exists()


@pytest.mark.parametrize(
    "words",
    [["--run", "nowhere"], ["--run", "lstm", "--out", "curve.doc"], ["--epochs", "3"], ["--out"], ["train.epochs=3"]],
)
def test_a_wrong_name_ends_with_code_2(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    write_run("lstm")
    assert run(monkeypatch, *words) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("half", ["3", "3\t0.001\t2.5\t", "3\t0.001\t2.5\t3.1\t22.2\t17.0\t"])
def test_a_half_written_last_line_is_left_out(home: Path, half: str) -> None:
    curves = visualize_loss.read_log(write_run("lstm", HEADER + ROWS[0] + ROWS[1] + half))
    assert curves["epoch"] == [1, 2]
    assert curves["val_cider"] == [30.0, 55.5]


def test_a_damaged_line_before_the_last_is_not_passed_over(home: Path) -> None:
    with pytest.raises(UserError, match="line 3"):
        visualize_loss.read_log(write_run("lstm", HEADER + ROWS[0] + "2\t0.001\n" + ROWS[2]))


def test_the_figure_shows_every_curve_and_names_the_best_epoch(home: Path) -> None:
    curves = visualize_loss.read_log(write_run("lstm"))
    figure = visualize_loss.draw({"lstm": curves})
    drawn = {tuple(np.asarray(line.get_ydata())) for axes in figure.axes for line in axes.get_lines()}
    assert {tuple(values) for column, values in curves.items() if column != "epoch"} <= drawn
    assert figure.legends[0].get_texts()[0].get_text() == "lstm: best epoch 2, CIDEr 55.5"
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["3", "20.1", "18", "55.5"]


def test_epoch_ticks_are_whole_numbers_even_for_one_epoch(home: Path) -> None:
    for count in (1, 2, 3):
        curves = {name: values[:count] for name, values in visualize_loss.read_log(write_run(f"{count}")).items()}
        figure = visualize_loss.draw({"run": curves})
        assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())
        assert all(len(axes.get_xticks()) for axes in figure.axes)


def test_no_axis_goes_below_zero(home: Path) -> None:
    low = "1\t1e-05\t0.2\t0.1\t1.1\t0.3\t0.5\n2\t1e-05\t9.0\t8.0\t90.0\t40.0\t90.0\n"
    figure = visualize_loss.draw({"lstm": visualize_loss.read_log(write_run("lstm", HEADER + low))})
    assert [axes.get_ylim()[0] for axes in figure.axes] == [0, 0, 0, 0]


def test_a_diverged_run_is_drawn_with_the_best_epoch_before(home: Path) -> None:
    curves = visualize_loss.read_log(write_run("lstm", HEADER + ROWS[0] + "2\t1\tnan\tnan\t1e304\t0\tnan\n"))
    assert visualize_loss.best_epoch(curves) == 0
    visualize_loss.draw({"lstm": curves}).canvas.draw()
    assert visualize_loss.best_epoch({"val_cider": [math.nan]}) is None


def test_of_equally_good_epochs_the_one_that_training_keeps_is_marked() -> None:
    assert visualize_loss.best_epoch({"val_cider": [0.0, 0.0, 0.0], "val_loss": [4.0, 2.0, 3.0]}) == 1


def test_runs_of_one_name_in_different_folders_are_told_apart() -> None:
    runs: dict[Path, visualize_loss.Curves] = {Path("a/lstm"): {}, Path("b/lstm"): {}}
    assert list(visualize_loss.label(runs)) == [str(Path("a/lstm")), str(Path("b/lstm"))]
    assert list(visualize_loss.label({Path("a/lstm"): {}})) == ["lstm"]
