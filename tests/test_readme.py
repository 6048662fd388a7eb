"""What README and docs/ tell people to type works, as it is written there; so does the decoder they show."""

from cli import run_script

import importlib
import importlib.util
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY

from data import download
from models import model
from models.search import search

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TRANSLATED = [ROOT / "docs" / f"README.{language}.md" for language in ("zh-CN", "ko")]
PAGES = [README, *sorted(set((ROOT / "docs").glob("*.md")) - set(TRANSLATED))]
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\w+=\S* )?(?:python|torchrun|pytest|pip)\s[^`]*)`")
SMALL = (*TINY, "encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V1")  # not inside checkpoints: quick
HERE = ("data.root=archive", "data.format=csv")
SHORT = ("train.epochs=1", "train.warmup_steps=1", "--overwrite")
SELF_CRITICAL = ("train.self_critical_epochs=1", "train.self_critical_samples=2")

GIGABYTES = "python -m data.download"
ABSENT = ("configs/coco_", "configs/ai_challenger", "configs/flickr8k_cn")  # recipes for what such commands fetch
ELSEWHERE = {  # what is not run here, and where it is
    "<!-- sample -->, <!-- tests -->, <!-- several -->": ".ci/run",
    "python -m benchmarks.": "tests/benchmarks, in part: they take minutes to hours",
    "pip install": ".ci/run",
    "apt install": ".ci/run, in part",
    "FUZZ_SECONDS=": "tests/benchmarks",
    "oldest/bin/python": "nowhere: the tests with the oldest packages, by hand",
    "pytest": ".ci/run",
    "python3 -m venv": ".ci/run",
    "ruff": ".ci/run",
    ".ci/run": "by whoever changes something",
    "python -m models.": "tests/models",
    "python docs/caption_with_onnx.py": "tests/models/test_export.py",
    "streamlit run": "tests/test_app.py",
    "python -m docs.figures": "made by it: docs/images",
    "torchrun": "tests/training/test_distributed.py, and on several machines nowhere",
    "python train.py decoder.name=gru": "below",
    "python train.py encoder.weights=resnet50-caffe.pth": "tests/models/test_encoder.py: the file is one's own",
    "python -m data.tars": "tests/data/test_tars.py",
    'python train.py "data.shards': "tests/data/test_stream.py",
    "python train.py --config configs/pretrained.yaml data.root=mine": "by hand: pretrained/ is on another encoder",
    "python -c": "nowhere: it asks for a GPU",
}


def in_blocks(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, one by one, but for those that .ci/run reads from there."""
    lines = [line for name, block in BLOCK.findall(page.read_text()) if not name for line in block.splitlines()]
    return [command for line in lines if (command := line.partition(" #")[0].strip())]


def inline(page: Path) -> list[str]:
    """Return the commands inside a page's text, without those that are shortened."""
    found = [" ".join(command.split()) for command in INLINE.findall(CODE.sub("", page.read_text()))]
    return [re.sub(r"^\w+=\S* ", "", command) for command in found if "…" not in command]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in [*in_blocks(page), *inline(page)]))


@pytest.fixture
def workplace(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the commands find it: with the recipes, a small dataset, and pictures of one's own."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # no Java, which would take its time
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for folder in ("holiday", "cats"):
        shutil.copytree(archive / "images", tmp_path / folder)
    shutil.copytree(archive, tmp_path / "mine", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copy(archive / "images" / "00.jpg", "photo.jpg")
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command in this process, where it trains on less; returns its exit code."""
    words = shlex.split(command)
    name, *options = words[2:] if words[1] == "-m" else words[1:]
    if name == "train.py" and "--resume" not in options:
        critical = SELF_CRITICAL if "scst.yaml" in command else ()
        here = () if is_absent(command) else HERE
        options = [*SMALL, *here, *options, *SHORT, *critical]
    monkeypatch.setattr(sys, "argv", [name, *options])
    return run_script(importlib.import_module(name.removesuffix(".py")).main)


def is_absent(command: str) -> bool:
    return any(recipe in command for recipe in ABSENT)


def test_every_command_works_in_the_order_of_the_pages(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = [command for command in COMMANDS if not command.startswith((GIGABYTES, *ELSEWHERE))]
    assert len(tried) > 20
    for command in tried:
        if "runs/a/" in command:
            for name in "ab":
                shutil.copytree("runs/flickr8k", f"runs/{name}")
        status, printed = run(command, monkeypatch), capsys.readouterr()
        assert status == (2 if is_absent(command) else 0), f"{command}: {printed.err}"
        assert not is_absent(command) or re.search("captions|dataset", printed.err), f"{command}: {printed.err}"


def test_what_is_to_be_downloaded_is_known() -> None:
    for command in COMMANDS:
        if command.startswith(f"{GIGABYTES} "):
            assert command.split()[3] in download.KNOWN, command


def test_what_is_run_elsewhere_is_there() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    marked = [name for page in PAGES for name, _ in BLOCK.findall(page.read_text()) if name]
    assert marked == ["sample", "several", "tests"]
    assert all(f"command_in_readme {name}" in ci for name in marked)
    for command in COMMANDS:
        if command.startswith("python -m benchmarks."):
            assert importlib.util.find_spec(command.split()[2]), command
        if command.startswith("pip install -r"):
            assert (ROOT / command.split()[3]).is_file(), command


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_same_commands(page: Path) -> None:
    english, own = README.read_text(), BLOCK.findall(page.read_text())
    assert [block for block in BLOCK.findall(english) if block in own] == own
    assert set(BLOCK.findall(english.partition("## How captioning works")[0])) <= set(own)


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATED], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_the_decoder_shown_is_one_file_and_one_line(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [code] = re.findall(r"<!-- decoder -->\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    shown: dict[str, Any] = {"__name__": "models.gru"}
    exec(compile(code, "models/gru.py", "exec"), shown)
    [command] = [command for command in COMMANDS if "decoder.name=gru" in command]
    monkeypatch.setitem(model.DECODERS, "gru", shown["DecoderGRU"])
    assert run(command, monkeypatch) == 0
    trained = model.CaptionModel.from_checkpoint("runs/gru/checkpoints.pth")
    assert type(trained.decoder).__name__ == "DecoderGRU"

    seen, tokens = torch.randn(2, trained.encoder.feature_shape[-1]), torch.tensor([[1, 5, 6, 7]])
    whole, _ = trained.decoder(seen, tokens, torch.tensor([1]))  # (1, 4, V)
    memory = trained.decoder.prepare(seen[1:])
    state = trained.decoder.start(memory)
    for place, token in enumerate(tokens[0]):
        logits, state, _ = trained.decoder.step(token[None], state, memory)
        torch.testing.assert_close(logits, whole[:, place])
    assert len(search(trained.decoder, seen, trained.config.search, 2)[0]) == 2
