"""The process in which atheris gives bytes to one of the tasters: `python -m benchmarks.reliability.atheris_target`."""

import sys

import atheris

with atheris.instrument_imports(include=["config", "data", "models", "render", "utils"]):
    import config  # noqa: F401
    from benchmarks.reliability import fuzz

GROWN_AT_MOST = fuzz.GROWTH


def main() -> None:
    name = sys.argv.pop(1)
    before = fuzz.memory()

    def target(content: bytes) -> None:
        fuzz.taste(name, content)
        if fuzz.memory() - before > GROWN_AT_MOST:
            raise MemoryError(f"memory grew by {fuzz.memory() - before:.0f} MB")

    atheris.Setup(sys.argv, target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
