"""The gallery page and the demo in Chromium: captions and file names that would act."""

import io
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from demo import find_chromium, open_demo
from PIL import Image

from config import load_config
from data.vocab import SPECIALS, Vocabulary
from models.checkpoint import model_state
from models.model import CaptionModel
from render import gallery
from render.fonts import plain_text
from stress.conftest import Tally
from stress.runs import SMALLEST
from utils import save_checkpoint

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
HOSTILE: dict[str, list[str]] = json.loads(Path(__file__).with_name("corpus").joinpath("hostile.json").read_text())


def browse(page: Path) -> str:
    """Return the page as Chromium has it after a second, in which whatever can act would have."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=1000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=300, encoding="utf-8").stdout


def test_hostile_captions(tally: Tally, tmp_path: Path) -> None:
    """captions that would act in the page, in Chromium"""
    page = tmp_path / "page.html"
    for text in HOSTILE["html"][: 3 if tally.short else None]:
        image = os.fsdecode(text.encode(errors="replace"))
        row = gallery.row(image, [text, text], [text], size=(9, 9), name=text)
        page.write_text(gallery.page("title " + text, text, [row]), encoding="utf-8")
        dom = browse(page)
        found = re.findall(r'<p class="(?:caption|other)"[^>]*>(.*?)</p>', dom)
        shown = [re.sub("<[^>]*>", "", each) for each in found]
        escaped = plain_text(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        fine = shown == [escaped, escaped] and "<title>title " in dom and dom.count("<script") == 1
        active = re.search("<iframe|<base|<svg|<meta http|[\u202a-\u202e\u2066-\u2069]", dom)
        tally(fine and not active, repr(text), dom[-1500:])


def test_hostile_demo(tally: Tally, tmp_path: Path) -> None:
    """words and file names that would act in the demo, in Chromium"""
    texts = [*HOSTILE["html"], *HOSTILE["markdown"]]
    settings = (f"search.min_length={len(texts)}", "search.max_length=30", "search.no_repeat_ngram=1")  # each word once
    model = CaptionModel.build(load_config(overrides=[*SMALLEST, *settings]), Vocabulary([*SPECIALS, *texts]))
    save_checkpoint(tmp_path / "runs/hostile/checkpoints.pth", model_state(model))
    scene = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(scene, "JPEG")
    names = [re.sub("[/\0]", "", text).encode(errors="replace").decode() + ".jpg" for text in texts]
    files: list[Any] = [{"name": name, "mimeType": "image/jpeg", "buffer": scene.getvalue()} for name in names]
    with open_demo(tmp_path) as (page, asked):
        page.set_input_files("input[type=file]", files)
        page.get_by_text("Download captions").wait_for()
        caption = page.locator("p.caption").first.inner_text().replace(" ", "")  # words are joined with some blanks
        shown = [paragraph.strip() for paragraph in page.locator("p.quiet").all_inner_texts()]
        for text, name in zip(texts, names, strict=True):
            tally(plain_text(text).replace(" ", "") in caption, f"the word {text!r}", caption)
            sent = name.replace('"', "%22")  # as browsers write it
            tally(plain_text(sent) in shown, f"the name {name!r}", str(shown))
        tally(page.title() == "Image captioning", "something acted", page.title())
        others = page.locator("p.caption *, p.quiet *, .stMain :is(iframe, base, script, [href*=invalid])")
        tally(others.count() == 0, "a text became an element", str(others.all_inner_texts()))
        tally(asked() <= {"localhost", "None"}, "something was asked for", str(asked()))
