"""Small, boring things that need PyTorch: checkpoints on disk, the device, seeds."""

import contextlib
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli import UserError
from files import write_atomically

CHECKPOINT_FORMAT = "image-captioning/2"
# What torch and zipfile raise for damaged files.
DAMAGED = (
    *(RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError, EOFError, MemoryError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, OverflowError),
)

# oneDNN keeps the kernels of the last 1,024 shapes, a gigabyte: batches differ in shape, but hardly in more than these.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "400")


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write plain values and tensors as one file, atomically; raises UserError when the disk is full."""
    buffer = io.BytesIO()
    torch.save(checkpoint | {"format": CHECKPOINT_FORMAT}, buffer)
    write_atomically(Path(path), buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file written by `save_checkpoint`, tensors on the CPU; nothing in it is executed (`weights_only`).

    Raises UserError for a file that is missing, cut short, of an older version, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}; check the path, or train one with: python train.py")
    checkpoint = None
    with contextlib.suppress(*DAMAGED):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True) if is_whole(path) else None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this project ({CHECKPOINT_FORMAT}), or was cut short; take another one, or "
            "train again"
        )
    return checkpoint


def is_whole(path: Path) -> bool:
    """Whether a file is a zip that holds what it says, uncompressed as torch writes it: no bomb that swells."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as content:
        members = content.infolist()
    stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
    return stored and sum(member.file_size for member in members) <= path.stat().st_size


def pick_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # set by torchrun
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """Resolve `auto`: bf16 on hardware that multiplies it natively, float32 elsewhere."""
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        native = any(features.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Draw all noise of a step from (seed, step, rank) alone, so that a run can be taken up at any step."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0]))
