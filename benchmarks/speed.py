"""Measure how fast this project is here, against what the machine can do and against the usual tutorial's way.

    python -m benchmarks.speed

Some ten minutes on two cores; writes benchmarks/results/speed.json and prints it. What is compared is measured in
turns, in one process where it can be, and the median is taken: on a busy machine times change, ratios less so; `load`
tells how busy it was. Work: `benchmarks.workload`. What each figure is: FIGURES in `benchmarks.report`.
"""

from cli import Parser, run_script

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import distributed
from benchmarks import seed_style
from benchmarks.recipes import ROOT, environment
from benchmarks.workload import DECODERS, PeakMemory, make_trainer, write_dataset
from config import SearchConfig, setting_names
from data import annotations
from data.dataset import Flickr8kDataset, batch_indices
from data.features import Extractor
from data.transforms import open_picture
from inference_visualize import Picture, caption_pictures
from models.model import CAPTION_BATCH, CaptionModel
from models.search import search
from train import Progress, Trainer
from training.optim import SETTLED
from utils import StopRequest, pick_device, write_atomically

OUT = Path(__file__).parent / "results" / "speed.json"
FLICKR8K = {"pictures": 7000, "captions": 30000, "epochs": 5}  # encoded: train and dev; captions: of train
SLICE = 192  # captions that the seed-style baseline is measured on, and pictures that are encoded beside it
ALONE = 40  # pictures that are searched one by one
SCRIPTS = ("train.py", "evaluate.py", "inference_visualize.py", "visualize_loss.py")
STREAMED = (100_000, 1_000_000)  # captions
TURNS = 3


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/speed.json")
    parser.add_argument("--pictures", type=int, default=700, metavar="N", help="with five captions each (700)")
    parser.add_argument("--drawn", type=int, default=1000, metavar="N", help="that are encoded and captioned (1000)")
    parser.add_argument("--streamed", type=int, nargs=2, default=STREAMED, metavar="N", help="captions of simulations")
    parser.add_argument("--train-only", nargs=2, metavar=("FOLDER", "DECODER"), help=argparse.SUPPRESS)  # see below
    args = parser.parse_options_and_settings(setting_names())
    if args.train_only:
        with distributed.processes():
            train_only(Path(args.train_only[0]), args.train_only[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result = measure(root, write_dataset(root, args.pictures, args.drawn), args.streamed)
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def measure(root: Path, pictures: Sequence[Path], streamed: Sequence[int]) -> dict[str, Any]:
    device, result = pick_device(), dict[str, Any]()

    def add(figures: dict[str, Any]) -> None:
        result.update(figures)
        for name, value in figures.items():
            print(f"{name:36} {value}", flush=True)

    add({"environment": environment() | {"load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None}})
    add({f"start_{Path(script).stem}_s": round(start_up(script), 2) for script in SCRIPTS})
    for name in reversed(DECODERS):  # the LSTM last, which goes on to the pictures
        trainer, train_set = make_trainer(root, device, name)
        add({f"{name}_{key}": value for key, value in training(trainer, train_set).items()})
        add({f"{name}_{key}": value for key, value in searching(trainer.model, train_set).items()})
    add({"train_over_bare_loop": max(result[f"{name}_over_bare_loop"] for name in DECODERS)})
    add({"beam_over_per_image": min(result[f"{name}_beam5_over_per_image"] for name in DECODERS)})
    add(seed_ratio(trainer, pictures))
    add(captioning(trainer.model, pictures, device, root))
    del trainer, train_set
    add({f"{name}_train_memory_gb": peak_memory(root, name) for name in DECODERS})
    add(several_processes(root))
    add(streaming(streamed))
    return result


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(*functions: Callable[[], object], warm_up: bool = True) -> list[float]:
    """Return the median seconds of each function; they take turns, after one for warming up."""
    if warm_up:
        for function in functions:
            function()
    times = [[seconds(function) for function in functions] for _ in range(TURNS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def start_up(script: str) -> float:
    """Return the median seconds until a script answers `--help`, its imports done."""
    [took] = in_turns(
        lambda: subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, check=True),
        warm_up=False,
    )
    return took


def one_epoch(trainer: Trainer) -> None:
    """Train an epoch as train.py does, validation apart, and not the very first steps."""
    trainer.progress = Progress(step=SETTLED)
    trainer.train_epoch(StopRequest())


def training(trainer: Trainer, train_set: Flickr8kDataset) -> dict[str, Any]:
    """Measure an epoch against forward and backward alone on the same batches, which lie in memory already."""
    config, device = trainer.config, trainer.device
    indices = batch_indices(train_set, config.batch_size, trainer.by_image, rng=None)
    batches = [train_set.__getitems__(batch).to(device) for batch in indices]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def read() -> None:
        for batch in indices:
            train_set.__getitems__(batch).to(device)

    def bare() -> None:
        trainer.model.train()
        for batch in batches:
            with torch.autocast(device.type, trainer.precision, enabled=trainer.precision != torch.float32):
                objective, _ = trainer.objective(batch)
            objective.backward()
            for parameter in trained:
                parameter.grad = None

    whole, alone, reading = in_turns(partial(one_epoch, trainer), bare, read)
    return {
        "captions_per_second": round(len(train_set) / whole, 1),
        "step_ms": round(1000 * whole / len(batches), 1),
        "over_bare_loop": round(whole / alone, 3),
        "data_share": round(reading / whole, 3),
    }


def searching(model: CaptionModel, train_set: Flickr8kDataset) -> dict[str, Any]:
    """Measure captions a second, and a beam of 5 against searching picture by picture, its beams as a batch."""
    model.eval()
    names = train_set.images[:CAPTION_BATCH]
    assert train_set.features
    features = model.standardise(train_set.features.take(names).to(model.feature_mean.device))
    options = {beam: model.config.search.model_copy(update={"beam": beam}) for beam in (1, 3, 5)}

    def picture_by_picture(options: SearchConfig) -> None:
        for row in features[:ALONE]:
            search(model.decoder, row[None], options)

    *batched, alone = in_turns(
        *(partial(search, model.decoder, features, each) for each in options.values()),
        partial(picture_by_picture, options[5]),
    )
    rates = [len(names) / took for took in batched]
    written = [len(each[0].ids) for each in search(model.decoder, features, options[3])]
    return {
        **{f"beam{beam}_images_per_second": round(rate, 1) for beam, rate in zip(options, rates, strict=True)},
        "beam5_over_per_image": round(alone / len(features[:ALONE]) * rates[-1], 2),
        "caption_words": round(statistics.fmean(written), 1),
    }


def encode(extractor: Extractor, pictures: Sequence[Path]) -> None:
    for pixels in extractor.read(partial(open_picture, path) for path in pictures):
        extractor(pixels)


def seed_ratio(trainer: Trainer, pictures: Sequence[Path]) -> dict[str, Any]:
    """Measure slices of the tutorial's way and of ours in turns; both are scaled to five epochs of Flickr8k."""
    model, device = trainer.model, trainer.device
    extractor = Extractor(model, device)
    table = annotations.load(model.config.data)
    known = table[table["image"].isin([path.name for path in pictures])]
    dataset = seed_style.CaptionPerPicture(known.head(SLICE), model.vocab, pictures[0].parent, model.transform)
    captioner = seed_style.Captioner(model.encoder, len(model.vocab)).to(device)
    encoded = pictures[:SLICE]
    tutorial, encoding, epoch = in_turns(
        lambda: seed_style.train_epoch(captioner, dataset, batch_size=32, workers=2),
        lambda: encode(extractor, encoded),
        lambda: one_epoch(trainer),
    )
    captions = FLICKR8K["epochs"] * FLICKR8K["captions"]
    theirs = captions * tutorial / len(dataset)
    ours = FLICKR8K["pictures"] * encoding / len(encoded) + captions * epoch / len(trainer.train_set)
    return {
        "seed_style_captions_per_second": round(len(dataset) / tutorial, 1),
        "seed_style_minutes": round(theirs / 60, 1),
        "own_minutes": round(ours / 60, 1),
        "seed_style_ratio": round(theirs / ours, 1),
    }


def captioning(model: CaptionModel, paths: Sequence[Path], device: torch.device, root: Path) -> dict[str, Any]:
    """Measure JPEGs to captions, drawn and on a page, by a beam of 3, against reading and encoding them alone."""
    assert model.config.search.beam == 3
    extractor = Extractor(model.eval(), device)
    pictures = [Picture(path, path.name, path.name) for path in paths]
    encode(extractor, paths[:SLICE])
    encoder, whole = in_turns(
        lambda: encode(extractor, paths),
        lambda: caption_pictures(model, pictures, None, 1, None, root / "captioned", device),
        warm_up=False,
    )
    size = model.transform.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder(torch.zeros(1, 3, size, size, device=device))
    rate = len(paths) / encoder
    ceiling = matmul_ceiling(device, extractor.dtype)
    return {
        "encode_images_per_second": round(rate, 1),
        "encode_share_of_matmul_ceiling": round(rate * counter.get_total_flops() / ceiling, 2),
        "matmul_gflops": round(ceiling / 1e9),
        "captioned_pictures": len(paths),
        "encoder_s": round(encoder, 1),
        "caption_s": round(whole, 1),
        "caption_over_encoder": round(whole / encoder, 3),
    }


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of large matrix products."""
    a, b = (torch.rand(2048, 2048, device=device).to(dtype) for _ in range(2))
    [took] = in_turns(lambda: [a @ b for _ in range(5)])
    return 5 * 2 * 2048**3 / took


def train_only(root: Path, decoder: str) -> None:
    """Print captions a second, and each process's peak memory, as a process of its own or one of several."""
    with PeakMemory() as peak:
        trainer, train_set = make_trainer(root, pick_device(), decoder)
        one_epoch(trainer)
        took = statistics.fmean(seconds(partial(one_epoch, trainer)) for _ in range(2))
    print(json.dumps({"rate": len(train_set) / took, "memory": distributed.gather([peak.gb])}))


def run(module: str, *words: str, launcher: Sequence[str] = (), threads: int | None = None) -> dict[str, Any]:
    """Run one of the benchmark's modules as a program and return what it found."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *launcher, "-m", module, *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(root: Path, decoder: str) -> float | None:
    [memory] = run("benchmarks.speed", "--train-only", str(root), decoder)["memory"]
    return memory and round(memory, 2)


def several_processes(root: Path) -> dict[str, Any]:
    """Measure training by two processes of one thread each against one process of two threads."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    memory: list[float | None] = []
    for _ in range(TURNS):
        for count, found in rates.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            told = run("benchmarks.speed", "--train-only", str(root), "lstm", launcher=launcher, threads=2 // count)
            found.append(told["rate"])
            memory = told["memory"]
    one, two = map(statistics.median, rates.values())
    known = [gb for gb in memory if gb]
    return {
        "ddp_captions_per_second": round(two, 1),
        "ddp_ratio": round(two / one, 3),
        "ddp_process_memory_gb": round(max(known), 2) if known else None,
    }


def streaming(sizes: Sequence[int]) -> dict[str, Any]:
    """Measure the memory of training on datasets of two sizes that are read in windows."""
    small, large = (run("benchmarks.stream", str(size)) for size in sizes)
    few, many = small["memory_gb"], large["memory_gb"]
    return {
        "stream_captions": list(sizes),
        "stream_memory_gb": [gb and round(gb, 3) for gb in (few, many)],
        "stream_bytes_per_caption": round(large["bytes_per_caption"], 1),
        "stream_memory_growth": round(many / few, 3) if few else None,
    }


if __name__ == "__main__":
    raise SystemExit(run_script(main))
