"""Where atheris gives bytes to a reader, for tests/fuzz.py: `python -m atheris_target NAME CORPUS`."""

import sys

import atheris

with atheris.instrument_imports(include=["cli", "config", "data", "models", "render", "utils"]):
    import fuzz

name = sys.argv.pop(1)
before = fuzz.memory()


def target(content: bytes) -> None:
    fuzz.check(name, content)
    assert fuzz.memory() - before < fuzz.GROWTH, f"memory grew by {fuzz.memory() - before:.0f} MB"


atheris.Setup(sys.argv, target)
atheris.Fuzz()
