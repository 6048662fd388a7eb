"""Datasets of a few files for these tests, the table they are read as, and scripts run on them."""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from cli import run_script
from config import load_config
from data import annotations


def put(root: Path, *names: str, text: str | bytes = b"") -> None:
    """Write files of these names, with their folders, and all with the same content."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode() if isinstance(text, str) else text)


def load(root: Path, *overrides: str, saved: dict[str, list[str]] | None = None) -> pd.DataFrame:
    words = [f"data.root={root}", "data.language=zh-characters", *overrides]  # which takes captions in any language
    return annotations.load(load_config(overrides=words).data, saved)


def rows(table: pd.DataFrame) -> list[tuple[str, str]]:
    return list(zip(table["image"], table["caption"], strict=True))


def run(main: Callable[[], int | None], *words: object) -> int:
    """Run a script's `main` with these words on the command line; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, words)])
        return run_script(main)
