"""Let a captioner say how sure it is: fit its confidence to captions of the val pictures, and store it in its file.

python calibrate.py                                    the newest run
python calibrate.py --checkpoint pretrained/captioner.pth "data.root=[archive, coco]"
"""

from cli import UserError, answer_early, options, run_script, say

if __name__ == "__main__":
    answer_early(options.calibrate, "PyTorch")  # --help and mistakes, before PyTorch is imported

from pathlib import Path
from typing import Any

import numpy as np
import torch

import metrics
from captioning import batched, encode_dataset
from data import annotations, splits
from data.folders import image_folders
from models.checkpoint import load_model
from models.confidence import RIGHT, Confidence
from models.model import CaptionModel
from render.reliability import draw_reliability
from utils import as_json, find_run, load_checkpoint, pick_device, save_checkpoint, write_atomically

FOLDS = 5  # what is shown was estimated for captions that it was not fitted to
LEAST = 20  # val pictures
BINS = 8  # of the reliability diagram, with as many captions each


def main() -> None:
    args = options.calibrate()
    path = Path(args.checkpoint[-1]) if args.checkpoint else find_run("checkpoints.pth", args.run) / "checkpoints.pth"
    model = load_model(path, args.overrides).to(pick_device())
    config = model.config.data
    table = annotations.load(config, splits.read_splits(path.parent))
    rows = table[table["split"] == "val"]
    references = annotations.references(rows)
    if len(references) < LEAST:
        raise UserError(
            f"{config.source} has {len(references)} val pictures, too few to tell how sure a captioner is; "
            f"calibrate it on a dataset with {LEAST} at least, with data.root=FOLDER"
        )
    say(f"captioning {len(references):,} val pictures with {path}")
    inputs, captions = caption(model, list(references))
    references = {image: references[image] for image in captions}  # without broken pictures that are skipped
    tokeniser = metrics.pick_tokeniser("auto", config.language)
    scores = metrics.evaluate(captions, references, tokeniser.tokenise, config.language, ["cider"])
    right = torch.from_numpy(scores.per_image["cider"] >= RIGHT)  # (N,)

    if right.all() or not right.any():
        which = "all" if right.all() else "none"
        raise UserError(
            f"{which} of {len(right):,} captions are right (CIDEr-D of {RIGHT:g} or more), so there is nothing to "
            "tell apart; calibrate it on another dataset, or train it further"
        )
    dataset_of = dict(rows[["image", "dataset"]].to_numpy().tolist())
    datasets = np.array([dataset_of[image] for image in references])  # (N,)
    chances = cross_validate(inputs, right)
    about = {name: judge(chances[datasets == name], right.numpy()[datasets == name]) for name in sorted(set(datasets))}
    say(f"a caption counts as right where its CIDEr-D is at least {RIGHT:g}; AUC is the area under the ROC curve")
    for name, each in about.items():
        halves = f"of the half it is surest of {each['surest_half']:.0%}, of the others {each['other_half']:.0%}"
        say(f"{name}: {each['right']:.0%} of {each['captions']:,} are right, {halves}; AUC {each['auc']:.2f}")
    confidence = Confidence.fit(inputs, right)
    save_checkpoint(path, load_checkpoint(path) | {"confidence": confidence.state()})
    out = Path(args.out or path.parent)
    write_atomically(out / "reliability.json", as_json({"right": RIGHT, "datasets": about}))
    write_atomically(out / "reliability.png", draw_reliability(about))
    say(f"wrote {path}, which says how sure it is from now on, and {out}/reliability.png and .json")


def caption(model: CaptionModel, images: list[str]) -> tuple[torch.Tensor, dict[str, str]]:
    """Return what confidence in the best caption of each picture is estimated from (N, 4), and the captions."""
    features = encode_dataset(model, images, image_folders(model.config.data))
    inputs, captions = [], dict[str, str]()
    for names in batched(list(features.names)):
        found, probs = model.find(features.take(names), model.config.search)
        inputs.append(model.evidence(found, probs, model.config.search))
        captions |= {name: model.caption(best).text for name, [best] in zip(names, found, strict=True)}
    return torch.cat(inputs), captions


def cross_validate(inputs: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """Return the chance of each caption to be right (N,), estimated from the captions of other folds."""
    fold = np.random.default_rng(0).permutation(len(right)) % FOLDS  # (N,)
    chances = np.zeros(len(right))
    for number in range(FOLDS):
        fitted = Confidence.fit(inputs[fold != number], right[fold != number])
        chances[fold == number] = fitted.chances(inputs[fold == number])
    return chances


def judge(chances: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Return how well chances (N,) tell the captions that are right from the others, and how true they are: `bins` are
    the mean chance and the share that is right of captions in the order of their chances.
    """
    order = np.argsort(-chances, kind="stable")
    half = len(order) // 2
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    return {
        "captions": len(right),
        "right": float(right.mean()),
        "surest_half": float(right[order[:half]].mean()),
        "other_half": float(right[order[half:]].mean()),
        "auc": area_under_roc(chances, right),
        "bins": [{"chance": float(chances[part].mean()), "right": float(right[part].mean())} for part in bins],
    }


def area_under_roc(chances: np.ndarray, right: np.ndarray) -> float:
    """Return how often a caption that is right has a higher chance than one that is not; half where they are equal."""
    above, below = chances[right][:, None], chances[~right][None]
    return float(((above > below) + 0.5 * (above == below)).mean()) if above.size and below.size else float("nan")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
