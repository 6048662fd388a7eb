"""Train a recipe of configs/ with several seeds, score it, and keep the figures as JSON.

    python -m benchmarks.recipes lstm --seeds 0 1 2 data.root=archive
    python -m benchmarks.recipes attention --seeds 0 --variant unsmoothed data.root=archive train.label_smoothing=0
    python -m benchmarks.recipes flickr8k_cn --dataset flickr8k_cn data.root=archive

    python -m benchmarks.recipes attention --variant alone data.root=archive search.consensus=0

Writes benchmarks/results/<dataset>/<recipe>-seed<k>.json, or, of a variant that shows what a setting is worth,
<dataset>/ablations/<recipe>-<variant>-seed<k>.json. A seed whose file exists is left out; one whose training was
stopped goes on, and a variant that only searches otherwise takes what the recipe has trained. A recipe with
`train.start` goes on from the run with its own seed. Captions are those of the dev split: the test split is for the
figures one publishes.
"""

from cli import Parser, UserError, run_script

import argparse
import json
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from config import FREE_AFTER_TRAINING, flatten, load_config, restore_config, setting_names
from utils import RUNS, load_checkpoint, write_atomically

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
SITTINGS = "sittings.json"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a file in configs/, without .yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K")
    parser.add_argument("--dataset", default="flickr8k", metavar="NAME", help="the folder of the results (flickr8k)")
    parser.add_argument("--variant", metavar="NAME", help="what the settings given make of the recipe: for ablations")
    args = parser.parse_options_and_settings(setting_names())
    folder, name = RESULTS / args.dataset, args.recipe
    if args.variant:
        folder, name = folder / "ablations", f"{args.recipe}-{args.variant}"
    for seed in args.seeds:
        path = folder / f"{name}-seed{seed}.json"
        if path.is_file():
            print(f"{path} is there already")
            continue
        run, trained = RUNS / f"{name}-seed{seed}", RUNS / f"{args.recipe}-seed{seed}"
        measured = (RESULTS / args.dataset / f"{args.recipe}-seed{seed}.json").is_file()
        if args.variant and measured and only_searches_otherwise(trained, args.overrides):
            run = trained
        else:
            train(args.recipe, seed, run, args.overrides)
        result = measure(args.recipe, seed, run, args.overrides)
        write_atomically(path, (json.dumps(result | {"variant": args.variant}, indent=1) + "\n").encode())
        print(f"wrote {path}")


def only_searches_otherwise(trained: Path, overrides: Sequence[str]) -> bool:
    """Whether a run of benchmarks.recipes is there that differs from these settings in how it is searched alone."""
    if not (trained / SITTINGS).is_file():
        return False
    try:
        restore_config(load_checkpoint(trained / "checkpoints.pth")["config"], list(overrides))
    except UserError:
        return False
    return True


def measure(recipe: str, seed: int, run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Score what one seed has trained; returns what its results file holds."""
    status, _ = run_command(
        "evaluate.py", "--run", run.name, "--split", "val", *(word for word in overrides if is_free(word))
    )
    end_on_failure(status)
    scores = json.loads((run / "scores-val.json").read_text())
    checkpoint = load_checkpoint(run / "checkpoints.pth")
    sittings = json.loads((run / SITTINGS).read_text())
    searched = [word for word in overrides if word.startswith("search.")]
    settings = flatten(restore_config(checkpoint["config"], searched).model_dump())
    return {
        "recipe": recipe,
        "seed": seed,
        "split": "val",
        "scores": {name: value for name, value in scores.items() if isinstance(value, float) or value is None},
        "signature": scores["signature"],
        "intervals": scores["intervals"],
        "captions": scores["captions"],
        "train_minutes": round(sum(sitting["minutes"] for sitting in sittings), 1),
        "peak_memory_gb": round(max(sitting["memory"] for sitting in sittings), 2),
        "start": Path(settings["train.start"]).parent.name if settings["train.start"] else None,
        "config": {
            name: value for name, value in settings.items() if name not in {*FREE_AFTER_TRAINING, "train.start"}
        },
        "encoder": {name: checkpoint["encoder"][name] for name in ("name", "sha256")},
        "environment": environment(),
    }


def train(recipe: str, seed: int, run: Path, overrides: Sequence[str]) -> None:
    """Train to the end, and keep minutes and peak memory in GB beside those of sittings before this one."""
    told = run / SITTINGS
    sittings = json.loads(told.read_text()) if told.is_file() else []
    if (run / "last.pth").is_file():
        words = ["--resume", "--run", run.name, *(word for word in overrides if is_free(word))]
    else:
        path = ROOT / "configs" / f"{recipe}.yaml"
        words = ["--config", str(path), f"run={run.name}", f"train.seed={seed}"]
        start = load_config(path).train.start
        if start:
            words.append(f"train.start={RUNS / f'{Path(start).parent.name}-seed{seed}' / Path(start).name}")
        words += overrides
    began = time.monotonic()
    status, memory = run_command("train.py", *words)
    sittings.append({"minutes": (time.monotonic() - began) / 60, "memory": memory})
    if run.is_dir():
        write_atomically(told, json.dumps(sittings).encode())
    end_on_failure(status)


def is_free(word: str) -> bool:
    name = word.partition("=")[0]
    return name in FREE_AFTER_TRAINING or name.startswith("search.")


def run_command(script: str, *words: str) -> tuple[int, float]:
    """Run one of the scripts; returns its exit status and its peak memory in GB.

    Memory is what the process has of its own: pages of a file it maps, such as cached features, are not counted. (On
    macOS, which does not tell them apart, they are.)
    """
    process = subprocess.Popen([sys.executable, str(ROOT / script), *words])
    told, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        time.sleep(0.5)
        if told.is_file():
            peak = max([peak, *map(int, re.findall(r"RssAnon:\s+(\d+) kB", told.read_text()))])
    if not peak:
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return process.returncode, peak * 1024 / 1e9


def end_on_failure(status: int) -> None:
    """What went wrong has been printed by the script itself."""
    if status:
        raise SystemExit(status)


def environment() -> dict[str, Any]:
    """Return what the minutes depend on."""
    if torch.cuda.is_available():
        processor = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
        processor = names[0] if names else platform.processor()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    raise SystemExit(run_script(main))
