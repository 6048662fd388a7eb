"""The README is short, its links and commands and those of docs/ work as written, and so does the code it shows."""

import importlib
import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from dataset_files import run as call_script

from data import download
from models import model
from models.checkpoint import load_model
from models.search import search

ROOT = Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
TRANSLATED = [DOCS / f"README.{language}.md" for language in ("zh-CN", "ko")]
PAGES = [README, *sorted(set(DOCS.glob("*.md")) - set(TRANSLATED))]
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?^ *```bash\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:\w+=\S* )?(?:python|torchrun|pytest|pip)\s[^`]*)`")
SMALL = (*TINY, "encoder.name=efficientnet_lite0", "encoder.weights=IMAGENET1K_V1")  # not inside checkpoints: quick
HERE = ("data.root=archive", "data.format=csv")
SHORT = ("train.epochs=1", "train.warmup_steps=1", "train.self_critical_samples=2", "--overwrite")

GIGABYTES = "python -m data.download"
ABSENT = ("configs/coco_", "configs/ai_challenger", "configs/flickr8k_cn")  # recipes for what such commands fetch
ELSEWHERE = {  # what is not run here, and where it is
    "git clone": ".ci/run, from the folder it is in",
    **dict.fromkeys(("python3 -m venv", "pip install", "apt install", "pytest", "ruff"), ".ci/run"),
    ".ci/run": "by whoever changes something",
    "python -m benchmarks.": "tests/benchmarks, in part: they take minutes to hours",
    **dict.fromkeys(("python -m pytest", "python -m tests.stress"), "by hand: tests/stress takes hours"),
    "uv pip compile": "by hand; tests/test_requirements.py compares what it makes",
    "docker": "by hand, where there is Docker; tests/docs/test_container.py in part",
    "python -m http.server": "by hand: it serves until it is stopped",
    "oldest/bin/python": "by hand: the tests with the oldest packages",
    "python -m models.": "tests/models",
    "python docs/caption_with_onnx.py": "tests/models/test_export.py",
    "streamlit run": "tests/test_app.py",
    "python -m docs.figures": "by hand: it makes docs/images",
    "torchrun": ".ci/run and tests/training/test_distributed.py; on several machines nowhere",
    "python train.py decoder.name=gru": "below",
    "python train.py encoder.weights=resnet50-caffe.pth": "tests/models/test_encoder.py: the file is one's own",
    "python train.py --config configs/clip.yaml": "tests/models/test_timm.py, made small: its weights are a download",
    "python train.py --config configs/dinov2.yaml": "the same",
    "python -m data.write_tars": "tests/data",
    'python train.py "data.shards': "tests/data",
    "python train.py --config own": "tests/test_train.py, for one epoch",
    "python inference_visualize.py --run own": "the same",
    "python calibrate.py": "tests/test_calibrate.py, on more pictures",
    **dict.fromkeys(
        (
            "python inference_visualize.py photo.jpg --checkpoint hf://",
            "python evaluate.py --checkpoint hf://",
            "python train.py train.start=hf://",
        ),
        "tests/models/test_hub.py",
    ),
    **dict.fromkeys(("python -m serve", "curl"), "tests/test_serve.py"),
    "python -c": "nowhere: it asks for a GPU",
}


def commands(page: Path) -> list[str]:
    """Return the commands of a page, those of its bash blocks first, without blocks that .ci/run reads from it."""
    text = page.read_text(encoding="utf-8")
    lines = [line for name, block in BLOCK.findall(text) if not name for line in block.splitlines()]
    in_blocks = [command for line in lines if (command := line.partition(" #")[0].strip())]
    inline = [" ".join(command.split()) for command in INLINE.findall(CODE.sub("", text)) if "…" not in command]
    return in_blocks + [re.sub(r"^\w+=\S* ", "", command) for command in inline]


COMMANDS = list(dict.fromkeys(command for page in PAGES for command in commands(page)))


@pytest.fixture
def workplace(archive: Path, tmp_path: Path) -> Path:
    """A folder as the commands find it: with the recipes, a small dataset, and pictures of one's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for folder in ("holiday", "cats"):
        shutil.copytree(archive / "images", tmp_path / folder)
    shutil.copytree(archive, tmp_path / "coco")
    shutil.copytree(archive, tmp_path / "mine", ignore=shutil.ignore_patterns("*.txt"))
    shutil.copy(archive / "images" / "00.jpg", "photo.jpg")
    return tmp_path


def run(command: str) -> int:
    """Run a command in this process, where it trains on less; returns its exit code."""
    words = shlex.split(command)
    name, *options = words[2:] if words[1] == "-m" else words[1:]
    if name == "train.py" and "--resume" not in options:
        options = [*SMALL, *(() if is_absent(command) else HERE), *options, *SHORT]
    return call_script(importlib.import_module(name.removesuffix(".py")).main, *options)


def is_absent(command: str) -> bool:
    return any(recipe in command for recipe in ABSENT)


def test_every_command_works_in_the_order_of_the_pages(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tried = [command for command in COMMANDS if not command.startswith((GIGABYTES, *ELSEWHERE))]
    assert len(tried) > 20
    for command in tried:
        if "runs/a/" in command:
            for name in "ab":
                shutil.copytree("runs/flickr8k", f"runs/{name}")
        status, printed = run(command), capsys.readouterr()
        assert status == (2 if is_absent(command) else 0), f"{command}: {printed.err}"
        assert not is_absent(command) or re.search("captions|dataset", printed.err), f"{command}: {printed.err}"


def test_what_is_run_elsewhere_is_there() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    marked = [name for page in PAGES for name, _ in BLOCK.findall(page.read_text(encoding="utf-8")) if name]
    assert sorted(marked) == ["sample", "several", "tests"]
    assert all(f"command_in_readme {name}" in ci for name in marked)
    for command in COMMANDS:
        words = command.split()
        if command.startswith(f"{GIGABYTES} "):
            assert words[3] in download.SOURCES, command
        elif command.startswith("python -m "):
            assert importlib.util.find_spec(words[2]), command
        elif command.startswith("pip install -r"):
            assert (ROOT / words[3]).is_file(), command


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_translation_has_the_same_commands(page: Path) -> None:
    assert BLOCK.findall(page.read_text(encoding="utf-8")) == BLOCK.findall(README.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [*PAGES, *TRANSLATED], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        if path.startswith("https:"):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_the_readme_is_short_and_names_every_file() -> None:
    assert README.stat().st_size <= 16_000
    tree = README.read_text(encoding="utf-8").partition("## What is where")[2]
    files = {path.name for folder in ("", "data", "models", "training") for path in (ROOT / folder).glob("[a-z]*.py")}
    assert files <= set(re.findall(r"[\w.]+\.py", tree))


def test_the_python_api_captions_a_photograph(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    shutil.copytree(ROOT / "pretrained", workplace / "pretrained")
    exec(code, {})
    assert re.fullmatch(r"\['\w[\w ']+'\]\n", capsys.readouterr().out)


def test_the_decoder_shown_is_one_file_and_one_line(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "extending.md").read_text(encoding="utf-8")
    [code] = re.findall(r"<!-- decoder -->\n```python\n(.*?)```", page, re.DOTALL)
    shown: dict[str, Any] = {"__name__": "models.gru"}
    exec(compile(code, "models/gru.py", "exec"), shown)
    [command] = [command for command in COMMANDS if "decoder.name=gru" in command]
    monkeypatch.setitem(model.DECODERS, "gru", shown["DecoderGRU"])
    assert run(command) == 0
    trained = load_model("runs/gru/checkpoints.pth")
    assert type(trained.decoder).__name__ == "DecoderGRU"

    features, tokens = torch.randn(2, trained.encoder.feature_shape[-1]), torch.tensor([[1, 5, 6, 7]])
    hidden, _ = trained.decoder(features, tokens, torch.tensor([1]))  # (1, 4, H)
    memory = trained.decoder.prepare(features[1:])
    state = trained.decoder.start(memory)
    for place, token in enumerate(tokens[0]):
        logits, state, _ = trained.decoder.step(token[None], state, memory)
        torch.testing.assert_close(logits, trained.decoder.output(hidden[:, place]))
    assert len(search(trained.decoder, features, trained.config.search, 2)[0]) == 2
