"""Runs every script with sockets blocked: nothing but the documented downloads may look for the network."""

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.reliability.faults import ROOT, note
from benchmarks.reliability.kills import Result, in_folder
from benchmarks.reliability.tiny import SMALLEST

BLOCKED = """
import runpy, sys

def block(event, words):
    network = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if network or event == "socket.connect" and isinstance(words[1], tuple):
        print(f"BLOCKED {event} {words[1:]}", file=sys.stderr, flush=True)
        raise PermissionError("sockets are blocked")

sys.addaudithook(block)
sys.argv.pop(0)
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SCRIPTS = (
    ("train.py", *SMALLEST, "run=offline"),
    ("train.py", *SMALLEST, "run=pixels", "encoder.frozen=false", "train.num_workers=1", "train.epochs=1"),
    ("train.py", "--config", "configs/sample.yaml", "run=sampled", "train.epochs=1", "encoder.image_size=32"),
    ("evaluate.py", "--run", "offline"),
    ("evaluate.py", "--compare", "offline"),
    ("inference_visualize.py", "--run", "offline"),
    ("visualize_loss.py", "--run", "offline"),
    ("data/annotations.py", "archive"),
    ("data/download.py", "kaggle"),
)


def blocked(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process where each attempt to reach the network is told and fails."""
    words = tuple(str(ROOT / word) if word.startswith("configs/") else word for word in words)
    command = [sys.executable, "-c", BLOCKED, str(ROOT), str(ROOT / script), *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def offline() -> Result:
    def check() -> Result:
        result = Result()
        for script, *words in SCRIPTS:
            ended = blocked(script, *words)
            note(result, ended.returncode == 0 and "BLOCKED" not in ended.stderr, script, ended.stderr)
        needs = blocked("train.py", *SMALLEST, "run=weights", "encoder.weights=IMAGENET1K_V1")
        cached = (Path.home() / ".cache/torch/hub/checkpoints").is_dir()
        fine = needs.returncode == 2 and "cannot download https://download.pytorch.org" in needs.stderr
        note(result, fine or (cached and needs.returncode == 0), "weights that have to be downloaded", needs.stderr)
        return result

    return in_folder(check)
