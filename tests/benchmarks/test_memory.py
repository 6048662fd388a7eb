"""The memory of training on tars is measured on tars that train.py reads."""

import json
import subprocess
import sys

import pytest

from benchmarks.memory import ROOT


def test_training_on_made_up_tars_is_measured() -> None:
    pytest.importorskip("webdataset", reason="tars need requirements-extras.txt")
    command = [sys.executable, "-m", "benchmarks.memory", "5000"]
    found = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert found["captions"] == 5000
    assert 0.1 < found["memory_gb"] < 3
    assert 20 < found["bytes_per_caption"] < 300
