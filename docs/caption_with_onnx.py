"""Caption a picture with what `python -m models.export` wrote: beam search in NumPy, no PyTorch (docs/export.md).

python docs/caption_with_onnx.py FOLDER PICTURE     (pip install numpy pillow onnxruntime)
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

PAD, SOS, EOS, UNK = range(4)


def squeeze(pixels: np.ndarray, size: int, bicubic: bool = False) -> np.ndarray:
    """Resize (H, W, 3) to a square as training did, to the bit; Pillow's bilinear `resize` is 1 of 255 off at most."""
    for axis in (1, 0):
        length = pixels.shape[axis]
        centre, place = length / size * (np.arange(size)[:, None] + 0.5), np.arange(length) + 0.5
        x = np.abs(place - centre) / max(length / size, 1)  # (size, length)
        if bicubic:
            weights = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2) * (x < 2)
        else:
            weights = np.maximum(0, 1 - x)
        weights /= weights.sum(1, keepdims=True)
        unit = 2 ** int(np.log2((2**15 - 0.5) / weights.max()))  # training's are integers of 16 bits
        total = np.tensordot(np.floor(weights * unit + 0.5), pixels.astype(float), (1, axis))
        pixels = np.floor(np.moveaxis(total, 0, axis) / unit + 0.5).clip(0, 255).astype(np.uint8)
    return pixels


class Captioner:
    def __init__(self, folder: str | Path) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.words, self.size = config["vocabulary"]["words"], config["transform"]["image_size"]
        self.bicubic = config["transform"]["interpolation"] == "bicubic"
        self.search = config["config"]["search"]
        self.encoder = onnxruntime.InferenceSession(Path(folder) / "encoder.onnx")
        self.decoder = onnxruntime.InferenceSession(Path(folder) / "decoder_step.onnx")
        self.known = [part.name for part in self.encoder.get_outputs()]  # memory_0 … state_0 …
        self.states = [name for name in self.known if name.startswith("state")]

    def __call__(self, picture: Image.Image) -> str:
        pixels = squeeze(np.asarray(ImageOps.exif_transpose(picture).convert("RGB")), self.size, self.bicubic)
        seen = self.encoder.run(None, {"pixels": pixels.transpose(2, 0, 1)[None]})  # of (1, 3, S, S)
        known = dict(zip(self.known, seen, strict=True))
        written, log_prob = [[SOS]], np.zeros(1)  # of K hypotheses
        ended: list[tuple[float, list[int]]] = []  # those that have left the beam, with their scores
        for length in range(1, self.search["max_length"] + 1):
            known["token"] = np.array([words[-1] for words in written])  # (K,)
            logits, *after = self.decoder.run(None, known)  # (K, V)
            peak = logits.max(1, keepdims=True)
            logits -= peak + np.log(np.exp(logits - peak).sum(1, keepdims=True))
            logits[:, [PAD, SOS, UNK]] = -np.inf
            total = log_prob[:, None] + logits  # (K, V)
            best = np.argsort(-total, axis=None)[: self.search["beam"] - len(ended)]
            rows, tokens = np.unravel_index(best, total.shape)  # (K',) each
            written = [[*written[row], token] for row, token in zip(rows.tolist(), tokens.tolist(), strict=True)]
            going_on = (tokens != EOS) & (length < self.search["max_length"])
            scores = total[rows, tokens] / length ** self.search["length_penalty"]
            ended += [(scores[i], written[i]) for i in np.flatnonzero(~going_on)]
            if not going_on.any():
                break
            written, rows, tokens = [written[i] for i in np.flatnonzero(going_on)], rows[going_on], tokens[going_on]
            log_prob = total[rows, tokens]
            known |= {name: part[rows] for name, part in zip(self.states, after, strict=False)}
        words = [self.words[token] for token in max(ended)[1] if token not in (SOS, EOS)]
        return re.sub(r" (n't|'\w+)\b", r"\1", " ".join(words))  # for Chinese: "".join(words)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python docs/caption_with_onnx.py FOLDER PICTURE")
    folder, picture = map(Path, sys.argv[1:])
    for path in (folder / "encoder.onnx", picture):
        if not path.is_file():
            sys.exit(
                f"error: there is no {path}; FOLDER is what `python -m models.export` wrote, PICTURE an image file"
            )
    try:
        opened = Image.open(picture)
        opened.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for files that it cannot read
        sys.exit(f"error: {picture} cannot be read as a picture ({error}); take another file")
    print(Captioner(folder)(opened))
