"""`calibrate.py`: a run says from then on how sure it is, and shows how true that is."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import calibrate
import evaluate
import inference_visualize
from models.confidence import INPUTS
from utils import load_checkpoint, save_checkpoint


def test_a_calibrated_run_says_how_sure_it_is(
    folder: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = [f"{number:02}" for number in range(calibrate.LEAST)]
    Path("many/images").mkdir(parents=True)
    for number in numbers:
        shutil.copy(f"archive/images/{int(number) % 12:02}.jpg", f"many/images/{number}.jpg")
    lines = Path("archive/captions.csv").read_text().splitlines()[1:]
    rows = [f"{number}{line[2:]},val" for number in numbers for line in lines if int(line[:2]) == int(number) % 12]
    Path("many/captions.csv").write_text("\n".join(["image,caption,split", *rows]))
    before = load_checkpoint(Path("runs/flickr8k/checkpoints.pth"))
    save_checkpoint(Path("own/checkpoints.pth"), before)
    assert call(calibrate.main, "--checkpoint", "own/checkpoints.pth", "data.root=many") == 0
    assert "many: " in (printed := capsys.readouterr().out) and "AUC" in printed
    after = load_checkpoint(Path("own/checkpoints.pth"))
    confidence = after.pop("confidence")
    assert len(confidence["weights"]) == len(INPUTS) and math.isfinite(confidence["bias"])
    assert after.keys() == before.keys()
    torch.testing.assert_close(after["decoder"], before["decoder"], rtol=0, atol=0)
    assert min(Image.open("own/reliability.png").size) > 300
    [shown] = json.loads(Path("own/reliability.json").read_text())["datasets"].values()
    assert shown["captions"] == calibrate.LEAST and 0 <= shown["auc"] <= 1

    Path("many/images/03.jpg").write_bytes(b"broken")
    broken = ("data.root=many", "data.broken=skip")
    assert call(calibrate.main, "--checkpoint", "own/checkpoints.pth", *broken) == 0
    assert f"of {calibrate.LEAST - 1} are right" in capsys.readouterr().out

    words = ("--checkpoint", "own/checkpoints.pth")
    assert call(inference_visualize.main, *words, "--images", "archive/images", "--out", "out") == 0
    assert all(0 <= row["confidence"] <= 1 for row in json.loads(Path("out/predictions.json").read_text()))
    assert call(evaluate.main, *words, "--split", "val", "--tokeniser", "words") == 0  # it scores as before


def test_a_few_pictures_are_no_ground_to_be_sure_on(
    folder: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(calibrate.main) == 2
    assert "archive has 2 val pictures, too few" in capsys.readouterr().err


def test_the_half_that_a_captioner_is_surest_of_is_compared_with_the_other() -> None:
    chances, right = np.array([0.9, 0.8, 0.3, 0.1]), np.array([True, True, False, True])
    found = calibrate.judge(chances, right)
    assert (found["surest_half"], found["other_half"], found["right"]) == (1, 0.5, 0.75)
    assert found["auc"] == pytest.approx(2 / 3)  # two of the three that are right are above the one that is not
    assert calibrate.area_under_roc(np.full(4, 0.5), right) == 0.5
    assert math.isnan(calibrate.area_under_roc(chances, np.ones(4, dtype=bool)))


def test_chances_are_of_captions_that_nothing_was_fitted_to() -> None:
    noise = torch.Generator().manual_seed(0)
    inputs, right = torch.randn(60, len(INPUTS), generator=noise), torch.rand(60, generator=noise) < 0.5
    chances = calibrate.cross_validate(inputs, right)
    fitted = np.array(calibrate.Confidence.fit(inputs, right).chances(inputs))
    assert calibrate.area_under_roc(chances, right.numpy()) < calibrate.area_under_roc(fitted, right.numpy())
