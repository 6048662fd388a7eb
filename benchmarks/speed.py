"""Measure how fast this project is, against what the machine can do and the usual tutorial's way.

`python -m benchmarks.speed` takes some twenty minutes on two cores and writes benchmarks/results/speed.json. What is
compared is measured in turns, in one process where it can be, and the median is taken: on a busy machine times change,
ratios less so; `load` says how busy it was. The workload: benchmarks/workload.py. The figures: benchmarks/speed.md.
"""

from cli import run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

import distributed
import inference_visualize
from benchmarks import seed_style
from benchmarks.memory import ROOT, watch
from benchmarks.recipes import environment
from benchmarks.workload import DECODERS, Training, write_dataset
from captioning import SEARCH_BATCH, make_extractor
from config import SearchConfig
from data import annotations
from data.features import Extractor
from data.transforms import open_picture
from data.vocab import EOS, SOS
from models.checkpoint import model_state
from models.model import CaptionModel
from models.search import search
from utils import pick_device, save_checkpoint, write_atomically

OUT = Path(__file__).parent / "results" / "speed.json"
FLICKR8K = {"pictures": 7000, "captions": 30000, "epochs": 5}  # encoded: train and dev; captions: of train
SLICE = 192  # captions that the tutorial's way is measured on, and pictures that are encoded beside it
ALONE = 40  # pictures that are searched one by one
PICTURES = 700  # with five captions each, that are trained on
DRAWN = 1000  # pictures that are encoded and captioned
TARS = (20_000, 100_000)  # captions
TURNS = 3
STARTS = {  # what a newcomer waits for first
    **{script: (f"{script}.py", "--help") for script in ("train", "evaluate", "inference_visualize", "visualize_loss")},
    "annotations": ("-m", "data.annotations", "--help"),
    "mistake": ("train.py", "train.epoch=3"),
    "wrong_path": ("inference_visualize.py", "--images", "nowhere.jpg"),
    "photo": ("inference_visualize.py", "--images", "PHOTO"),
    "plot": ("visualize_loss.py",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/speed.json")
    parser.add_argument("--starts", action="store_true", help="measure only how soon scripts answer; keep the rest")
    parser.add_argument("--train-only", nargs=2, metavar=("FOLDER", "DECODER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train_only:
        with distributed.processes():
            train_only(Path(args.train_only[0]), args.train_only[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.starts:
            result = measure_starts(write_dataset(root, 1, 1)[0])
        else:
            result = measure(root, write_dataset(root, PICTURES, DRAWN))
    if args.out.is_file():  # with what benchmarks/serve.py and web.py have measured
        result = json.loads(args.out.read_text()) | result
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def measure(root: Path, pictures: Sequence[Path]) -> dict[str, Any]:
    result = dict[str, Any]()

    def add(figures: dict[str, Any]) -> None:
        result.update(figures)
        for name, value in figures.items():
            print(f"{name:36} {value}", flush=True)

    add({"environment": environment() | {"load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None}})
    add(measure_starts(pictures[0]))
    for name in reversed(DECODERS):  # the LSTM last, which goes on to the pictures
        training = Training(root, pick_device(), name)
        add({f"{name}_{key}": value for key, value in measure_training(training).items()})
        add({f"{name}_{key}": value for key, value in measure_search(training).items()})
    add({"train_over_bare_loop": max(result[f"{name}_over_bare_loop"] for name in DECODERS)})
    add({"beam_over_per_image": min(result[f"{name}_beam5_over_per_image"] for name in DECODERS)})
    add(measure_seed_style(training, pictures))
    add(measure_captioning(training.model, pictures, root))
    del training
    for name in DECODERS:
        _, memory = run("benchmarks.speed", "--train-only", str(root), name)
        add({f"{name}_train_memory_gb": memory})
    if torch.cuda.device_count() != 1:  # two processes take two GPUs, or none
        add(measure_processes(root))
    add(measure_tars())
    return result


def measure_starts(picture: Path, root: Path = ROOT) -> dict[str, float]:
    """Return the seconds of processor time that scripts take to answer, the median of TURNS, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "runs", "it", "loss_log.txt")
        log.parent.mkdir(parents=True)
        log.write_text("epoch\ttrain_loss\tval_loss\tval_perplexity\tval_bleu4\tval_cider\n1\t3\t3\t20\t10\t30\n")
        took: dict[str, list[float]] = {name: [] for name in STARTS}
        for _ in range(TURNS):
            for name, words in STARTS.items():
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                own = [str(root / word) if word.endswith(".py") else word for word in words]
                command = [sys.executable, *(str(picture) if word == "PHOTO" else word for word in own)]
                subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                took[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {f"start_{name}_s": round(statistics.median(each), 2) for name, each in took.items()}


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


def measure_training(training: Training) -> dict[str, Any]:
    """Measure an epoch against forward and backward alone on the same batches, which lie in memory already."""
    batches = training.read()
    whole, bare, reading = in_turns(training.epoch, lambda: training.bare_epoch(batches), training.read)
    return {
        "captions_per_second": round(len(training.train_set) / whole, 1),
        "step_ms": round(1000 * whole / len(batches), 1),
        "over_bare_loop": round(whole / bare, 3),
        "data_share": round(reading / whole, 3),
    }


def measure_search(training: Training) -> dict[str, Any]:
    """Measure captions a second, and a beam of 5 against searching picture by picture, its beams as a batch."""
    model, features = training.model.eval(), training.train_set.features
    assert features
    pictures = features.take(list(training.train_set.images[:SEARCH_BATCH]))
    rows = model.standardise(pictures.to(training.device))
    options = {beam: model.config.search.model_copy(update={"beam": beam}) for beam in (1, 3, 5)}

    def picture_by_picture(options: SearchConfig) -> None:
        for row in rows[:ALONE]:
            search(model.decoder, row[None], options)

    *batched, alone = in_turns(
        *(partial(search, model.decoder, rows, each) for each in options.values()),
        partial(picture_by_picture, options[5]),
    )
    rates = [len(rows) / took for took in batched]
    written = [len(hypotheses[0].ids) for hypotheses in search(model.decoder, rows, options[3])]
    return {
        **{f"beam{beam}_images_per_second": round(rate, 1) for beam, rate in zip(options, rates, strict=True)},
        "beam5_over_per_image": round(alone / len(rows[:ALONE]) * rates[-1], 2),
        "caption_words": round(statistics.fmean(written), 1),
    }


def encode(extractor: Extractor, pictures: Sequence[Path]) -> None:
    for _ in extractor.encode(partial(open_picture, path) for path in pictures):
        pass


def measure_seed_style(training: Training, pictures: Sequence[Path]) -> dict[str, Any]:
    """Measure slices of the tutorial's way and of ours in turns; both are scaled to five epochs of Flickr8k.

    Ours includes making the fast encoder, once: in 8 bits that takes as long as encoding hundreds of pictures.
    """
    model = training.model
    table, pictures = annotations.load(model.config.data), pictures[:SLICE]
    known = table[table["image"].isin([path.name for path in pictures])].head(SLICE)
    folder, vocab = pictures[0].parent, model.vocab
    rows = [(folder / row.image, [SOS, *vocab.numericalize(row.caption), EOS]) for row in known.itertuples()]
    dataset = seed_style.CaptionPerPicture(rows, model.transform)
    captioner = seed_style.Captioner(model.encoder, len(model.vocab)).to(training.device)
    extractors = extractors_of(model)
    making = [seconds(partial(getattr, extractor, "network")) for extractor in extractors.values()]  # of fast encoders
    tutorial, epoch, *encodings = in_turns(
        lambda: seed_style.train_epoch(captioner, dataset, batch_size=32, workers=2),
        training.epoch,
        *(partial(encode, extractor, pictures) for extractor in extractors.values()),
    )
    captions = FLICKR8K["epochs"] * FLICKR8K["captions"]
    theirs = captions * tutorial / len(dataset)
    figures = {
        "seed_style_captions_per_second": round(len(dataset) / tutorial, 1),
        "seed_style_minutes": round(theirs / 60, 1),
    }
    for prefix, made, encoding in zip(extractors, making, encodings, strict=True):
        ours = made + FLICKR8K["pictures"] * encoding / len(pictures) + captions * epoch / len(training.train_set)
        figures |= {f"{prefix}encoder_made_s": round(made, 1), f"{prefix}own_minutes": round(ours / 60, 1)}
        figures |= {f"{prefix}seed_style_ratio": round(theirs / ours, 1)}
    return figures


def extractors_of(model: CaptionModel) -> dict[str, Extractor]:
    """Return what encodes pictures by default and, on a CPU, in 8 bits, by what the names of its figures begin with."""
    own = make_extractor(model)
    return {"": own, "int8_": replace(own, precision=torch.int8)} if own.device.type == "cpu" else {"": own}


def measure_captioning(model: CaptionModel, pictures: Sequence[Path], root: Path) -> dict[str, Any]:
    """Measure JPEGs to captions, drawn and on a page, by a beam of 3, against reading and encoding them alone."""
    device, size = pick_device(), model.transform.image_size
    model.eval()
    save_checkpoint(root / "model.pth", model_state(model))

    def caption(precision: str) -> None:
        sys.argv = ["inference_visualize.py", "--checkpoint", str(root / "model.pth"), "search.beam=3"]
        sys.argv += [f"encoder.precision={precision}", "--out", str(root / "captioned")]
        sys.argv += ["--images", *map(str, pictures)]
        inference_visualize.main()

    figures: dict[str, Any] = {"captioned_pictures": len(pictures)}
    for prefix, extractor in extractors_of(model).items():
        encode(extractor, pictures[:SLICE])
        encoder, whole = in_turns(
            partial(encode, extractor, pictures), partial(caption, "int8" if prefix else "auto"), warm_up=False
        )
        figures |= {
            f"{prefix}encode_images_per_second": round(len(pictures) / encoder, 1),
            f"{prefix}encoder_s": round(encoder, 1),
            f"{prefix}caption_s": round(whole, 1),
            f"{prefix}caption_over_encoder": round(whole / encoder, 3),
        }
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder(torch.zeros(1, 3, size, size, device=device))
    rate, ceiling = figures["encode_images_per_second"], matmul_ceiling(device, model.precision)
    return figures | {
        "encode_share_of_matmul_ceiling": round(rate * counter.get_total_flops() / ceiling, 2),
        "matmul_gflops": round(ceiling / 1e9),
    }


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of large matrix products."""
    a, b = (torch.rand(2048, 2048, device=device).to(dtype) for _ in range(2))
    [took] = in_turns(lambda: [a @ b for _ in range(5)])
    return 5 * 2 * 2048**3 / took


def train_only(root: Path, decoder: str) -> None:
    """Print captions a second of training alone, as a process of its own or as one of several."""
    training = Training(root, pick_device(), decoder)
    training.epoch()
    took = statistics.fmean(seconds(training.epoch) for _ in range(2))
    print(json.dumps(len(training.train_set) / took))


def run(module: str, *words: str, launcher: Sequence[str] = (), threads: int | None = None) -> tuple[Any, float | None]:
    """Run one of the benchmark's modules as a program; returns what it found and the memory of one process in GB."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *launcher, "-m", module, *words]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        peak = watch(process)
        assert process.stdout and process.returncode == 0
        return json.loads(process.stdout.read().splitlines()[-1]), round(peak, 2) or None


def measure_processes(root: Path) -> dict[str, Any]:
    """Measure training by two processes of one thread each against one process of two threads."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(TURNS):
        for count, found in rates.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
            words = ("--train-only", str(root), "lstm")
            rate, memory = run("benchmarks.speed", *words, launcher=launcher, threads=2 // count)
            found.append(rate)
    one, two = map(statistics.median, rates.values())
    figures = {"ddp_captions_per_second": round(two, 1), "ddp_ratio": round(two / one, 3)}
    return figures | {"ddp_process_memory_gb": memory}


def measure_tars() -> dict[str, Any]:
    """Measure the memory of training on tars with few captions and with many, and of a caption in the dataset."""
    (few, _), (many, _) = (run("benchmarks.memory", str(size)) for size in TARS)
    return {
        "tars_captions": list(TARS),
        "tars_memory_gb": [few["memory_gb"], many["memory_gb"]],
        "tars_memory_growth": round(many["memory_gb"] / few["memory_gb"], 3),
        "bytes_per_caption": many["bytes_per_caption"],
    }


if __name__ == "__main__":
    raise SystemExit(run_script(main))
