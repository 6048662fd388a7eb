"""Draw the pictures of README.md and docs/, except demo.png: `python -m docs.figures`.

They need two runs on the built-in sample, the captioner in pretrained/, and scikit-image, which brings two photographs
that anyone may use:

    pip install scikit-image
    python train.py --config configs/sample.yaml
    python train.py --config configs/sample.yaml decoder.name=attention train.doubly_stochastic=1 run=sample-attention

Words, probabilities, attention and scores in them are those of the three trained models.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import importlib.util
import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

import metrics
import visualize_loss
from config import SearchConfig
from data import annotations, sample, splits
from data.folders import image_folders
from data.transforms import open_picture
from data.vocab import EOS, SOS
from models import search
from models.checkpoint import load_model
from models.model import Caption, CaptionModel
from models.search import Beam, Finished
from render.attention import AttentionMaps, heat_map
from render.charts import COLOURS, LINES, TEXT
from utils import PRETRAINED, RUNS
from visualize_loss import save

IMAGES = Path(__file__).parent / "images"
RIGHT, WRONG = COLOURS[:2]
PALE, FAINT = "#f1f4f8", "#8a9099"
CHARACTER = 0.088  # inches of a character of the tree's font
PHOTOGRAPHS = ("chelsea.png", "camera.png")  # both CC0, by Stéfan van der Walt and by Lav Varshney


@dataclass
class Scene:
    """A picture of the sample, its five captions, and its features (1, D) or (1, L, D)."""

    picture: Image.Image
    references: list[str]
    features: torch.Tensor


def main() -> None:
    lstm, attention = (load(name) for name in ("sample", "sample-attention"))
    table = splits.choose_split(annotations.load(lstm.config.data), "test", lstm.config.data.source)[1]
    scenes = list(annotations.references(table).items())
    large, unsure = scenes[3], scenes[6]
    seen = [encode_scene(lstm, *each) for each in scenes]
    save(draw_captioned(captioned(lstm, seen)), IMAGES / "captions.jpg")
    save(draw_chain(attention, encode_scene(attention, *large)), IMAGES / "encoder_decoder.png")
    save(draw_teacher_forcing(lstm, encode_scene(lstm, *unsure)), IMAGES / "teacher_forcing.png")
    save(draw_tree(lstm, parted(lstm, seen)), IMAGES / "beam_search.png")
    save(draw_overlap(lstm, worst(lstm, seen)), IMAGES / "bleu.png")
    save(draw_photographs(), IMAGES / "photographs.jpg")
    save(draw_attention(), IMAGES / "attention.jpg")
    runs = {run: visualize_loss.read_log(RUNS / run / "loss_log.txt") for run in ("sample", "sample-attention")}
    save(visualize_loss.draw(runs), IMAGES / "loss_curve.png")
    print(f"wrote the pictures in {IMAGES}/")


def load(run: str) -> CaptionModel:
    path = RUNS / run / "checkpoints.pth"
    if not path.is_file():
        raise UserError(f"there is no {path}; train it as the first lines of {Path(__file__).name} say")
    return load_model(path)


def encode_scene(model: CaptionModel, name: str, references: list[str]) -> Scene:
    return encode_file(model, image_folders(model.config.data).path(name), references)


@torch.inference_mode()
def encode_file(model: CaptionModel, path: Path, references: list[str]) -> Scene:
    picture = open_picture(path)
    return Scene(picture, references, model.encoder(model.transform(picture).unsqueeze(0)))


def best(model: CaptionModel, seen: Scene, keep_attention: bool = False, beam: int | None = None) -> Caption:
    options = model.config.search.model_copy(update={"beam": beam or model.config.search.beam})
    return model.generate(seen.features, options, keep_attention=keep_attention)[0][0]


# ---- drawing in inches -----------------------------------------------------------------------------------------------


def paper(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white sheet whose axes are inches, from the lower left corner."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def write(axes: Axes, x: float, y: float, text: str, size: float = 11, **style: Any) -> None:
    defaults: dict[str, Any] = {"fontsize": size, "color": TEXT, "ha": "center", "va": "center"}
    axes.text(x, y, text, **(defaults | style))


def box(axes: Axes, x: float, y: float, text: str, width: float, height: float = 0.42, colour: str = PALE) -> None:
    """Draw a box around its centre."""
    corner = (x - width / 2, y - height / 2)
    shape = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=shape, facecolor=colour, edgecolor=LINES))
    write(axes, x, y, text)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = FAINT) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


def put(axes: Axes, picture: Any, left: float, bottom: float, width: float, height: float) -> None:
    """Draw a picture, or an array of colours, with a hairline around it."""
    smooth = "lanczos" if isinstance(picture, Image.Image) else "nearest"
    axes.imshow(picture, extent=(left, left + width, bottom, bottom + height), aspect="auto", interpolation=smooth)
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=LINES))


# ---- captioned pictures ----------------------------------------------------------------------------------------------

Captioned = tuple[Image.Image, str, str]  # a picture, its caption, and that caption's colour


def draw_captioned(rows: list[list[Captioned]]) -> Figure:
    """Draw rows of pictures, all of one height, each with its caption below it."""
    width, gap = 13.0, 0.2
    height = min((width - gap * (len(row) + 1)) / sum(shape(picture) for picture, *_ in row) for row in rows)
    wrapped = [
        [textwrap.wrap(caption, int(height * shape(picture) / 0.09)) for picture, caption, _ in row] for row in rows
    ]
    below = 0.3 + 0.23 * max(len(lines) for row in wrapped for lines in row)
    figure, axes = paper(width, (height + below) * len(rows) + gap)
    for number, (row, texts) in enumerate(zip(rows, wrapped, strict=True), start=1):
        left, bottom = gap, (height + below) * (len(rows) - number) + below
        for (picture, _, colour), lines in zip(row, texts, strict=True):
            put(axes, picture, left, bottom, height * shape(picture), height)
            style = {"color": colour, "ha": "left", "va": "top", "linespacing": 1.3}
            write(axes, left, bottom - 0.12, "\n".join(lines), 12.5, **style)
            left += height * shape(picture) + gap
    return figure


def shape(picture: Image.Image) -> float:
    return picture.width / picture.height


def captioned(model: CaptionModel, scenes: list[Scene]) -> list[list[Captioned]]:
    """Return a scene of each shape, at the top and at the bottom in turn, and last one with a wrong caption, if any."""
    rows: list[Captioned] = []
    backgrounds: list[str] = []
    right = [seen for seen in scenes if is_right(model, seen)]
    for shape, place in zip(sample.SHAPES, itertools.cycle(sample.PLACES), strict=False):
        fitting = [seen for seen in right if {shape, place} <= set(seen.references[0].split())]
        seen = min(fitting, key=lambda seen: backgrounds.count(background(seen)))
        backgrounds.append(background(seen))
        rows.append((seen.picture, best(model, seen).text, TEXT))
    wrong = [seen for seen in scenes if seen not in right][:1]
    rows += [(seen.picture, f"{best(model, seen).text} (wrong)", WRONG) for seen in wrong]
    return [rows[:4], rows[4:]]


def is_right(model: CaptionModel, seen: Scene, beam: int = 3) -> bool:
    """Say whether the caption is one of the references, word for word."""
    words = best(model, seen, beam=beam).text.split()
    return words in [model.vocab.tokenise(text) for text in seen.references]


def background(seen: Scene) -> str:
    return seen.references[0].split()[-3]  # … of a grey background .


def photographs() -> list[Path]:
    package = importlib.util.find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError("the photographs come with scikit-image; install it: pip install scikit-image")
    return [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]


def draw_photographs() -> Figure:
    """Draw two photographs, the captions that pretrained/ gives them, and the attention of the longest words."""
    model = load_model(PRETRAINED)
    gap, side = 0.14, 3.1
    small = (side - gap) / 2
    figure, axes = paper(4 * side + 5 * gap + 0.2, side + 0.85)
    for number, path in enumerate(photographs()):
        seen = encode_file(model, path, [])
        caption = best(model, seen, keep_attention=True)
        attention = AttentionMaps.of(caption)
        assert attention
        left, bottom = gap + number * (2 * side + 2 * gap + 0.2), 0.2
        write(axes, left, bottom + side + 0.3, caption.text, 15, ha="left", weight="bold")
        put(axes, seen.picture, left, bottom, side, side)
        for place, word in enumerate(longest_words(attention.words)):
            x = left + side + gap + place % 2 * (small + gap)
            y = bottom + (1 - place // 2) * (small + gap)
            put(axes, heat_map(seen.picture, attention.levels()[word]), x, y, small, small)
            write(axes, x + 0.08, y + 0.17, attention.words[word], 12, ha="left", color="white", weight="bold")
    return figure


def longest_words(words: Sequence[str], number: int = 4) -> list[int]:
    """Return where the longest of the words stand, each word once, in their order."""
    first = sorted({word: words.index(word) for word in words}.values())
    return sorted(sorted(first, key=lambda place: -len(words[place]))[:number])


def draw_attention() -> Figure:
    """Draw the attention of the captioner in pretrained/ on a photograph, word by word."""
    model = load_model(PRETRAINED)
    seen = encode_file(model, photographs()[1], [])
    attention = AttentionMaps.of(best(model, seen, keep_attention=True))
    assert attention
    shaded = [heat_map(seen.picture, level) for level in attention.levels()]
    panels = [(seen.picture, "the photograph", FAINT)]
    panels += [(picture, word, TEXT) for picture, word in zip(shaded, attention.words, strict=True)]
    return draw_captioned([panels[first : first + 4] for first in range(0, len(panels), 4)])


# ---- the pictures that explain ---------------------------------------------------------------------------------------


def draw_chain(model: CaptionModel, seen: Scene) -> Figure:
    """Draw picture → features of its regions → a decoder that reads its own last word."""
    words = [*best(model, seen).words[:6], "…"]
    figure, axes = paper(13, 3.5)
    put(axes, seen.picture, 0.3, 0.8, 1.9, 1.9)
    write(axes, 1.25, 0.5, f"a picture: {seen.picture.width} x {seen.picture.height}")
    arrow(axes, (2.35, 1.75), (3.55, 1.75))
    write(axes, 2.92, 1.98, "encoder")
    put(axes, as_colours(seen.features[0]), 3.7, 0.8, 1.9, 1.9)
    write(axes, 4.65, 0.5, f"{seen.features.shape[1]} regions, {seen.features.shape[2]:,} features each")
    arrow(axes, (5.75, 1.75), (6.4, 1.75))
    write(axes, 6.07, 1.98, "decoder")
    for number, (read, said) in enumerate(zip(["<sos>", *words], words, strict=False)):
        x = 6.9 + 0.9 * number
        box(axes, x, 1.75, "…" if said == "…" else "LSTM", 0.6)
        write(axes, x, 0.7, read, color=RIGHT if number else TEXT)
        write(axes, x, 2.8, said, color=RIGHT, weight="bold")
        arrow(axes, (x, 0.88), (x, 1.5))
        arrow(axes, (x, 2.0), (x, 2.62))
        if number:
            arrow(axes, (x - 0.6, 1.75), (x - 0.3, 1.75))
            arrow(axes, (x - 0.76, 2.68), (x - 0.12, 0.88), LINES)
    write(axes, 6.6, 3.2, "what it writes …", ha="left")
    write(axes, 6.6, 0.3, "… it reads next", ha="left")
    return figure


def as_colours(features: torch.Tensor) -> Any:
    """Return the features of regions (L, D) as an RGB picture of their three principal components (side, side, 3)."""
    centred = features - features.mean(0)
    parts = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:3].T  # (L, 3)
    parts = (parts - parts.amin(0)) / (parts.amax(0) - parts.amin(0))
    side = math.isqrt(len(features))
    return (0.25 + 0.7 * parts).view(side, side, 3).numpy()


@torch.inference_mode()
def draw_teacher_forcing(model: CaptionModel, seen: Scene) -> Figure:
    """Draw for each word of a reference what the LSTM reads, the target, and the probability it gives the target."""
    ids = torch.tensor([SOS, *model.vocab.numericalize(seen.references[0]), EOS])  # (1 + T,)
    features = model.standardise(seen.features)
    hidden, _ = model.decoder(features, ids[None, :-1], torch.tensor([0]))  # (1, T, H)
    probable = model.decoder.output(hidden)[0].softmax(1).gather(1, ids[1:, None]).squeeze(1).tolist()  # (T,)
    words = [model.vocab.words[i] for i in ids]
    figure, axes = paper(13, 3.9)
    left, step = 1.75, (13 - 2.35) / len(words)
    for y, text in ((3.5, "reads"), (2.95, "should say"), (1.7, "probability"), (0.72, "- ln of it")):
        write(axes, 0.25, y, text, ha="left", weight="bold")
    put(axes, seen.picture, left - 0.3, 3.2, 0.6, 0.6)
    write(axes, left, 2.95, "not scored", 9.5, color=FAINT)
    axes.plot([left + step * 0.6, 12.8], [1.1, 1.1], color=LINES, lw=1)
    for number, (read, said, p) in enumerate(zip(words, words[1:], probable, strict=False), 1):
        x, colour = left + number * step, RIGHT if p > 0.5 else WRONG
        write(axes, x, 3.5, read, 9.5)
        write(axes, x, 2.95, said, 9.5, color=colour, weight="bold")
        axes.bar(x, 1.25 * p, 0.45, 1.1, color=colour)
        write(axes, x, 1.22 + 1.25 * p, f"{p:.2f}", 10)
        write(axes, x, 0.72, f"{-math.log(p):.2f}", 10)
    loss = -sum(map(math.log, probable)) / len(probable)
    write(axes, 0.25, 0.3, "orange: less probable than all other words together", ha="left", color=WRONG)
    write(axes, 12.8, 0.3, f"mean over the {len(probable)} words: a loss of {loss:.3f}", ha="right", weight="bold")
    return figure


def trace(
    model: CaptionModel, seen: Scene, options: SearchConfig
) -> tuple[search.Hypothesis, dict[tuple[int, ...], float]]:
    """Return the caption of a beam search, and the log-probability of every hypothesis that its beams held."""
    held: dict[tuple[int, ...], float] = {}

    class Traced(Finished):
        def collect_ended(self, beam: Beam) -> None:
            for ids, log_prob in zip(beam.words[:, 1:].tolist(), beam.log_prob.flatten().tolist(), strict=True):
                if log_prob > -math.inf:
                    held[tuple(ids)] = log_prob
            super().collect_ended(beam)

    with mock.patch.object(search, "Finished", Traced):
        [[winner]] = search.search(model.decoder, model.standardise(seen.features), options)
    return winner, held


@dataclass
class Branch:
    """A part of the tree without branches: its words, and the branches that follow."""

    words: tuple[int, ...]
    log_prob: float
    end: tuple[int, ...]
    branches: list["Branch"] = field(default_factory=list)


def grow(held: dict[tuple[int, ...], float], start: tuple[int, ...] = (), first: int = 0) -> Branch:
    """Return the tree below the hypothesis `start`, whose words from `first` on belong to its trunk."""
    longer = [ids for ids in held if ids[:-1] == start]
    if len(longer) == 1 and start:
        return grow(held, longer[0], first)
    branches = [grow(held, ids, len(start)) for ids in sorted(longer, key=lambda ids: -held[ids])]
    return Branch(start[first:], held.get(start, 0.0), start, branches)


def parted(model: CaptionModel, scenes: list[Scene]) -> Scene:
    """Return the scene where a beam of three gains most over greedy search: a right caption before a better score."""

    def gain(seen: Scene) -> tuple[int, float]:
        greedy, wide = best(model, seen, beam=1), best(model, seen, beam=3)
        return is_right(model, seen, 3) - is_right(model, seen, 1), wide.score - greedy.score

    return max(scenes, key=gain)


def draw_tree(model: CaptionModel, seen: Scene) -> Figure:
    """Draw a beam search of three: each hypothesis in its beams, how it ended, and the caption of greedy search."""
    options = model.config.search.model_copy(update={"beam": 3})
    winner, held = trace(model, seen, options)
    tree = grow(held)
    leaves = count_leaves(tree)
    alone = best(model, seen, beam=1)
    greedy = (*model.vocab.look_up(alone.words), EOS)
    figure, axes = paper(13, 0.9 + 0.52 * leaves)
    put(axes, seen.picture, 0.3, 0.4 + 0.26 * leaves - 0.6, 1.2, 1.2)
    rows = iter(0.3 + 0.52 * (leaves - number - 0.5) for number in range(leaves))

    def plant(branch: Branch, x: float) -> float:
        """Draw a branch from x on; returns its height."""
        text = " ".join(model.vocab.words[i] for i in branch.words)
        after = x + CHARACTER * (len(text) + 1) + (0.62 if branch.words else 0)
        heights = [plant(each, after + 0.45) for each in branch.branches]
        y = (heights[0] + heights[-1]) / 2 if heights else next(rows)
        for height in heights:
            axes.plot([after, after + 0.2, after + 0.4], [y, height, height], color=LINES, lw=1.5, zorder=0)
        ended = branch.end[-1:] == (EOS,) or len(branch.end) == options.max_length
        won = branch.end in (tuple(winner.ids), (*winner.ids, EOS))
        followed = not heights and branch.end == greedy[: len(branch.end)] and not won
        colour = RIGHT if won else WRONG if followed else TEXT if heights or ended else FAINT
        mono = {"ha": "left", "family": "DejaVu Sans Mono", "color": colour, "weight": "bold" if won else "normal"}
        write(axes, x, y, text, 10.5, **mono)
        if branch.words:
            write(axes, x + CHARACTER * (len(text) + 0.7), y, f"{branch.log_prob:.2f}", 9, ha="left", color=FAINT)
        if not heights:
            fate = "dropped from the beam"
            if ended:
                score = branch.log_prob / len(branch.end) ** options.length_penalty
                fate = (
                    f"{'best' if won else 'greedy' if followed else 'ended'}: {branch.log_prob:.2f} / {len(branch.end)}"
                )
                fate += f"$^{{{options.length_penalty}}}$ = {score:.3f}"
            write(axes, 12.85, y, fate, 10, ha="right", color=colour, weight="bold" if won else "normal")
        return y

    plant(tree, 1.6)
    top = 0.6 + 0.52 * leaves
    write(axes, 1.9, top, "words, and the sum of their log-probabilities", 10, ha="left", color=FAINT)
    write(axes, 12.85, top, f"greedy search writes: {alone.text}", 10, ha="right", color=WRONG)
    return figure


def count_leaves(branch: Branch) -> int:
    return sum(map(count_leaves, branch.branches)) or 1


def worst(model: CaptionModel, scenes: list[Scene]) -> Scene:
    """Return the scene whose caption has the lowest BLEU-4."""
    return min(scenes, key=lambda seen: score(model, best(model, seen).text, seen.references).corpus["bleu4"])


def score(model: CaptionModel, caption: str, references: list[str]) -> metrics.Scores:
    tokenise = metrics.batched(model.vocab.tokenise)
    names = [f"bleu{n}" for n in range(1, 5)]
    return metrics.evaluate({"it": caption}, {"it": references}, tokenise, "en", names)


def draw_overlap(model: CaptionModel, seen: Scene) -> Figure:
    """Draw which n-grams of 1 to 4 words of a caption occur in one of its references."""
    caption = best(model, seen).text
    words = caption.split()
    references = [model.vocab.tokenise(text) for text in seen.references]
    scores = score(model, caption, seen.references)
    figure, axes = paper(13, 5.2)
    put(axes, seen.picture, 0.3, 3.2, 1.7, 1.7)
    write(axes, 2.3, 4.8, "five references", ha="left", weight="bold")
    for number, reference in enumerate(references):
        write(axes, 2.3, 4.47 - 0.3 * number, " ".join(reference), ha="left")
    left, step = 2.3, min(0.85, 9.4 / len(words))
    write(axes, 0.3, 2.55, "the caption", ha="left", weight="bold")
    for place, word in enumerate(words):
        write(axes, left + (place + 0.5) * step, 2.55, word, 9.5, weight="bold")
    write(axes, left + (len(words) + 0.5) * step, 2.55, "right", ha="left", weight="bold")
    for n in range(1, 5):
        known = {tuple(r[first : first + n]) for r in references for first in range(len(r) - n + 1)}
        y = 2.5 - 0.45 * n
        write(axes, 0.3, y, f"{n} word{'s in a row' if n > 1 else ''}", ha="left")
        for first in range(len(words) - n + 1):
            colour = RIGHT if tuple(words[first : first + n]) in known else WRONG
            box(axes, left + (first + 0.5) * step, y, "", step * 0.86, 0.3, colour)
        right, of = (int(scores.per_image["bleu4"][0, column]) for column in (n - 1, n + 3))
        write(axes, left + (len(words) + 0.5) * step, y, f"{right} of {of}", ha="left")
    bleu = ", ".join(f"BLEU-{n} {scores.corpus[f'bleu{n}']:.1f}" for n in range(1, 5))
    write(axes, 0.3, 0.25, "A box stands for the words that begin above it:", ha="left")
    write(axes, 4.35, 0.25, "in a reference", ha="left", color=RIGHT, weight="bold")
    write(axes, 5.75, 0.25, "in none", ha="left", color=WRONG, weight="bold")
    write(axes, 12.7, 0.25, bleu, ha="right")
    return figure


if __name__ == "__main__":
    raise SystemExit(run_script(main))
