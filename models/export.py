"""Take a trained model elsewhere: tensors as safetensors, all else as JSON, and two ONNX graphs that need no PyTorch.

`python -m models.export --run attention` writes them, once the graphs have been compared with PyTorch; docs/export.md
says what they hold. `--web` writes a page instead that captions pictures in a browser; see models/web.py.
"""

from cli import Parser, UserError, run_script, say  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import importlib.util
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from config import setting_names
from data import sample
from data.dataset import pad
from data.vocab import SOS
from models import web
from models.checkpoint import load_model, model_from_state, model_state
from models.decoder import Decoder, Memory, State
from models.graph import Graph, to_onnx
from models.hub import check_name, is_on_hub, read_checkpoint, separate
from models.model import CaptionModel
from models.search import search
from utils import PRETRAINED, find_run, knows_photographs, write_atomically

ENCODER, STEP = "encoder.onnx", "decoder_step.onnx"
PICTURES, BEAM = 6, 3  # how many drawn scenes the graphs are compared on, and by which beam
Facts = Callable[[torch.Tensor], dict[str, torch.Tensor]]
TOLERANCE = 1e-4  # of the largest logit, by which logits may differ: fp32 has seven digits, of which some get lost


def main() -> None:
    args = parse_args()
    path = args.checkpoint or str(find_checkpoint(args))
    if is_on_hub(path) and not args.out:
        check_name(path)
        raise UserError(f"what is made of {path} belongs to no run; add --out FOLDER")
    out = Path(args.out) if args.out else Path(path).parent / ("web" if args.web else "export")
    for package in ("safetensors", "onnx", "onnxscript", "onnxruntime"):
        if not importlib.util.find_spec(package):
            raise UserError(f"export needs the package {package}; run: pip install -r requirements-extras.txt")
    if args.web:
        if not (args.run or args.checkpoint) and path != str(PRETRAINED):
            say(f"this is the newest run; --checkpoint {PRETRAINED} takes the captioner in pretrained/")
        write_page(path, out, args.overrides)
        return
    saved = read_checkpoint(path)
    model = model_from_state(saved, path, args.overrides).eval()
    say(f"exporting {path} ({model.config.encoder.name} and {model.config.decoder.name})")

    kept = {name: saved[name] for name in (*model_state(model), "scores") if name in saved}
    files = separate(kept | {"config": model.config.model_dump()})
    graphs = trace(model)
    difference = compare(model, OnnxDecoder(*graphs))
    say(f"ONNX against PyTorch in fp32: logits differ by {difference:.1e} at most, and no caption of {PICTURES} does")
    if model.config.encoder.precision == "int8":
        graphs = (in_8_bits(model, *graphs), graphs[1])
    files |= dict(zip((ENCODER, STEP), graphs, strict=True))
    for name, content in files.items():
        write_atomically(out / name, content)
        say(f"wrote {out / name} ({len(content) / 1e6:.2f} MB)")
    say(f"next: python docs/caption_with_onnx.py {out} photo.jpg")


def parse_args() -> argparse.Namespace:
    parser = Parser(
        description="Write a trained model as safetensors and JSON, and as ONNX for use without PyTorch.",
        epilog="Example: python -m models.export --run attention --out exported. How captions are searched may be said "
        "anew for config.json: search.beam=5",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--run", metavar="NAME", help="take this run's checkpoint (default: the newest run's)")
    which.add_argument("--checkpoint", metavar="FILE", help="a checkpoints.pth, or hf://user/name")
    page = "write a web page that captions pictures by itself (default: the newest run that learned from photographs, "
    parser.add_argument("--web", action="store_true", help=f"{page}or pretrained/captioner.pth)")
    parser.add_argument("--out", metavar="FOLDER", help="default: export/ beside the checkpoint, or web/")
    return parser.parse_options(setting_names())


def find_checkpoint(args: argparse.Namespace) -> Path:
    """Return that of the run named, or of the newest one; for a page, one that knows photographs, or pretrained/."""
    if args.run or not args.web:
        return find_run("checkpoints.pth", args.run) / "checkpoints.pth"
    try:
        return find_run("checkpoints.pth", accept=knows_photographs) / "checkpoints.pth"
    except UserError:  # there is none
        return PRETRAINED


def write_page(path: str, out: Path, overrides: list[str]) -> None:
    """Write a checkpoint as a web page into the folder `out`; see docs/web.md."""
    if out.is_dir() and any(out.iterdir()) and not (out / "captioner.json").is_file():
        raise UserError(f"{out} holds other files; name a folder of its own with --out")
    model = load_model(path, overrides)
    runtime = web.fetch_runtime(Path(model.config.data.cache))
    say(f"exporting {path} ({model.config.encoder.name} and {model.config.decoder.name}) as a web page")
    if model.config.encoder.precision == "int8":
        say("the page computes with floats of 16 bits, whatever encoder.precision is")
    web.compact(model)
    graphs = trace(model, partial(web.facts_of, model))
    compare(model, OnnxDecoder(*graphs))
    halves = [web.halve(graph) for graph in graphs]
    files = web.page_files(model, dict(zip((ENCODER, STEP), halves, strict=True)), runtime)
    for name, content in files.items():
        write_atomically(out / name, content)
    model_size, all_size = (sum(map(len, each)) / 1e6 for each in (halves, files.values()))
    say(f"wrote {out} ({all_size:.1f} MB, of which the model has {model_size:.1f})")
    say(f"next: python -m http.server -d {out}, and open http://localhost:8000; any static host will do")


@torch.no_grad()
def trace(model: CaptionModel, facts: Facts = lambda features: {}) -> tuple[bytes, bytes]:
    """Return the ONNX graphs of a model on the CPU: the encoder and one step of the decoder.

    `facts` are what else the encoder's graph gives, by name, made of pictures' raw features. The graphs are traced with
    two pictures of three hypotheses after two words, sizes that no other axis takes for its own.
    """
    decoder = model.decoder
    pixels = torch.zeros(2, 3, *[model.transform.image_size] * 2, dtype=torch.uint8)
    features = model.encoder(model.transform.normalise(pixels))
    memory = decoder.prepare(model.standardise(features))
    start = decoder.start(memory)
    token, state = torch.full((6,), SOS), tuple(part.repeat_interleave(3, 0) for part in start)
    for _ in range(2):
        _, state, attention = decoder.step(token, state, memory)
    pictures, hypotheses = {0: "pictures"}, {0: "hypotheses"}
    growing = [  # the axes of each part of the state that grow with each word
        {axis: "written" for axis in range(1, after.ndim) if before.shape[axis] != after.shape[axis]}
        for before, after in zip(start, state, strict=True)
    ]

    def encode_and_start(pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = model.encoder(model.transform.normalise(pixels))
        memory = decoder.prepare(model.standardise(features))
        return *memory, *decoder.start(memory), *facts(features).values()

    def one_step(token: torch.Tensor, *known: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits, state, attention = decoder.step(token, known[: len(start)], known[len(start) :])
        return logits, *state, *([] if attention is None else [attention])

    states = {f"state_{number}": part for number, part in enumerate(state)}
    memories = {f"memory_{number}": part for number, part in enumerate(memory)}
    known = [*memories, *states, *facts(features)]
    first = to_onnx(Graph(model, encode_and_start), {"pixels": pixels}, [pictures], known)
    step = to_onnx(
        Graph(decoder, one_step),
        {"token": token} | states | memories,
        [hypotheses, *(hypotheses | axes for axes in growing), *[pictures] * len(memory)],
        ["logits", *(f"next_{name}" for name in states), *([] if attention is None else ["attention"])],
    )
    return first, step


class OnnxDecoder(Decoder):
    """The two graphs behind the decoder interface, so that the same search runs them; pictures are uint8 pixels."""

    def __init__(self, encoder: bytes, step: bytes) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.encoder, self.decoder = (onnxruntime.InferenceSession(graph, options) for graph in (encoder, step))
        named = [part.name for part in self.encoder.get_outputs()]
        self.memories, self.states = ([name for name in named if name.startswith(k)] for k in ("memory", "state"))
        self.given = [part.name for part in self.decoder.get_inputs()]

    def prepare(self, features: torch.Tensor) -> Memory:
        found = self.encoder.run([*self.memories, *self.states], {"pixels": features.numpy()})
        memory = tuple(torch.from_numpy(part) for part in found)
        self.first = memory[len(self.memories) :]
        return memory[: len(self.memories)]

    def start(self, memory: Memory) -> State:
        return self.first

    def step(
        self, token: torch.Tensor, state: State, memory: Memory
    ) -> tuple[torch.Tensor, State, torch.Tensor | None]:
        values = [np.ascontiguousarray(part.numpy()) for part in (token, *state, *memory)]
        found = map(torch.from_numpy, self.decoder.run(None, dict(zip(self.given, values, strict=True))))
        logits, *rest = found
        return logits, tuple(rest[: len(state)]), rest[len(state)] if len(rest) > len(state) else None


@torch.inference_mode()
def in_8_bits(model: CaptionModel, encoder: bytes, step: bytes) -> bytes:
    """Return the encoder's graph with its convolutions in 8 bits, for any processor; raises UserError where that spoils
    it.
    """
    from models import int8

    int8.check_convolutions(model.encoder)
    pixels = int8.drawings(model.transform)
    rounded = int8.quantise(encoder, pixels, 7, model.config.encoder.name)
    options = model.config.search.model_copy(update={"temperature": 0.0, "beam": BEAM})
    own, theirs = (
        [best.ids for best, *_ in search(OnnxDecoder(graph, step), pixels, options)] for graph in (encoder, rounded)
    )
    same = sum(mine == other for mine, other in zip(own, theirs, strict=True))
    say(f"{ENCODER} in 8 bits: {same} of {len(own)} captions of drawings are the same")
    return rounded


@torch.inference_mode()
def compare(model: CaptionModel, graphs: Decoder) -> float:
    """Return by how much the graphs' logits differ from the model's at most, over the captions of drawn scenes.

    Raises UserError when that is more than TOLERANCE of the largest, or when beam search finds another caption.
    """
    scenes = [scene for _, scene in sample.choose_scenes()[:PICTURES]]
    drawn = [sample.draw_scene(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes)]
    pixels = torch.stack([model.transform.resize(picture) for picture in drawn])  # (B, 3, S, S)
    options = model.config.search.model_copy(update={"temperature": 0.0, "beam": BEAM})
    sources: list[tuple[Decoder, torch.Tensor]] = [(model.decoder, model.encode(pixels)), (graphs, pixels)]
    own, theirs = ([[best.ids for best in each] for each in search(*source, options)] for source in sources)
    words = pad([[SOS, *itertools.chain(*ids)] for ids in own])  # (B, 1 + T); numbers that overflow write no caption
    own_logits, their_logits = (read(*source, words) for source in sources)
    difference = float((own_logits - their_logits).abs().max())
    if not difference <= TOLERANCE * float(own_logits.abs().max()) or own != theirs:
        differ = sum(mine != other for mine, other in zip(own, theirs, strict=True))
        raise UserError(
            f"the ONNX graphs differ from the model (logits by {difference:.1e}, {differ} of {len(own)} captions), so "
            "nothing was written; try other versions of torch, onnxscript and onnxruntime"
        )
    return difference


def read(decoder: Decoder, pictures: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V) of a decoder that is given `words` (B, T) one after the other."""
    memory = decoder.prepare(pictures)
    state, logits = decoder.start(memory), []
    for token in words.T:
        following, state, _ = decoder.step(token.contiguous(), state, memory)
        logits.append(following)
    return torch.stack(logits, dim=1)


if __name__ == "__main__":
    raise SystemExit(run_script(main))
