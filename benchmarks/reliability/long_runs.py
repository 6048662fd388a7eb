"""Long runs: memory and open files have to stay as they are, and what is written has to open at once."""

import os
import re
import tempfile
import time
from pathlib import Path

import torch

import render
import train
import visualize_loss
from benchmarks.reliability.faults import note, refused, run, wait_for
from benchmarks.reliability.kills import Result, in_folder, outcome
from benchmarks.reliability.strangers import browse
from benchmarks.reliability.tiny import SMALLEST, fork
from data.dataset import Features
from utils import load_checkpoint

EPOCHS, CAPTIONS, CARDS = 2000, 100_000, 20_000
GROWN = 20  # MB between the first tenth and the end, at most
OPENED = 5  # seconds


def resident(pid: int) -> float:
    """Return the MB that a process has of its own."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[0]) / 1024


def handles(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def many_epochs(epochs: int = EPOCHS) -> Result:
    """Train for 2,000 epochs; memory and handles at the end are those after a tenth of them."""

    def check() -> Result:
        result, log = Result(), Path("long.log")
        words = [*SMALLEST, "run=long", f"train.epochs={epochs}", "train.checkpoint_every=1000", "train.log_every=1000"]
        pid = fork(train.main, words, log, lambda: None)
        wait_for(log, f"Epoch [{epochs // 10}/", 3600)
        memory, files = resident(pid), handles(pid)
        wait_for(log, f"Epoch [{epochs - 1}/", 3600 * 3)
        grown, more = resident(pid) - memory, handles(pid) - files
        note(result, outcome(pid) == 0, "the run", log.read_text())
        note(result, grown < GROWN, f"memory grew by {grown:.0f} MB")
        note(result, more == 0, f"{more} more handles")
        began = time.monotonic()
        code, said = run(visualize_loss.main, "--run", "long")
        took = time.monotonic() - began
        note(result, code == 0 and took < OPENED, f"the curve took {took:.1f} s", said)
        result.figures = f"{epochs:,} epochs: {grown:+.1f} MB, {more:+} handles, loss curve drawn in {took:.1f} s"
        return result

    return in_folder(check)


def many_captions(captions: int = CAPTIONS) -> Result:
    """Decode 100,000 captions in one process."""
    from models.model import CaptionModel

    def check() -> Result:
        result = Result()
        model = CaptionModel.from_state(load_checkpoint("runs/whole/checkpoints.pth"), "a.pth").eval()
        names = [f"{number}.jpg" for number in range(captions // 10)]
        features = Features([torch.randn(len(names), 512).half()], names)
        measured = []
        for _ in range(10):
            model.caption_all(features, names)
            measured.append((resident(os.getpid()), handles(os.getpid())))
        grown, more = measured[-1][0] - measured[0][0], measured[-1][1] - measured[0][1]
        note(result, grown < GROWN, f"memory grew by {grown:.0f} MB")
        note(result, more == 0, f"{more} more handles")
        result.figures = f"{captions:,} captions: {grown:+.1f} MB, {more:+} handles"
        return result

    return in_folder(check)


def large_gallery(cards: int = CARDS) -> Result:
    """Open a page of 20,000 pictures in Chromium, by the page's own clock: from its address to its first cards."""
    result = Result()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder, "page.html")
        with render.Gallery(page, "large") as gallery:
            for number in range(cards):
                texts = [f"a dog number {number} runs through the grass with a stick"]
                gallery.add(f"outputs/{number}.jpg", texts, texts * 5, size=(500, 375), name=f"{number}.jpg")
        with open(page, "a") as file:
            file.write("<script>document.title = performance.now()</script>")
        times = []
        for _ in range(3):
            dom = browse(page)
            note(result, f">{cards:,} pictures<" in dom and dom.count("<article") == 61, "the page", dom[:500])
            times.append(float(re.findall("<title>(.*?)</title>", dom)[0]) / 1000)
            note(result, times[-1] < OPENED, f"took {times[-1]:.1f} s")
        result.figures = f"{page.stat().st_size / 1e6:.0f} MB: its first cards are there after {max(times):.1f} s"
    return result


def poisoned() -> Result:
    """Train with learning rates at which the loss explodes; nothing that is not finite may be written."""

    def check() -> Result:
        result = Result()
        for number, rate in enumerate(["3e38", "1e30", "1e20", "1e12"]):
            for kind in ("lstm", "attention", "transformer"):
                for every in (1, 1000):
                    name = f"poisoned{number}{kind}{every}"
                    words = [
                        *SMALLEST,
                        f"run={name}",
                        f"train.lr={rate}",
                        f"decoder.name={kind}",
                        "train.clip_norm=1e30",
                    ]
                    words += [f"train.log_every={every}", f"train.checkpoint_every={every}"]
                    code, said = run(train.main, *words)
                    pattern = (
                        r"error: the loss became NaN or infinite in step \d+ of runs/\S+ on 0\d.jpg, .* of step \d+:"
                    )
                    told = refused(code, said) and re.search(f"{pattern}|numbers overflow", said) is not None
                    states = [load_checkpoint(path) for path in Path("runs", name).glob("*.pth")]
                    tensors = [tensor for state in states for tensor in state["decoder"].values()]
                    finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
                    note(result, finite and (told or code == 0), f"{kind} at {rate}, checked every {every} steps", said)
        return result

    return in_folder(check)
