"""The layout of the project: floors, of which none imports from one above, and the scripts on top."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cli

ROOT = Path(cli.__file__).parents[1]
SCRIPTS = {
    *("train", "evaluate", "calibrate", "inference_visualize", "visualize_loss", "app", "serve"),
    *("models.export", "models.publish", "data.write_tars", "data.download"),
}
FLOORS = (  # of two modules the lower one never imports the other, but those of one floor may import each other
    {"cli", "cli.files", "cli.safe_load"},
    {"config"},
    {"utils"},
    {"distributed"},
    {"data"},
    {"models.hub"},
    {"cli.options"},
    {"models"},
    {"metrics", "render", "captioning"},
    {"training"},
    {*SCRIPTS, "benchmarks", "docs"},
)
PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for pattern in ("*.py", *(f"{package}/**/*.py" for package in sorted({*PACKAGES, "docs"})))
    for path in sorted(ROOT.glob(pattern))
}


def floor_of(module: str) -> int:
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]  # data.write_tars before data
    found = (floor for name in names for floor, members in enumerate(FLOORS) if name in members)
    return next(found, len(FLOORS) - 1)  # a script of one's own


def imports_of(path: Path) -> Iterator[str]:
    """Yield the name of every module that a file imports, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            inner = [f"{node.module}.{each.name}" for each in node.names]
            yield from (name if name in MODULES else node.module for name in inner)


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """What each module imports of this project."""
    own = {name.split(".")[0] for name in MODULES}
    return {name: {each for each in imports_of(path) if each.split(".")[0] in own} for name, path in MODULES.items()}


def test_no_module_imports_one_of_a_floor_above(imported: dict[str, set[str]]) -> None:
    assert MODULES.keys() >= SCRIPTS
    upwards = [(module, name) for module in imported for name in imported[module] if floor_of(name) > floor_of(module)]
    assert not upwards


def test_nothing_is_imported_in_a_circle(imported: dict[str, set[str]]) -> None:
    left = {module: names - {module} for module, names in imported.items()}
    while leaves := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in leaves}
    assert not left


def test_the_command_line_needs_neither_torch_nor_settings(imported: dict[str, set[str]]) -> None:
    assert not imported["cli"]
    assert not {"torch", "numpy"} & set(imports_of(ROOT / "cli" / "__init__.py"))


def test_a_reader_finds_the_training_loop_on_a_few_screens() -> None:
    assert len((ROOT / "train.py").read_text(encoding="utf-8").splitlines()) <= 200
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("counts what git keeps")
    assert len({line.split("/")[0] for line in tracked.stdout.splitlines()}) <= 32


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name != "cli" and name.split(".")[0] not in ("benchmarks", "docs")]
)
def test_what_is_printed_goes_through_the_one_function_that_escapes_it(name: str) -> None:
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"), name
