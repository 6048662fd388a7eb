"""The container: what its Dockerfile says, tried without Docker."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SPACE = Path(__file__).parents[2] / "docs" / "space"
ROOT = SPACE.parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="the container runs Linux")


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """A folder with the files that Dockerfile.dockerignore lets into the image."""
    lines = (SPACE / "Dockerfile.dockerignore").read_text().splitlines()
    for pattern in [line[1:] for line in lines if line.startswith("!")]:
        for path in ROOT.glob(pattern):
            place = tmp_path / path.relative_to(ROOT)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__", "export"))
            else:
                shutil.copy(path, place)
    return tmp_path


def run(inside: Path, *words: str) -> subprocess.CompletedProcess:
    folder = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": ""}
    command = ["sh", "docs/container/start.sh", *words]
    return subprocess.run(command, cwd=inside, env=environment, capture_output=True, text=True, timeout=120)


@posix
def test_the_image_holds_what_the_demo_and_the_endpoint_need(inside: Path) -> None:
    pytest.importorskip("fastapi_offline", reason="serving needs requirements-extras.txt")
    helped = run(inside, "serve", "--help")
    assert helped.returncode == 0 and "Caption pictures over HTTP" in helped.stdout
    for module in ("serve", "app"):
        tried = [
            sys.executable,
            "-c",
            f"import ast, importlib; tree = ast.parse(open('{module}.py').read())\n{IMPORT_ALL}",
        ]
        found = subprocess.run(tried, cwd=inside, capture_output=True, text=True, timeout=120)
        assert found.returncode == 0, found.stderr
    assert (inside / "pretrained/captioner.pth").is_file()


IMPORT_ALL = """
for node in tree.body:
    if isinstance(node, ast.Import):
        [importlib.import_module(each.name) for each in node.names]
    elif isinstance(node, ast.ImportFrom):
        importlib.import_module(node.module)
"""


@posix
def test_what_is_neither_demo_nor_endpoint_is_refused(inside: Path) -> None:
    found = run(inside, "train")
    assert (found.returncode, found.stderr) == (2, "error: there is no train; run demo or serve\n")
    assert run(inside, "health").returncode == 1  # nothing answers there


def test_the_image_is_pinned_and_uploads_are_checked() -> None:
    dockerfile = (SPACE / "Dockerfile").read_text()
    assert re.findall("^FROM (.*)", dockerfile, re.M) and re.search(r"^FROM \S+@sha256:[0-9a-f]{64}$", dockerfile, re.M)
    command = (SPACE / "start.sh").read_text()
    assert "Xsrf" not in dockerfile + command
