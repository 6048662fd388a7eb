"""Files from strangers: each is used as it is meant, or refused in one sentence, and none of them can act."""

from cli import UserError

import builtins
import io
import json
import os
import pickle
import re
import resource
import subprocess
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import inference_visualize
import render
from benchmarks.reliability.demo import find_chromium, open_demo
from benchmarks.reliability.faults import note, run
from benchmarks.reliability.kills import Result, in_folder
from benchmarks.reliability.tiny import SMALLEST
from config import load_config
from data import download
from data.download import Source
from data.vocab import SPECIALS, Vocabulary
from models.model import CaptionModel
from utils import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from playwright.sync_api import FilePayload

MOST_MEMORY = 300  # MB that a refusal may take
STEP = 4096  # bytes
FORMAT = {"format": "image-captioning/1"}


class Call:
    """Pickles as a call of `function`, which is made by whoever unpickles it carelessly."""

    def __init__(self, function: Callable, *words: object) -> None:
        self.function, self.words = function, words

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.words


def told(function: Callable[[], object]) -> str | None:
    """Return the one sentence in which a function refuses, or None where it does not refuse."""
    try:
        function()
    except UserError as error:
        return str(error) if "\n" not in str(error) else None
    return None


def cut_checkpoints() -> Result:
    """Cut a checkpoint at each multiple of 4 KB, from its end to its beginning."""

    def check() -> Result:
        result = Result()
        path = Path("runs/whole/last.pth")
        for size in range(path.stat().st_size // STEP * STEP, -1, -STEP):
            os.truncate(path, size)
            note(result, told(lambda: load_checkpoint(path)) is not None, f"cut at {size}")
        return result

    return in_folder(check)


def evil_checkpoints() -> Result:
    """Read checkpoints with code in them, of absurd sizes, that swell, or whose parts do not belong together."""

    def check() -> Result:
        result = Result()
        good = load_checkpoint("runs/whole/checkpoints.pth")
        for name, change in absurd(good).items():
            save_checkpoint(Path("evil.pth"), good | change)
            before = memory()
            said = told(lambda: CaptionModel.from_checkpoint("evil.pth"))
            note(result, said is not None and memory() - before < MOST_MEMORY, name, str(said))
        target = Path("acted").resolve()
        calls = [
            Call(os.system, f"touch {target}"),
            Call(builtins.eval, f"open({str(target)!r}, 'w')"),
            Call(builtins.exec, f"open({str(target)!r}, 'w')"),
            Call(subprocess.call, ["touch", str(target)]),
            Call(Path.touch, target),
            Call(torch.load, str(target)),
            Call(builtins.getattr, "a", "join"),
        ]
        for number, call in enumerate(calls):
            for where in (call, FORMAT | {"config": call}, [call], good | {"decoder": {"a": call}}):
                torch.save(where, "evil.pth")
                note(result, told(lambda: load_checkpoint("evil.pth")) is not None, f"call {number} in a zip")
                Path("evil.pth").write_bytes(pickle.dumps(where))
                note(result, told(lambda: load_checkpoint("evil.pth")) is not None, f"call {number} in a pickle")
                note(result, not target.exists(), f"call {number} acted")
        with (
            zipfile.ZipFile("runs/whole/last.pth") as old,
            zipfile.ZipFile("evil.pth", "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                new.writestr(name, bytes(200_000_000) if name.endswith("data/0") else old.read(name))
        before = memory()
        note(
            result, told(lambda: load_checkpoint("evil.pth")) is not None and memory() - before < MOST_MEMORY, "a bomb"
        )
        return result

    return in_folder(check)


def absurd(good: dict[str, Any]) -> dict[str, dict[str, Any]]:
    words, config = good["vocabulary"]["words"], good["config"]

    def settings(section: str, **values: object) -> dict[str, Any]:
        return {"config": config | {section: config[section] | values}}

    return {
        "a vocabulary with more words": {"vocabulary": good["vocabulary"] | {"words": [*words, "zebra"]}},
        "a vocabulary with fewer words": {"vocabulary": good["vocabulary"] | {"words": words[:-1]}},
        "a vocabulary without special words": {"vocabulary": good["vocabulary"] | {"words": words[4:]}},
        "a vocabulary of numbers": {"vocabulary": good["vocabulary"] | {"words": list(range(len(words)))}},
        "a huge layer": settings("decoder", hidden_size=10**12),
        "the largest layers": settings("decoder", hidden_size=8192, embed_size=8192, num_layers=64),
        "the largest backbone": settings("encoder", name="regnet_y_128gf"),
        "one number for 10^12": {"feature_mean": torch.ones(1).expand(10**12)},
        "one number for all": {"decoder": {k: torch.ones(1).expand(t.shape) for k, t in good["decoder"].items()}},
        "double precision": {"decoder": {name: tensor.double() for name, tensor in good["decoder"].items()}},
        "NaN": {"decoder": {name: tensor * float("nan") for name, tensor in good["decoder"].items()}},
        "no decoder": {"decoder": {}},
        "another kind of decoder": settings("decoder", name="transformer"),
        "an unknown setting": settings("decoder", heads_up=7),
        "a transform of nothing": {"transform": {}},
    }


def memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- pictures --------------------------------------------------------------------------------------------------------


def write_pictures(folder: Path) -> tuple[set[str], set[str]]:
    """Write all kinds of pictures; returns the names of those to be captioned and of those to be skipped."""
    scene = Image.open("archive/images/00.jpg").convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    good: dict[str, Callable[[Path], object]] = {
        "one.png": lambda path: scene.resize((1, 1)).save(path),
        "wide.png": lambda path: scene.resize((30_000, 10)).save(path),
        "high.png": lambda path: scene.resize((10, 30_000)).save(path),
        "moving.gif": lambda path: scene.save(path, save_all=True, append_images=[scene.rotate(90)]),
        "moving.webp": lambda path: scene.save(path, save_all=True, append_images=[scene.rotate(90)]),
        "print.jpg": lambda path: scene.convert("CMYK").save(path),
        "sixteen.png": lambda path: Image.new("I;16", (40, 40), 40_000).save(path),
        "turned.jpg": lambda path: scene.save(path, exif=turned),
        "clear.png": lambda path: scene.convert("RGBA").save(path),
        "png.jpg": lambda path: scene.save(path, "PNG"),
        "\u202egpj.exe.jpg": lambda path: scene.save(path),
        "<img src=x onerror=alert(1)>.jpg": lambda path: scene.save(path),
        os.fsdecode(b"caf\xe9.jpg"): lambda path: scene.save(path),
    }
    bad: dict[str, Callable[[Path], object]] = {
        "bomb.png": lambda path: Image.new("1", (20_000, 20_000)).save(path),
        "small-bomb.png": lambda path: Image.new("1", (10_000, 9_000)).save(path),
        "empty.jpg": lambda path: path.touch(),
        "cut.jpg": lambda path: path.write_bytes(Path("archive/images/00.jpg").read_bytes()[:700]),
        "text.jpg": lambda path: path.write_text("no picture"),
        "postscript.jpg": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"),
    }
    odd: dict[str, Callable[[Path], object]] = {  # not files: nobody asks for them
        "folder.jpg": lambda path: path.mkdir(),
        "loop.jpg": lambda path: path.symlink_to(path.name),
        "up": lambda path: path.symlink_to(".."),
        "pipe.jpg": lambda path: os.mkfifo(path),
    }
    folder.mkdir()
    for name, write in (good | bad | odd).items():
        write(folder / name)
    return set(good), set(bad)


def odd_pictures() -> Result:
    """Caption a folder of pictures of all kinds; those that cannot be read are skipped, and named."""

    def check() -> Result:
        result = Result()
        good, bad = write_pictures(Path("odd"))
        model = ["--checkpoint", "runs/whole/checkpoints.pth"]
        code, said = run(inference_visualize.main, "--images", "odd", "--out", "captioned", *model)
        note(result, code == 0 and "Traceback" not in said, "the folder", said)
        rows = json.loads(Path("captioned/predictions.json").read_text(encoding="utf-8"))
        captioned = {Path(row["image_id"]).name for row in rows}
        for name in good:
            note(result, name in captioned, f"{name!a} was not captioned")
        for name in bad:
            note(result, name not in captioned and f"skipped: cannot read the picture odd/{name}" in said, name, said)
        note(result, captioned == good, "others were captioned", str(captioned - good))
        return result

    return in_folder(check)


# ---- archives --------------------------------------------------------------------------------------------------------


def evil_archives() -> Result:
    """Unpack archives that would write elsewhere, or more than there is room for."""
    result = Result()
    names = [
        "../evil",
        "/evil",
        "a/../../evil",
        "..\\evil",
        "C:\\evil",
        "\\\\host\\evil",
        "a/b/../../../evil",
        "./../evil",
    ]
    link = zipfile.ZipInfo("link")
    link.external_attr = 0o120777 << 16
    entries: dict[str, tuple[zipfile.ZipInfo, bytes]] = {name: (zipfile.ZipInfo(name), b"a wolf") for name in names}
    entries |= {"a link": (link, b"/etc"), "a bomb": (zipfile.ZipInfo("zeros"), bytes(300_000_000))}
    for what, (entry, content) in entries.items():
        with tempfile.TemporaryDirectory() as folder:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED if len(content) > 100 else None)
            Path(folder, "a.zip").write_bytes(buffer.getvalue())
            source, inside = Source("https://a.invalid/a.zip", 10, None), Path(folder, "in")
            said = told(lambda inside=inside, source=source, folder=folder: download.fetch([source], inside, folder))  # type: ignore[misc]
            written = {path.name for path in Path(folder).rglob("*")}
            note(result, said is not None and written == {"a.zip", "in", "a.zip.part"}, what, f"{said} {written}")
    return result


# ---- the page --------------------------------------------------------------------------------------------------------

ACT = "document.title = 'acted'"
HOSTILE = [
    f"</script><script>{ACT}</script>",
    f'<img src=x onerror="{ACT}">',
    f"<svg/onload={ACT}>",
    f"<!--<script>{ACT}",
    f"]]><script>{ACT}</script>",
    f"<iframe srcdoc='<script>parent.{ACT}</script>'>",
    f"<a href='javascript:{ACT}' autofocus onfocus=\"{ACT}\">",
    f"`${{{ACT}}}`",
    f"'; {ACT}; '",
    f'"; {ACT}; "',
    f'\\"; {ACT}; //',
    f"\u2028{ACT}\u2029",
    f"&lt;script&gt;{ACT}&lt;/script&gt;",
    f"{{{{constructor.constructor('{ACT}')()}}}}",
    "\u202egpj.exe \u2066isolated\u2069 \u200f",
    "\x00\x01\x1b[2J\x7f\x9b bell \x07",
    "<style>*{display:none}</style>",
    "<base href=//a.invalid><meta http-equiv=refresh content=0;url=//a.invalid>",
    "a\ud800b",
    "$& $1 $` __proto__",
]


def hostile_captions() -> Result:
    """Open a page of captions, names and titles that would act, in Chromium, and count what they did."""
    result = Result()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        page = Path(folder, "page.html")
        for text in HOSTILE:
            with render.Gallery(page, "title " + text, text) as gallery:
                gallery.add(os.fsdecode(text.encode(errors="replace")), [text, text], [text], size=(9, 9), name=text)
            dom = browse(page, "--virtual-time-budget=1000")  # in which whatever can act would have
            plain = render.plain(text)
            shown = [
                re.sub("<[^>]*>", "", each) for each in re.findall(r'<p class="(?:caption|other)"[^>]*>(.*?)</p>', dom)
            ]
            escaped = plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            fine = shown == [escaped, escaped] and "<title>acted" not in dom and "<title>title " in dom
            fine = (
                fine
                and dom.count("<script") == 1
                and not re.search("<iframe|<base|<svg|<meta http|[\u202a-\u202e\u2066-\u2069]", dom)
            )
            note(result, fine, repr(text), dom[-1500:])
    return result


MARKDOWN = [
    "![x](https://a.invalid/x.png)",
    "[x](javascript:alert(1))",
    "https://a.invalid/",
    ":material/bolt: :red[x] $x$",
]


def hostile_demo() -> Result:
    """Give the demo pictures whose names would act, and a model whose words would, and see in Chromium what they do."""
    result = Result()
    texts = [*HOSTILE, *MARKDOWN]
    settings = (f"search.min_length={len(texts)}", "search.max_length=30", "search.no_repeat_ngram=1")  # each word once
    model = CaptionModel.build(load_config(overrides=[*SMALLEST, *settings]), Vocabulary([*SPECIALS, *texts]))
    scene = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(scene, "JPEG")
    names = [re.sub("[/\0]", "", text).encode(errors="replace").decode() + ".jpg" for text in texts]
    files: list[FilePayload] = [{"name": name, "mimeType": "image/jpeg", "buffer": scene.getvalue()} for name in names]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        save_checkpoint(Path(folder, "runs/hostile/checkpoints.pth"), model.state())
        with open_demo(Path(folder)) as (page, asked):
            page.set_input_files("input[type=file]", files)
            page.get_by_text("Download captions").wait_for()
            caption = page.locator("p.caption").first.inner_text().replace(" ", "")  # words are joined with some blanks
            shown = [paragraph.strip() for paragraph in page.locator("p.quiet").all_inner_texts()]
            for text, name in zip(texts, names, strict=True):
                note(result, render.plain(text).replace(" ", "") in caption, f"the word {text!r}", caption)
                sent = name.replace('"', "%22")  # as browsers write it
                note(result, render.plain(sent) in shown, f"the name {name!r}", str(shown))
            note(result, page.title() == "Image captioning", "something acted", page.title())
            others = page.locator("p.caption *, p.quiet *, .stMain :is(iframe, base, script, [href*=invalid])")
            note(result, others.count() == 0, "a text became an element", str(others.all_inner_texts()))
            note(result, asked() <= {"localhost", "None"}, "something was asked for", str(asked()))
    return result


def browse(page: Path, *options: str) -> str:
    """Return the page as Chromium has it once it is loaded."""
    program = find_chromium()
    if program is None:
        raise UserError("this check needs Chromium; install it: apt install chromium")
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", *quiet, *options]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, check=True, timeout=300, encoding="utf-8").stdout
