"""An encoder in 8-bit whole numbers, which processors multiply faster than floats: `encoder.precision=int8`.

Weights are rounded for each output channel by itself, and what a layer gives over the range that it has for drawings of
the built-in sample (static quantisation, Jacob et al. 2018): they serve as well as photographs, so that no dataset is
needed. ONNX Runtime makes the graph, once for each backbone, and runs it; docs/results.md has what else was tried.
"""

import hashlib
import importlib.util
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cli import UserError, say
from data import sample
from data.transforms import Transform
from models.graph import Graph, quietly, to_onnx
from utils import write_atomically

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
CALIBRATION, BATCH = 16, 8  # drawings
LAYERS = ["Conv", "Add", "Relu", "Clip", "MaxPool"]  # in 8 bits; all else is little work
WORST = 0.5  # of the features' spread over drawings, by which those in 8 bits may differ; over photographs it is less
FIRST = 3  # convolutions that stay in floats where 8 bits cost more than that: the first ones cost most
EXACT = ("avx512_vnni", "avx_vnni", "amx_int8")  # processors that add up products of 8 bits without overflow


class Int8Encoder(nn.Module):
    """Encodes uint8 pixels (B, 3, S, S) as float features (B, D) or (B, L, D), on the processor.

    Args:
        encoder: a `models.encoder.EncoderCNN`, frozen.
        folder: where the graph is kept from its first use on.

    Raises UserError where a package is missing, where the folder cannot be written, and for a backbone whose features
    8 bits spoil or that they do not make faster.
    """

    def __init__(self, encoder: Any, transform: Transform, folder: Path) -> None:
        super().__init__()
        missing = [package for package in PACKAGES if not importlib.util.find_spec(package)]
        if missing:
            raise UserError(
                f"encoder.precision=int8 needs {', '.join(missing)}; run: pip install -r requirements-extras.txt, or "
                "set encoder.precision=auto"
            )
        name = name_copy(encoder, transform)
        graph = find(folder, name)
        if graph is None:
            check_convolutions(encoder)
            try:  # before work that takes half a minute
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UserError(
                    f"the 8-bit copy cannot be kept in {folder} ({error.strerror}); name another folder with "
                    "data.cache=FOLDER, or set encoder.precision=auto"
                ) from None
            say(f"making an 8-bit copy of {encoder.identity['name']}, once, in {folder}/")
            graph = make(encoder, transform)
            write_atomically(folder / f"{name}-{digest(graph)}.onnx", graph)
        self.session = load(graph)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.session.run(None, {"pixels": pixels.numpy()})[0])


def name_copy(encoder: Any, transform: Transform) -> str:
    """Return the name of an encoder's 8-bit copy, which differs where anything does that it depends on."""
    parts = {"encoder": encoder.identity | {"source": None}, "spatial": encoder.spatial, "bits": weight_bits()}
    parts |= asdict(transform) | {"made": [CALIBRATION, FIRST, WORST]}
    key = digest(json.dumps(parts, sort_keys=True).encode())
    return f"{encoder.identity['name'].replace('/', '_')}-int8-{key}"


def find(folder: Path, name: str) -> bytes | None:
    """Return a graph of this name that lies in the folder, undamaged: a file's own name says what must be in it."""
    for path in folder.glob(f"{name}-*.onnx"):
        graph = path.read_bytes()
        if path.stem.endswith(digest(graph)):
            return graph
    return None


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def weight_bits() -> int:
    """Return how many bits a weight may have: 7 where sums of two products would overflow 16 bits."""
    found = torch.cpu.get_capabilities()
    return 8 if any(found.get(name) for name in EXACT) else 7


@torch.no_grad()
def make(encoder: Any, transform: Transform) -> bytes:
    """Return the encoder as an 8-bit ONNX graph, from uint8 pixels to features; see `quantise`."""
    pixels = drawings(transform)
    fast = encoder.for_inference(torch.float32).to(memory_format=torch.contiguous_format)
    graph = Graph(fast, lambda pixels: (fast(transform.normalise(pixels)),))
    exact = to_onnx(graph, {"pixels": pixels[:2]}, [{0: "pictures"}], ["features"])
    return quantise(exact, pixels, weight_bits(), encoder.identity["name"])


def check_convolutions(encoder: Any) -> None:
    """Raise UserError for a backbone with few convolutions, such as a Transformer, which 8 bits make slower."""
    backbone = encoder.backbone
    convolutions = nn.ModuleList(part for part in backbone.modules() if isinstance(part, nn.Conv2d))
    weights, of_all = (sum(each.numel() for each in part.parameters()) for part in (convolutions, backbone))
    if weights < of_all / 2:
        raise UserError(
            f"8 bits are for convolutions, which have {weights / of_all:.0%} of the weights of "
            f"{encoder.identity['name']}; set encoder.precision=auto"
        )


def drawings(transform: Transform) -> torch.Tensor:
    """Return the pixels (P, 3, S, S) of CALIBRATION scenes of the built-in sample."""
    scenes = [scene for _, scene in sample.choose_scenes()][:CALIBRATION]
    drawn = (sample.draw_scene(scene, np.random.default_rng(number)) for number, scene in enumerate(scenes))
    return torch.stack([transform.resize(picture) for picture in drawn])


def quantise(graph: bytes, pixels: torch.Tensor, bits: int, name: str) -> bytes:
    """Return an ONNX graph of uint8 `pixels` (P, 3, S, S) with its convolutions in 8 bits, for the ranges of these
    pictures; weights have 8 `bits`, or 7 for any processor. The FIRST convolutions stay in floats where that is
    needed.

    Raises UserError where the first output, of the backbone `name`, still differs by more than WORST.
    """
    own, error = run(graph, pixels), 0.0  # (P, D) or (P, L, D)
    for floats in (0, FIRST):
        rounded = round_layers(graph, pixels, bits, floats)
        error = float(np.linalg.norm(run(rounded, pixels) - own) / np.linalg.norm(own - own.mean(0)))
        if error <= WORST:
            return rounded
    raise UserError(
        f"8 bits spoil the features of {name}: they differ by {error:.0%} of their spread; set encoder.precision=auto"
    )


def round_layers(graph: bytes, pixels: torch.Tensor, bits: int, floats: int) -> bytes:
    """Return the graph with its convolutions in 8 bits, but for the first `floats`; see `quantise`."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = ({"pixels": part.numpy()} for part in pixels.split(BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    exact = onnx.load_from_string(graph)
    with quietly(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "int8.onnx")
        quantize_static(
            exact,
            path,
            Batches(),
            op_types_to_quantize=LAYERS,
            nodes_to_exclude=[node.name for node in exact.graph.node if node.op_type == "Conv"][:floats],
            per_channel=True,
            reduce_range=bits == 7,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return path.read_bytes()


def run(graph: bytes, pixels: torch.Tensor) -> np.ndarray:
    """Return what an ONNX graph gives for uint8 pixels (P, 3, S, S)."""
    session = load(graph)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = pool.map(lambda part: session.run(None, {"pixels": part.numpy()})[0], pixels.split(BATCH))
        return np.concatenate(list(parts))


def load(graph: bytes) -> Any:
    """Return an ONNX graph that each thread which calls it runs alone; raises ONNX Runtime's errors where it is none.

    Threads with pictures of their own do more than those that share the work of a layer, and wait for each other.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
