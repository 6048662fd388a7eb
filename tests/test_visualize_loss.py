"""The loss curve: which logs are read, and what is drawn."""

import os
import re
from collections.abc import Callable
from functools import partial
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
Script = Callable[..., int]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., int]) -> Script:
    """Runs the script with the given words in an empty folder, and returns its exit code."""
    monkeypatch.chdir(tmp_path)
    return partial(call, visualize_loss.main)


def write_log(run: str | Path, log: str = HEADER + "".join(ROWS)) -> Path:
    path = Path(run, "loss_log.txt")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(log)
    return path


def test_without_arguments_it_draws_the_newest_run_and_says_which(
    script: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    write_log("runs/new")
    os.utime(write_log("runs/old"), (0, 0))
    assert script() == 0
    curve = Path("runs", "new", "loss_curve.png")
    assert capsys.readouterr().out == f"newest run: new\nwrote {curve}\n"
    assert min(Image.open(curve).size) > 400
    assert not Path("runs", "old", "loss_curve.png").exists()


def test_several_runs_share_one_figure_named_as_they_were_asked_for(script: Script) -> None:
    for run in ("runs/lstm", "runs/other", "elsewhere/lstm"):
        write_log(run)
    for runs, labels in (
        (["lstm", "lstm", "other"], ["lstm", "other"]),
        (["lstm", "elsewhere/lstm"], ["lstm", "elsewhere/lstm"]),
    ):
        assert script("--run", *runs, "--out", "figures/curve.svg") == 0
        svg = Path("figures", "curve.svg").read_text(encoding="utf-8")
        assert re.findall("<!-- (.*): best epoch 2, CIDEr 55.5 -->", svg) == labels
    assert script("--run", "lstm", "runs/other") == 0
    assert list(Path().rglob("*.png")) == [Path("loss_curve.png")]


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        ("", "has no finished epoch yet"),
        (HEADER, "has no finished epoch yet"),
        (HEADER.replace("val_cider", "cider") + ROWS[0], "does not hold the columns"),
        (HEADER + "1\toops\n" + ROWS[1], "does not hold the columns"),
        (HEADER + ROWS[0] + "2\t0.001\n" + ROWS[2], "does not hold the columns"),
        (HEADER + ROWS[0] + ROWS[1].replace("55.5", ""), "does not hold the columns"),
    ],
)
def test_a_log_that_cannot_be_drawn_is_explained_in_one_sentence(
    script: Script, capsys: pytest.CaptureFixture[str], log: str, complaint: str
) -> None:
    path = write_log("runs/lstm", log)
    assert script("--run", "lstm") == 2
    error = capsys.readouterr().err
    assert complaint in error and str(path) in error and error.count("\n") == 1
    assert not Path("runs", "lstm", "loss_curve.png").exists()


@pytest.mark.parametrize(
    "words",
    [["--run", "nowhere"], ["--run", "lstm", "--out", "curve.doc"], ["--epochs", "3"], ["--out"], ["train.epochs=3"]],
)
def test_wrong_arguments_end_with_code_2(script: Script, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    write_log("runs/lstm")
    assert script(*words) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_figure_shows_every_curve_and_names_the_best_epoch(tmp_path: Path) -> None:
    curves = visualize_loss.read_log(write_log(tmp_path / "run"))
    figure = visualize_loss.draw({"lstm": curves})
    drawn = {tuple(np.asarray(line.get_ydata())) for axes in figure.axes for line in axes.get_lines()}
    assert {tuple(values) for column, values in curves.items() if column != "epoch"} <= drawn
    assert figure.legends[0].get_texts()[0].get_text() == "lstm: best epoch 2, CIDEr 55.5"
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["3", "20.1", "18", "55.5"]
    equal = {"epoch": [1.0, 2.0, 3.0], "val_cider": [0.0, 0.0, 0.0], "val_loss": [4.0, 2.0, 3.0]}
    assert visualize_loss.best_epoch(equal) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e308", "1e400"])
def test_a_number_that_no_axis_can_show_is_a_gap(script: Script, value: str) -> None:
    runs = [f"odd{column}" for column in range(2, 7)]
    for column, name in enumerate(runs, start=2):
        cells = ROWS[1].strip().split("\t")
        cells[column] = value
        write_log(f"runs/{name}", HEADER + ROWS[0] + "\t".join(cells) + "\n" + ROWS[2])
    assert script("--run", *runs) == 0
    write_log("runs/odd", HEADER + "\t".join(["1", "1", *[value] * 5]) + "\n")
    assert script("--run", "odd") == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a$b$", "$", "_a", "$\\bad$", "a_b^{c}", "%s", "ä"])
def test_a_run_is_named_as_it_is_called(script: Script, name: str) -> None:
    write_log(f"elsewhere/{name}")
    assert script("--run", f"elsewhere/{name}", "--out", "curve.svg") == 0
    figure = visualize_loss.draw({name: visualize_loss.read_log(Path(f"elsewhere/{name}/loss_log.txt"))})
    assert figure.legends[0].get_texts()[0].get_text().strip() == f"{name}: best epoch 2, CIDEr 55.5".replace(
        "$", r"\$"
    )


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_epoch_ticks_are_whole_numbers_and_no_axis_goes_below_zero(tmp_path: Path, epochs: int) -> None:
    low = ["1\t1e-05\t0.2\t0.1\t1.1\t0.3\t0.5\n", "2\t1e-05\t9.0\t8.0\t90.0\t40.0\t90.0\n", ROWS[2]]
    figure = visualize_loss.draw({"run": visualize_loss.read_log(write_log(tmp_path, HEADER + "".join(low[:epochs])))})
    for axes in figure.axes:
        assert len(axes.get_xticks()) and (axes.get_xticks() % 1 == 0).all()
        assert axes.get_ylim()[0] >= 0
