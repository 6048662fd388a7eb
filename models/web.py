"""A trained captioner as a web page, which needs no server of its own: `python -m models.export --web` (docs/web.md).

The page's own files are in models/web_page/; onnxruntime-web, which runs the graphs in a browser, comes from npm.
"""

import base64
import hashlib
import io
import json
import os
import tarfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import UserError, say
from data.vocab import SPECIALS
from models import confidence, imagenet
from models.compact_consensus import CompactConsensus
from models.consensus import MAX_NGRAM, SIGMA, Consensus
from models.model import SEEN, CaptionModel
from utils import write_atomically

PAGE = Path(__file__).with_name("web_page")
EXAMPLES = Path(__file__).parents[1] / "docs" / "images" / "examples"
PAGE_FILES = ("index.html", "page.js", "captioner.js", "service-worker.js")
RUNTIME = "onnxruntime-web-1.30.0.tgz"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
REGISTRY = "https://registry.npmjs.org"  # or another one, which npm reads from the same variable
TIMEOUT = 60  # seconds without a byte
MOST_BYTES = 1 << 26  # that are fetched
PARTS = {  # of the runtime: for processors, and for graphics cards as well
    kind: {
        "script": f"runtime/ort.{kind}.min.js",
        "module": f"runtime/ort-wasm-simd-threaded{ending}.mjs",
        "binary": f"runtime/ort-wasm-simd-threaded{ending}.wasm",
    }
    for kind, ending in (("wasm", ""), ("webgpu", ".asyncify"))
}
NOTICE = """onnxruntime-web {version}, from https://www.npmjs.com/package/onnxruntime-web, unchanged

MIT License, Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
HALVED = 1024  # numbers in a tensor from which it is kept in half precision
CHECKED = 256  # numbers by which a browser finds out whether it computes what it should
TOLERANCE = 0.01  # of the largest of them


def compact(model: CaptionModel) -> None:
    """Give the model a consensus that holds nobody's captions, as `models.publish` does, where it has another."""
    if isinstance(model.consensus, Consensus):
        model.consensus = CompactConsensus.fit(model.consensus)


def facts_of(model: CaptionModel, features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a search in the page needs to know of pictures besides their memory, given their raw features.

    `probs` are those of ImageNet's classes (B, 1000); `expected` the weights of n-grams (B, G) and `length` the words
    (B,) of a caption, as consensus expects them. What the model does not have is left out.
    """
    facts = {}
    probs = model.encoder.classify(features)
    if probs is not None:
        facts["probs"] = probs
    if model.consensus:
        expected, length = model.consensus.expect(features)  # (G, B), (B,)
        facts |= {"expected": expected.T, "length": length}
    return facts


def halve(graph: bytes) -> bytes:
    """Return an ONNX graph with its weights in half precision, which a runtime makes fp32 again as it loads them."""
    import onnx

    model = onnx.load_from_string(graph)
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT or np.prod(tensor.dims) < HALVED:
            continue
        values, name = onnx.numpy_helper.to_array(tensor), f"{tensor.name}_half"
        if np.abs(values).max() < np.finfo(np.float16).max:
            casts.append(onnx.helper.make_node("Cast", [name], [tensor.name], to=onnx.TensorProto.FLOAT))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), name))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model.SerializeToString()


def describe(model: CaptionModel, graphs: dict[str, bytes]) -> dict[str, Any]:
    """Return what captioner.json holds: all that the page needs to know besides the graphs, as plain values."""
    config, vocab = model.config, model.vocab
    search = config.search.model_dump()
    if model.consensus is None:
        search["consensus"] = 0.0
    described: dict[str, Any] = {
        "about": f"{config.decoder.name} on {config.encoder.name}, {len(vocab) - len(SPECIALS):,} words; it knows what "
        "it was trained on, and captions all else the same",
        "words": vocab.words,
        "language": vocab.language,
        "size": model.transform.image_size,
        "bicubic": model.transform.interpolation == "bicubic",
        "search": search,
        "forbidden": model.forbidden_ids(config.search.forbidden),
        "seed": config.train.seed,
        "seen": SEEN,
        "classes": None,
        "consensus": None,
        "confidence": None,
        "check": check(graphs["encoder.onnx"], model.transform.image_size),
    }
    if model.encoder.classifier is not None:
        described["classes"] = {
            "class_names": imagenet.names(),
            "kind_of_class": imagenet.kind_of_class().tolist(),
            "kind_names": imagenet.kinds(),
            "kind_words": model.kind_words.tolist(),
        }
    if model.consensus:
        ngrams = model.consensus.ngrams
        described["consensus"] = {
            "codes": ngrams.codes[:-1].tolist(),
            "idf": ngrams.idf.tolist(),
            "base": ngrams.base,
            "max_ngram": MAX_NGRAM,
            "sigma": SIGMA,
        }
    if model.confidence:
        limits = {"unsure": confidence.UNSURE, "likely": confidence.LIKELY, "most_named": confidence.MOST_NAMED}
        described["confidence"] = model.confidence.state() | limits
    return described


def check(encoder: bytes, size: int) -> dict[str, Any]:
    """Return what a browser should compute of a made-up picture: some numbers of its memory, and how far off they may
    be. captioner.js makes the same picture.
    """
    import onnxruntime

    pixels = (np.arange(3 * size * size) * 7 >> 4 & 255).astype(np.uint8).reshape(1, 3, size, size)
    session = onnxruntime.InferenceSession(encoder)
    memory = session.run(["memory_0"], {"pixels": pixels})[0].ravel()
    chosen = min(CHECKED, len(memory))
    expected = memory[np.floor(np.arange(chosen) * (len(memory) / chosen)).astype(int)]
    return {"expected": expected.tolist(), "tolerance": float(TOLERANCE * np.abs(expected).max())}


def fetch_runtime(cache: Path) -> dict[str, bytes]:
    """Return onnxruntime-web's files by their place in the page, from npm, or from `cache`, where they are then kept.

    Raises UserError when they cannot be fetched, or are not what they should be.
    """
    kept = cache / RUNTIME
    url = f"{os.environ.get('NPM_CONFIG_REGISTRY', REGISTRY).rstrip('/')}/onnxruntime-web/-/{RUNTIME}"
    content = kept.read_bytes() if kept.is_file() else b""
    if not is_runtime(content):
        say(f"fetching {url} (33 MB)")
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                content = answer.read(MOST_BYTES)
        except (OSError, ValueError) as error:  # urllib's errors are OSErrors
            raise UserError(f"cannot fetch {url} ({error}); put that file at {kept}, and run this again") from None
        if not is_runtime(content):
            raise UserError(f"{url} gave another file (its sha512 differs); fetch it elsewhere, and put it at {kept}")
        write_atomically(kept, content)
    files = {"runtime/LICENSE.txt": NOTICE.format(version=RUNTIME.removesuffix(".tgz").rpartition("-")[2]).encode()}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for place in (place for part in PARTS.values() for place in part.values()):
            member = archive.extractfile(place.replace("runtime/", "package/dist/"))
            assert member
            files[place] = member.read()
    return files


def is_runtime(content: bytes) -> bool:
    return base64.b64encode(hashlib.sha512(content).digest()).decode() == SHA512


def page_files(model: CaptionModel, graphs: dict[str, bytes], runtime: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of the page by their place in its folder; `graphs` are encoder.onnx and decoder_step.onnx, and
    `runtime` what `fetch_runtime` gives.
    """
    files = runtime | graphs
    examples = {f"examples/{path.name}": path.read_bytes() for path in sorted(EXAMPLES.glob("*.jpg"))}
    described = describe(model, graphs)
    described |= {"runtime": PARTS, "examples": list(examples), "sizes": {name: len(files[name]) for name in files}}
    files |= examples | {"captioner.json": json.dumps(described, separators=(",", ":")).encode()}
    files |= {name: (PAGE / name).read_bytes() for name in PAGE_FILES}
    version = hashlib.sha256(b"".join(hashlib.sha256(files[name]).digest() for name in sorted(files))).hexdigest()[:16]
    worker = files["service-worker.js"].replace(b"{{version}}", version.encode())
    files["service-worker.js"] = worker.replace(b"{{files}}", json.dumps(["", *files]).encode())  # "" is index.html
    return files
