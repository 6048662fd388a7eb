"""Measure how fast this project is here, against what the machine can do and against the usual tutorial's way.

    python -m benchmarks.speed                      # a quarter of an hour on two cores
    torchrun … is started by it where needed

Writes benchmarks/results/speed.json and prints it as a table. What is compared is measured in turns, in one process
where it can be, and the median is taken: on a busy machine times change, ratios hardly do. Work: `benchmarks.workload`.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import seed_style
from benchmarks.recipes import ROOT, environment
from benchmarks.workload import make_trainer, write_dataset
from config import SearchConfig, cli, parse_command_line
from data import annotations
from data.dataset import batch_indices
from data.features import Extractor
from inference_visualize import Picture, caption_pictures
from models.model import CaptionModel
from models.search import search
from train import Progress, Trainer
from training import distributed
from utils import StopRequest, pick_device, write_atomically

OUT = Path(__file__).parent / "results" / "speed.json"
FLICKR8K = {"pictures": 7000, "captions": 30000, "epochs": 5}  # encoded: train and dev; captions: of train
DECODERS = {  # as configs/ trains them
    "lstm": (),
    "attention": ("decoder.name=attention", "train.doubly_stochastic=1"),
    "transformer": ("decoder.name=transformer", "decoder.hidden_size=1024", "decoder.num_layers=3"),
}
SCRIPTS = ("train.py", "evaluate.py", "inference_visualize.py", "visualize_loss.py")
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="with five captions each (1000)")
    parser.add_argument("--drawn", type=int, default=160, metavar="N", help="of them are encoded (160)")
    parser.add_argument("--train-only", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # of a process of several
    args = parse_command_line(parser)
    if args.train_only:
        with distributed.processes():
            train_only(args.train_only)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, args.pictures, args.drawn)
        result = measure(root, args.drawn)
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    for name, value in result.items():
        print(f"{name:32} {value}")
    print(f"wrote {args.out}")


def measure(root: Path, drawn: int) -> dict[str, Any]:
    device = pick_device()
    pictures = [root / "images" / f"{number:06}.jpg" for number in range(drawn)]
    result: dict[str, Any] = {"environment": environment()}
    step: dict[str, float] = {}
    for name, words in DECODERS.items():
        trainer = make_trainer(root, device, *words)
        result |= (trained := {f"{name}_{key}": value for key, value in training(trainer).items()})
        result |= {f"{name}_{key}": value for key, value in searching(trainer).items()}
        step[name] = trained[f"{name}_captions_per_second"]
        say(result, name)
    result["train_over_bare_loop"] = max(result[f"{name}_over_bare_loop"] for name in DECODERS)
    result["beam_over_per_image"] = min(result[f"{name}_beam5_over_per_image"] for name in DECODERS)
    trainer = make_trainer(root, device)
    result |= encoding(trainer.model, pictures, device)
    result |= captioning(trainer.model, pictures, device, root)
    say(result, "encod", "caption")
    result |= seed_ratio(trainer, pictures, result["encode_images_per_second"], step["lstm"])
    say(result, "seed")
    result |= several_processes(root)
    result |= {f"start_{Path(script).stem}_s": round(start_up(script), 2) for script in SCRIPTS}
    return result


def say(result: dict[str, Any], *beginnings: str) -> None:
    for name, value in result.items():
        if name.startswith(beginnings):
            print(f"{name:32} {value}", flush=True)


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(*functions: Callable[[], object]) -> list[float]:
    """Return the median seconds of each function; they take turns, after one for warming up."""
    for function in functions:
        function()
    times = [[seconds(function) for function in functions] for _ in range(TURNS)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of large matrix products."""
    a, b = (torch.rand(2048, 2048, device=device).to(dtype) for _ in range(2))
    [took] = in_turns(lambda: a @ b)
    return 2 * 2048**3 / took


def encoding(model: CaptionModel, pictures: Sequence[Path], device: torch.device) -> dict[str, Any]:
    """Measure how many pictures a second are read and encoded, and how much of the machine that uses."""
    extractor = Extractor(model, device)
    [took] = in_turns(lambda: [extractor(pixels) for pixels in extractor.read(pictures)])
    size = model.transform.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder(torch.zeros(1, 3, size, size, device=device))
    rate = len(pictures) / took
    return {
        "encode_images_per_second": round(rate, 1),
        "encode_share_of_matmul_ceiling": round(
            rate * counter.get_total_flops() / matmul_ceiling(device, extractor.dtype), 2
        ),
    }


def training(trainer: Trainer) -> dict[str, Any]:
    """Measure an epoch without validation against the same steps on batches that lie in memory already."""
    config, device = trainer.config, trainer.device
    indices = batch_indices(trainer.train_set, config.batch_size, trainer.by_image, rng=None)
    batches = [trainer.train_set.__getitems__(batch).to(device) for batch in indices]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

    def epoch() -> None:
        trainer.progress = Progress()
        trainer.train_epoch(StopRequest())

    def read() -> None:
        for batch in indices:
            trainer.train_set.__getitems__(batch).to(device)

    def bare() -> None:
        trainer.model.train()
        for batch in batches:
            with torch.autocast(device.type, trainer.precision, enabled=trainer.precision != torch.float32):
                objective, _ = trainer.objective(batch)
            objective.backward()
            for parameter in trained:
                parameter.grad = None

    whole, alone, reading = in_turns(epoch, bare, read)
    return {
        "captions_per_second": round(len(trainer.train_set) / whole, 1),
        "step_ms": round(1000 * whole / len(batches), 1),
        "over_bare_loop": round(whole / alone, 3),
        "data_share": round(reading / whole, 3),
    }


def searching(trainer: Trainer) -> dict[str, Any]:
    """Measure captions a second, and a beam of 5 against searching picture by picture."""
    model = trainer.model.eval()
    names = trainer.train_set.images[:160]
    assert trainer.train_set.features
    features = model.standardise(trainer.train_set.features.take(names).to(trainer.device))
    options = {beam: model.config.search.model_copy(update={"beam": beam}) for beam in (1, 3, 5)}

    def by_picture(options: SearchConfig) -> None:
        for row in features[:40]:
            search(model.decoder, row[None], options)

    times = in_turns(
        *(lambda beam=beam: search(model.decoder, features, options[beam]) for beam in options),
        lambda: by_picture(options[5]),
    )
    per_picture = times[3] / 40
    return {
        **{
            f"beam{beam}_images_per_second": round(len(names) / took, 1)
            for beam, took in zip(options, times, strict=False)
        },
        "beam5_over_per_image": round(per_picture / (times[2] / len(names)), 2),
    }


def captioning(model: CaptionModel, paths: Sequence[Path], device: torch.device, root: Path) -> dict[str, Any]:
    """Measure pictures to captions, drawn and on a page, against reading and encoding the pictures alone."""
    extractor = Extractor(model, device)
    pictures = [Picture(path, path.name, path.name) for path in paths]
    encoder, whole = in_turns(
        lambda: [extractor(pixels) for pixels in extractor.read(paths)],
        lambda: caption_pictures(model, pictures, None, 1, None, root / "captioned", device),
    )
    return {"caption_over_encoder": round(whole / encoder, 3)}


def seed_ratio(trainer: Trainer, pictures: Sequence[Path], encoded: float, trained: float) -> dict[str, Any]:
    """Measure a slice of the tutorial's way, and scale both ways to five epochs of Flickr8k by their pictures."""
    table = annotations.load(trainer.model.config.data)
    known = table[table["image"].isin([path.name for path in pictures])]
    model = trainer.model
    dataset = seed_style.CaptionPerPicture(known.head(192), model.vocab, pictures[0].parent, model.transform)
    captioner = seed_style.Captioner(model.encoder, len(model.vocab)).to(trainer.device)
    [took] = in_turns(lambda: seed_style.train_epoch(captioner, dataset, batch_size=32, workers=2))
    rate = len(dataset) / took
    theirs = FLICKR8K["epochs"] * FLICKR8K["captions"] / rate
    ours = FLICKR8K["pictures"] / encoded + FLICKR8K["epochs"] * FLICKR8K["captions"] / trained
    return {
        "seed_style_captions_per_second": round(rate, 1),
        "seed_style_minutes": round(theirs / 60, 1),
        "own_minutes": round(ours / 60, 1),
        "seed_style_ratio": round(theirs / ours, 1),
    }


def train_only(root: Path) -> None:
    """Print captions a second and own memory, as one process of several."""
    trainer = make_trainer(root, pick_device())

    def epoch() -> None:
        trainer.progress = Progress()
        trainer.train_epoch(StopRequest())

    [took] = in_turns(epoch)
    told = Path("/proc/self/status")
    anonymous = [line for line in told.read_text().splitlines() if "RssAnon" in line] if told.is_file() else []
    memory = distributed.gather([int(line.split()[1]) * 1024 / 1e9 for line in anonymous])
    print(json.dumps({"rate": len(trainer.train_set) / took, "memory": memory}))


def several_processes(root: Path) -> dict[str, Any]:
    """Measure training by two processes of one thread each against one process of two threads."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    memory: list[float] = []
    for _ in range(TURNS):
        for count, rate in rates.items():
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", "-m"]
            command = [sys.executable, *launch, "benchmarks.speed", "--train-only", str(root)]
            threads = {"OMP_NUM_THREADS": str(2 // count)}
            done = subprocess.run(
                command, env=os.environ | threads, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
            )
            told = json.loads(done.stdout.splitlines()[-1])
            rate.append(told["rate"])
            memory = told["memory"] if count == 2 else memory
    one, two = map(statistics.median, rates.values())
    return {
        "ddp_captions_per_second": round(two, 1),
        "ddp_ratio": round(two / one, 3),
        "ddp_process_memory_gb": round(max(memory, default=float("nan")), 2),
    }


def start_up(script: str) -> float:
    """Return the median seconds until a script answers `--help`, its imports done."""
    [took] = in_turns(lambda: subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True))
    return took


if __name__ == "__main__":
    raise SystemExit(cli(main))
