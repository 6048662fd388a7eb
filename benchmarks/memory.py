"""Measure the memory of training on many captions in tar shards: `python -m benchmarks.memory 1000000`.

Captions and pictures are made up, written as real tars, and trained on for an epoch by train.py, with models so small
that the dataset is what takes memory. Prints JSON. A million captions take more than 25 minutes.
"""

from cli import run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import gc
import io
import json
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from benchmarks.workload import EACH, make_captions
from data.dataset import Flickr8kDataset
from data.folders import ImageFolders
from data.tokens import tokenise
from data.transforms import Transform
from data.vocab import build_vocab
from training.setup import index_images

ROOT = Path(__file__).parents[1]
PICTURES = 1000  # in a tar
VALIDATION = 20  # pictures of the first tar
DIFFERENT = 2500  # words, so few that any number of captions has all of them: models are then of one size
COUNTED = 100_000  # captions that the dataset's own memory is measured on
SETTINGS = (
    *("encoder.name=resnet18", "encoder.weights=null", "encoder.image_size=32", "data.min_count=1"),
    *("decoder.embed_size=16", "decoder.hidden_size=32", "train.batch_size=1000", "train.epochs=1", "run=tars"),
    *("train.log_every=100000", "train.checkpoint_every=100000", "train.warmup_steps=1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=int, help="such as 1000000, a multiple of 5000")
    captions = parser.parse_args().captions
    with tempfile.TemporaryDirectory() as folder:
        tars = write_tars(Path(folder), captions)
        status, memory = run_and_watch("train.py", f"data.shards={tars}", *SETTINGS, cwd=folder)
    if status:
        raise SystemExit(status)
    found = {"captions": captions, "memory_gb": round(memory, 3), "bytes_per_caption": round(held_per_caption(), 1)}
    print(json.dumps(found))


def write_tars(folder: Path, captions: int) -> str:
    """Write tars with so many captions, five for each picture, and return the pattern that names them."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    last = captions // (PICTURES * EACH) - 1
    for number in range(last + 1):
        texts = make_captions(PICTURES * EACH, rng, DIFFERENT)
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for picture in range(PICTURES):
                split = "val" if number == 0 and picture < VALIDATION else "train"
                sample = {"captions": texts[picture * EACH : (picture + 1) * EACH], "split": split}
                for ending, content in (("jpg", buffer.getvalue()), ("json", json.dumps(sample).encode())):
                    member = tarfile.TarInfo(f"{picture:06}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return f"{folder.as_posix()}/{{00000..{last:05}}}.tar"


def held_per_caption() -> float:
    """Return the bytes that a Flickr8kDataset in memory holds for each caption, pictures' names included."""
    captions = make_captions(COUNTED, np.random.default_rng(0), DIFFERENT)
    vocab, transform = build_vocab(captions, 1), Transform(32)
    gc.collect()
    tracemalloc.start()
    names = [f"{number // EACH:09}.jpg" for number in range(COUNTED)]
    images, image_of = index_images(pd.DataFrame({"image": names}))
    dataset = Flickr8kDataset(
        images, image_of, tokenise(captions, "en").numericalize(vocab), vocab, ImageFolders({}), transform
    )
    del names, image_of
    gc.collect()
    held, _ = tracemalloc.get_traced_memory()  # by Python and NumPy; PyTorch is not traced
    tracemalloc.stop()
    held += sum(value.nbytes for value in vars(dataset).values() if isinstance(value, torch.Tensor))
    return held / COUNTED


def run_and_watch(script: str, *words: str, cwd: str | Path | None = None) -> tuple[int, float]:
    """Run one of the scripts; returns its exit status and the peak of its memory in GB.

    Only Linux tells a process's own memory from the files that it maps; elsewhere both count.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words], cwd=cwd, stdout=sys.stderr)
    peak = watch(process)
    unit = 1 if sys.platform == "darwin" else 1024
    return process.returncode, peak or resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9


def watch(process: subprocess.Popen) -> float:
    """Wait for a process to end; returns the most memory that it, or one of its children, had of its own, in GB."""
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, *own_memory(process.pid))
        time.sleep(0.05)
    return peak


def own_memory(pid: int) -> list[float]:
    """Return the GB that a process and its children, each, have of their own; files that they map do not count.

    Returns [0] for a process that has ended, and where there is no /proc to read it from.
    """
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [0.0]
    return [int(found[1]) * 1024 / 1e9 if found else 0.0, *(gb for child in children for gb in own_memory(int(child)))]


if __name__ == "__main__":
    raise SystemExit(run_script(main))
