"""The built-in sample: captioned scenes, drawn on the spot in the form of Flickr8k, so that nothing is downloaded.

A scene is one coloured shape at the top or bottom of a background; left and right do not matter, since ImageNet
features hardly distinguish them. The scenes of dev and test are combinations of shape, colour, size, place and
background that never occur in train. Every pixel and word is drawn from (SEED, scene number).
"""

import csv
import itertools
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cli import UserError
from utils import hold

SEED = 0
SIZE = 160  # pixels; drawn at twice that and reduced, for smooth edges
COUNTS = {"train": 3200, "dev": 80, "test": 80}

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart")
COLOURS = {"red": (214, 40, 40), "green": (44, 150, 70), "blue": (35, 90, 200)}
SCALES = {"small": 0.15, "large": 0.26}  # radius, as a share of the picture
PLACES = {"top": 0.27, "bottom": 0.73}
BACKGROUNDS = ("white", "grey", "black", "striped", "dotted", "checkered")

CAPTIONS = (
    "A {size} {colour} {shape} at the {place} of a {background} background .",
    "There is a {size} {colour} {shape} at the {place} , on a {background} background .",
    "A {background} background with a {size} {colour} {shape} at the {place} .",
    "The {shape} at the {place} is {size} and {colour} , the background is {background} .",
    "At the {place} of the {background} picture is a {size} {colour} {shape} .",
)

# The corners of shapes of radius 1 around the origin, y downwards.
OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (0.95, 0.75), (-0.95, 0.75)],
    "star": [
        (r * math.cos(angle), r * math.sin(angle))
        for r, angle in ((1.1 if k % 2 == 0 else 0.45, math.pi * (k / 5 - 0.5)) for k in range(10))
    ],
    "cross": [
        *((0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32), (0.32, 1)),
        *((-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32), (-0.32, -1)),
    ],
    "heart": [
        (math.sin(a) ** 3, -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16)
        for a in (2 * math.pi * k / 60 for k in range(60))
    ],
}

Scene = tuple[str, str, str, str, str]  # shape, colour, size, place, background


def draw(root: Path) -> None:
    """Write captions.csv, images/ and the split lists into `root`, unless they are there; refuse where others are."""
    root = root.resolve()
    root.parent.mkdir(parents=True, exist_ok=True)
    with hold(root.with_name(f".{root.name}-lock"), f"drawing {root}/"):
        if (root / "captions.csv").is_file():
            return
        if root.exists() and any(root.iterdir()):
            raise UserError(f"{root} is not empty, so no scenes are drawn there; name another: data.root=FOLDER")
        unfinished = root.with_name(f".{root.name}-unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        (unfinished / "images").mkdir(parents=True)
        rows, names = [("image", "caption")], defaultdict[str, list[str]](list)
        for number, (split, scene) in enumerate(tqdm(choose_scenes(), desc="drawing", unit="img", disable=None)):
            name = f"scene{number:05d}.jpg"
            picture = draw_scene(scene, np.random.default_rng([SEED, number]))
            picture.save(unfinished / "images" / name, quality=92)
            names[split].append(name)
            rows += [(name, caption) for caption in describe(scene)]
        for split in COUNTS:
            (unfinished / f"Flickr_8k.{split}Images.txt").write_text("\n".join(names[split]) + "\n")
        with open(unfinished / "captions.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        if root.exists():
            root.rmdir()
        unfinished.rename(root)


def choose_scenes() -> list[tuple[str, Scene]]:
    """Return (split, scene) pairs; train scenes may repeat, with another jitter, and never occur in dev or test."""
    scenes = list(itertools.product(SHAPES, COLOURS, SCALES, PLACES, BACKGROUNDS))
    order = np.random.default_rng(SEED).permutation(len(scenes))
    held_out = COUNTS["dev"] + COUNTS["test"]
    chosen = [("dev", scenes[i]) for i in order[: COUNTS["dev"]]]
    chosen += [("test", scenes[i]) for i in order[COUNTS["dev"] : held_out]]
    return chosen + [("train", scenes[i]) for i in itertools.islice(itertools.cycle(order[held_out:]), COUNTS["train"])]


def describe(scene: Scene) -> list[str]:
    words = dict(zip(("shape", "colour", "size", "place", "background"), scene, strict=True))
    captions = [form.format(**words) for form in CAPTIONS]
    return [caption[0].upper() + caption[1:] for caption in captions]


def draw_scene(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene, its place, size and colour varied a little."""
    shape, colour, size, place, background = scene
    side = 2 * SIZE
    picture = draw_background(background, side, rng)
    x = side * rng.uniform(0.28, 0.72)
    y = side * (PLACES[place] + rng.uniform(-0.02, 0.02))
    radius = side * SCALES[size] * rng.uniform(0.9, 1.1)
    fill = tuple(int(np.clip(value + rng.integers(-12, 13), 0, 255)) for value in COLOURS[colour])
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill)
    elif shape == "ring":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], None, fill, int(radius * 0.42))
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in OUTLINES[shape]], fill)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_background(background: str, side: int, rng: np.random.Generator) -> Image.Image:
    plain = {"white": 248, "grey": 150, "black": 25}
    if background in plain:
        level = plain[background] + int(rng.integers(-6, 7))
        return Image.new("RGB", (side, side), (level,) * 3)
    step = int(rng.integers(28, 37))
    y, x = np.mgrid[:side, :side] + rng.integers(0, step, size=(2, 1, 1))
    if background == "striped":
        dark = x % step < step // 2
    elif background == "checkered":
        dark = (x // step + y // step) % 2 == 0
    else:
        dark = (x % step - step / 2) ** 2 + (y % step - step / 2) ** 2 < (step * 0.22) ** 2
    levels = np.where(dark, 175, 235).astype(np.uint8)
    return Image.fromarray(levels).convert("RGB")
