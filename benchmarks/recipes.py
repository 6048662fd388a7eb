"""Train a recipe of configs/ with several seeds, score it, and keep the figures as JSON.

    python -m benchmarks.recipes lstm --seeds 0 1 2 data.root=archive
    python -m benchmarks.recipes flickr8k_cn --dataset flickr8k_cn data.root=archive
    python -m benchmarks.recipes attention --seeds 0 --variant unsmoothed data.root=archive train.label_smoothing=0
    python -m benchmarks.recipes attention --variant alone data.root=archive search.consensus=0

Writes benchmarks/results/<dataset>/<recipe>-seed<k>.json, or, for a variant that shows what a setting is worth,
<dataset>/ablations/<recipe>-<variant>-seed<k>.json. A seed whose file exists is skipped; one whose training was stopped
goes on. A variant that only changes the search takes what the recipe has trained, and a recipe with `train.start` goes
on from the run with its own seed. Captions are those of the dev split: the test split is for the figures one publishes.
"""

from cli import Parser, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import ROOT, run_and_watch
from config import FREE, flatten, load_config, marked, restore_config, setting_names
from utils import RUNS, load_checkpoint, write_atomically

RESULTS = Path(__file__).parent / "results"
SITTINGS = "sittings.json"  # minutes and peak memory of each time that a run was trained


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the name of a file in configs/, without .yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K")
    parser.add_argument("--dataset", default="flickr8k", metavar="NAME", help="the folder of the results (flickr8k)")
    parser.add_argument("--variant", metavar="NAME", help="what the settings given make of the recipe: for ablations")
    args = parser.parse_options(setting_names())
    folder, name = RESULTS / args.dataset, args.recipe
    if args.variant:
        folder, name = folder / "ablations", f"{args.recipe}-{args.variant}"
    for seed in args.seeds:
        path = folder / f"{name}-seed{seed}.json"
        if path.is_file():
            print(f"{path} is there already")
            continue
        run, recipes_run = RUNS / f"{name}-seed{seed}", RUNS / f"{args.recipe}-seed{seed}"
        is_trained = (RESULTS / args.dataset / f"{args.recipe}-seed{seed}.json").is_file() and recipes_run.is_dir()
        if args.variant and is_trained and only_searches(args.overrides):
            run = recipes_run
        else:
            train(args.recipe, seed, run, args.overrides)
        result = measure(args.recipe, seed, run, args.overrides)
        write_atomically(path, (json.dumps(result | {"variant": args.variant}, indent=1) + "\n").encode())
        print(f"wrote {path}")


def only_searches(overrides: Sequence[str]) -> bool:
    """Whether these settings change nothing of what is trained."""
    names = [word.partition("=")[0] for word in overrides]
    return all(name.startswith("search.") or name in marked(FREE) for name in names)


def train(recipe: str, seed: int, run: Path, overrides: Sequence[str]) -> None:
    """Train to the end, and keep minutes and peak memory in GB beside those of sittings before this one."""
    path = ROOT / "configs" / f"{recipe}.yaml"
    if (run / "last.pth").is_file():
        words = ["--resume", "--run", run.name]
    else:
        words = ["--config", str(path), f"run={run.name}", f"train.seed={seed}"]
        start = load_config(path).train.start
        if start:
            words.append(f"train.start={RUNS / f'{Path(start).parent.name}-seed{seed}' / Path(start).name}")
    began = time.monotonic()
    status, memory = run_and_watch("train.py", *words, *overrides)
    if run.is_dir():
        known = json.loads((run / SITTINGS).read_text()) if (run / SITTINGS).is_file() else []
        known.append({"minutes": (time.monotonic() - began) / 60, "memory": memory})
        write_atomically(run / SITTINGS, json.dumps(known).encode())
    if status:  # what went wrong has been printed
        raise SystemExit(status)


def measure(recipe: str, seed: int, run: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Score what one seed has trained; returns what its results file holds."""
    status, _ = run_and_watch("evaluate.py", "--run", run.name, "--split", "val", *overrides)
    if status:
        raise SystemExit(status)
    scores = json.loads((run / "scores-val.json").read_text())
    checkpoint = load_checkpoint(run / "checkpoints.pth")
    sittings = json.loads((run / SITTINGS).read_text())
    settings = flatten(restore_config(checkpoint["config"], list(overrides)).model_dump())
    start = settings.pop("train.start")
    return {
        "recipe": recipe,
        "seed": seed,
        "split": "val",
        "scores": {name: value for name, value in scores.items() if isinstance(value, float) or value is None},
        "signature": scores["signature"],
        "intervals": scores["intervals"],
        "captions": scores["captions"],
        "datasets": scores["datasets"],
        "train_minutes": round(sum(sitting["minutes"] for sitting in sittings), 1),
        "peak_memory_gb": round(max(sitting["memory"] for sitting in sittings), 2),
        "start": Path(start).parent.name if start else None,
        "config": {name: value for name, value in settings.items() if name not in marked(FREE)},
        "encoder": {name: checkpoint["encoder"][name] for name in ("name", "sha256")},
        "environment": environment(),
    }


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
