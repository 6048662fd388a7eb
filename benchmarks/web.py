"""Measure the page that `python -m models.export --web` writes, in a headless Chromium.

`python -m benchmarks.web PAGE --pictures LIST` takes some minutes and adds rows to benchmarks/results/speed.json: how
long the page takes to load and to caption, its memory over 200 pictures, and how many of the first 100 pictures get
PyTorch's captions; the others are listed. Needs playwright and Chromium.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import functools
import http.server
import io
import json
import os
import re
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.recipes import environment
from captioning import Captioner
from utils import PRETRAINED, write_atomically

if TYPE_CHECKING:
    from playwright.sync_api import Page

OUT = Path(__file__).parent / "results" / "speed.json"
COMPARED, CAPTIONED = 100, 200  # pictures
TURNS = 3
PHOTOGRAPH = (4000, 3000)  # pixels of a phone's
PATIENCE = 120  # seconds
# Chromium itself would ask its maker for news
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *message: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder as `python -m http.server` does; yields its address."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def open_chromium(**options: Any) -> Iterator[tuple["Page", set[str]]]:
    """Yield an empty page in Chromium, and the hosts that have been asked for something.

    `options` are those of a playwright context, such as color_scheme="dark".
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=QUIET)
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        hosts: set[str] = set()
        page.context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or "localhost"))  # or blob:
        yield page, hosts
        browser.close()


def wait(page: "Page", condition: str) -> None:
    """Wait until an expression is true in the page, which has a CSP that playwright's own way of waiting breaks."""
    from playwright.sync_api import Error

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if page.evaluate(f"(async () => document.readyState === 'complete' && Boolean({condition}))()"):
                return
        except Error as error:  # the page is just being loaded anew
            if not re.search("navigation|destroyed|not defined|initialization", str(error)):
                raise
        time.sleep(0.01)
    raise TimeoutError(f"{condition}; the page says: {page.inner_text('output')}")


def wait_until_ready(page: "Page") -> str:
    """Wait for the model; returns what it runs on, such as "2 threads"."""
    wait(page, "document.body.dataset.device || document.querySelector('#status.alarm')")
    return page.evaluate("document.body.dataset.device ?? document.querySelector('output').textContent")


def caption(page: "Page", files: Sequence[Any]) -> list[dict[str, Any]]:
    """Give the page pictures, as playwright's `set_input_files` takes them; returns what it shows of each."""
    before = page.evaluate("pictures.length")
    page.set_input_files("#choose", list(files))
    wait(page, f"pictures.length === {before + len(files)}")
    return finished(page)[: len(files)]


def finished(page: "Page") -> list[dict[str, Any]]:
    """Return the name, captions and error of each picture, once all are done."""
    wait(page, "pictures.every(({captions, error}) => captions || error) && !current")
    return page.evaluate(
        "pictures.map(({name, error, captions}) => ({name, error, captions: captions?.map(({levels, ...each}) =>"
        " ({...each, levels: levels.map(level => [...level])}))}))"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, metavar="PAGE", help="the folder that models.export --web wrote")
    parser.add_argument("--checkpoint", type=Path, default=PRETRAINED, metavar="FILE", help="that it was made from")
    parser.add_argument(
        "--pictures", type=Path, required=True, metavar="FILE", help="a list of picture files, one a line"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/speed.json")
    args = parser.parse_args()
    if not find_chromium():
        raise UserError("this measures a page in Chromium, and there is none; install it: apt install chromium")
    pictures = [Path(line) for line in args.pictures.read_text().splitlines()]
    found = measure(args.page, pictures) | compare(args.page, pictures[:COMPARED], args.checkpoint)
    rows = {f"web_{name}": value for name, value in found.items()}
    for name, value in rows.items():
        print(f"{name:28} {value}")
    known = {name: value for name, value in json.loads(args.out.read_text()).items() if not name.startswith("web_")}
    write_atomically(args.out, (json.dumps(known | rows, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def measure(folder: Path, pictures: Sequence[Path]) -> dict[str, Any]:
    """Measure how long the page takes, and its memory over CAPTIONED pictures."""
    sizes = {path: path.stat().st_size / 1e6 for path in folder.rglob("*") if path.is_file()}
    result: dict[str, Any] = {
        "processor": environment()["processor"],
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "page_mb": round(sum(sizes.values()), 1),
        "model_mb": round(sum(size for path, size in sizes.items() if path.suffix == ".onnx"), 1),
    }
    first, again = list[float](), list[float]()
    with serve(folder) as address:
        for _ in range(TURNS):
            with open_chromium() as (page, _):
                for times in (first, again):
                    began = time.perf_counter()
                    page.goto(address)
                    result["device"] = wait_until_ready(page)
                    times.append(time.perf_counter() - began)
        with open_chromium() as (page, hosts):
            page.goto(address)
            wait_until_ready(page)
            large = {"name": "large.jpg", "mimeType": "image/jpeg", "buffer": photograph(pictures[0])}
            photographs = [seconds_for(page, large) for _ in range(TURNS)]
            page.click("#clear")
            each, memory = [], []
            for number in range(CAPTIONED):
                each.append(seconds_for(page, str(pictures[number % len(pictures)])))
                if (number + 1) % (CAPTIONED // 4) == 0:
                    memory.append(memory_of(page))
    return result | {
        "load_s": round(statistics.median(first), 1),
        "load_again_s": round(statistics.median(again), 1),
        "caption_s": round(statistics.median(each), 2),
        "caption_slowest_s": round(max(each), 2),
        "photograph_s": round(statistics.median(photographs), 2),
        "memory_mb": memory,
        "other_hosts": sorted(hosts - {"localhost"}),
    }


def photograph(picture: Path) -> bytes:
    """Return a picture as a JPEG of as many pixels as a phone makes, with a phone's grain."""
    with Image.open(picture) as opened:
        pixels = np.asarray(opened.convert("RGB").resize(PHOTOGRAPH)).astype(int)
    grain = np.random.default_rng(0).integers(-8, 9, pixels.shape)
    buffer = io.BytesIO()
    Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def seconds_for(page: "Page", file: Any) -> float:
    """Return how long a picture takes from being given to the page to its captions."""
    began = time.perf_counter()
    page.set_input_files("#choose", file)
    wait(page, "pictures[0]?.captions && !current")
    return time.perf_counter() - began


def memory_of(page: "Page") -> int:
    """Return the megabytes that the processes of Chromium which show pages have of their own."""
    browser = page.context.browser
    assert browser
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    kinds = [process["id"] for process in processes if process["type"] == "renderer"]
    states = [Path(f"/proc/{number}/status").read_text() for number in kinds]
    return round(sum(int(re.findall(r"RssAnon:\s+(\d+) kB", state)[0]) for state in states) / 1000)


def processor_time_of(page: "Page") -> float:
    """Return the seconds of processor time that the processes of Chromium which show pages have taken."""
    browser = page.context.browser
    assert browser
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return sum(process["cpuTime"] for process in processes if process["type"] == "renderer")


def compare(folder: Path, pictures: Sequence[Path], checkpoint: Path) -> dict[str, Any]:
    """Return how many pictures get the captions of PyTorch in fp32, and in the precision that it takes by itself."""
    captioner = Captioner.load(checkpoint)
    usual, model = captioner.caption(pictures), captioner.model
    precision = str(model.precision).removeprefix("torch.")
    train = model.config.train.model_copy(update={"precision": "fp32"})
    model.config = model.config.model_copy(update={"train": train})
    expected = Captioner(model).caption(pictures)
    with serve(folder) as address, open_chromium() as (page, _):
        page.goto(address)
        wait_until_ready(page)
        shown = [each["captions"][0]["text"] for each in caption(page, list(map(str, pictures)))]
    for path, own, theirs in zip(pictures, shown, expected, strict=True):
        if own != theirs:
            print(f"{path.name}: {own} (PyTorch: {theirs})")
    equal = sum(own == theirs for own, theirs in zip(shown, expected, strict=True))
    same = sum(own == theirs for own, theirs in zip(usual, expected, strict=True))
    return {"equal": equal, "compared": len(pictures), "equal_precisions": same, "precision": precision}


if __name__ == "__main__":
    raise SystemExit(run_script(main))
