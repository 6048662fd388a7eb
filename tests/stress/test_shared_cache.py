"""Several users train, evaluate and caption with one cache, while pictures and files of the cache change."""

import json
import os
import random
import re
import shutil
import signal
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

from PIL import Image, ImageOps

import evaluate
import inference_visualize
import train
from stress import runs
from stress.conftest import Tally

# With smaller pictures, one that is encoded alone has other bits than beside others.
COMMON = [runs.BACKBONE, "encoder.image_size=224", "data.shard_rows=5", "data.cache=cache"]
TRAININGS = {  # of three lengths
    "first": [],
    "second": ["train.seed=1", "decoder.hidden_size=16", "train.epochs=6"],
    "third": ["data.root=copied", "train.epochs=8"],  # the same pictures in another place
}
READERS = {"evaluation": evaluate.main, "captioning": inference_visualize.main}
RESULTS = {"evaluation": "predictions-test.json", "captioning": "predictions.json"}
# for which a broken picture gives cause
REASONS = "cannot read the picture|pictures cannot be read|changed while it was being encoded"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Users:
    """Trainings, an evaluation and a captioning, which begin again whenever they have ended."""

    def __init__(self, tally: Tally) -> None:
        self.tally, self.rng = tally, random.Random(0)
        self.processes: dict[str, ForkProcess] = {}
        self.finished = dict.fromkeys(TRAININGS, 0)
        self.starts = self.signals = self.compared = 0

    def run_of(self, name: str) -> str:
        return f"{name}-{self.finished[name]}"

    def start(self, name: str) -> None:
        self.starts += 1
        log = Path(f"{name}.log")
        log.unlink(missing_ok=True)
        if name in TRAININGS:
            words = runs.start_or_resume(self.run_of(name), *COMMON, *TRAININGS[name])
            self.processes[name] = runs.fork(train.main, words, log)
        else:
            shutil.rmtree(name, ignore_errors=True)
            words = ["--checkpoint", "runs/undisturbed-first/checkpoints.pth", "--out", name, "data.cache=cache"]
            words += ["--tokeniser", "words"] if name == "evaluation" else []
            self.processes[name] = runs.fork(READERS[name], words, log)

    def end(self, name: str) -> int:
        """Wait until a process has ended, and check how it did."""
        code = runs.wait(self.processes.pop(name))
        said = Path(f"{name}.log").read_text()
        fine = "Traceback" not in said and code in (0, 2, 130, -signal.SIGKILL, -signal.SIGTERM)
        if code == 2:
            fine = runs.refused(code, said) and re.search(REASONS, said) is not None
        elif code == 0 and name in TRAININGS:
            fine &= not runs.differs(self.run_of(name), f"undisturbed-{name}")
            shutil.rmtree(Path("runs", self.run_of(name)))
            self.finished[name] += 1
            self.compared += 1
        elif code == 0:
            fine &= self.same_results(name, said)
            self.compared += 1
        self.tally(fine, f"{name} ended with {code}", said)
        return code

    def same_results(self, name: str, said: str) -> bool:
        """Whether captions, and scores, are those of the undisturbed ones; a broken picture may lack a caption."""
        found, usual = (json.loads(Path(folder, RESULTS[name]).read_text()) for folder in (name, f"undisturbed-{name}"))
        if name == "evaluation":
            scores, before = (
                json.loads(Path(folder, "scores-test.json").read_text()) | {"images_per_second": 0}
                for folder in (name, f"undisturbed-{name}")
            )
            return found == usual and scores == before
        return found == usual or ("skipped: " in said and all(row in usual for row in found))

    def disturb(self) -> None:
        """Do something that happens to programs, pictures or the cache."""
        match self.rng.randrange(6):
            case 0 | 1 if self.processes:
                process = self.processes[self.rng.choice([*self.processes])]
                if process.pid and process.is_alive():  # and not reaped, so that nobody else has its number
                    os.kill(process.pid, self.rng.choice(SIGNALS))
                    self.signals += 1
            case 2 | 3:
                for picture in self.rng.sample(pictures(), 2):
                    replace(picture, picture.read_bytes())
            case 4:
                picture = self.rng.choice(pictures())
                content = picture.read_bytes()
                replace(picture, b"no picture")
                time.sleep(self.rng.uniform(0, 1))
                replace(picture, content)
            case _:
                files = [path for path in Path("cache").rglob("*.*") if not path.name.startswith(".")]
                for path in self.rng.sample(files, min(2, len(files))):
                    path.unlink(missing_ok=True)


def pictures() -> list[Path]:
    return [path for folder in ("archive", "copied") for path in sorted(Path(folder, "images").glob("*.jpg"))]


def replace(picture: Path, content: bytes) -> None:
    """Replace a picture as whole: another file of the same name, with another mtime."""
    Path("new").write_bytes(content)
    os.replace("new", picture)


def test_shared_cache(tally: Tally, archive: Path) -> None:
    """one cache shared by three trainings, an evaluation and a captioning, with kills, rewritten and broken pictures"""
    shutil.copytree("archive", "copied")
    runs.save_backbone()
    users = Users(tally)
    for name, words in TRAININGS.items():
        runs.finish(f"undisturbed-{name}", *COMMON, "data.cache=cache-undisturbed", *words)
    for name in READERS:
        users.start(name)
        assert runs.wait(users.processes.pop(name)) == 0, Path(f"{name}.log").read_text()
        Path(name).rename(f"undisturbed-{name}")

    began, at_once = time.monotonic(), 0
    while time.monotonic() < began + (20 if tally.short else 3600):
        for name in (*TRAININGS, *READERS):
            if name not in users.processes:
                users.start(name)
        time.sleep(users.rng.uniform(0.2, 1))
        at_once = max(at_once, sum(users.processes[name].is_alive() for name in TRAININGS))
        users.disturb()
        for name in [name for name, process in users.processes.items() if not process.is_alive()]:
            users.end(name)
    for name in [*users.processes]:
        users.end(name)
    for name in (*TRAININGS, *READERS):  # once more, and now to the end
        users.start(name)
    for name in [*users.processes]:
        tally(users.end(name) == 0, f"{name} did not end well, with nothing that disturbed it")
    tally(at_once == len(TRAININGS), f"only {at_once} trainings ran at once")
    took, compared = round(time.monotonic() - began), f"{users.compared} results compared bit for bit"
    tally.figures = f"in {took} s: {users.starts} starts, {users.signals} signals, {compared}"
    keep_mapped(tally)


def keep_mapped(tally: Tally) -> None:
    """Change all pixels while a training is held, and encode them by another one: the first goes on as it began."""
    shutil.copytree("archive", "changing")
    words, log = [*COMMON, "data.root=changing"], Path("mapped.log")
    process = runs.fork(train.main, [*runs.start("mapped"), *words], log)
    runs.wait_for(log, "Epoch [1/")
    assert process.pid
    os.kill(process.pid, signal.SIGSTOP)
    assert "best epoch" not in log.read_text()
    for picture in Path("changing/images").iterdir():
        ImageOps.invert(Image.open(picture)).save("inverted.png")
        replace(picture, Path("inverted.png").read_bytes())
    runs.finish("changed", *words)
    os.kill(process.pid, signal.SIGCONT)
    fine = runs.wait(process) == 0 and not runs.differs("mapped", "undisturbed-first")
    tally(fine, "a training did not keep the features that it began with", log.read_text())
    tally(runs.differs("changed", "undisturbed-first"), "pictures that changed were not encoded anew")
