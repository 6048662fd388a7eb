"""The demo as its user has it: served as `streamlit run app.py` does, and opened in Chromium."""

from cli import UserError

import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from playwright.sync_api import Page

APP = Path(__file__).parents[2] / "app.py"
PATIENCE = 120  # seconds: a laden machine takes long to import PyTorch
HERE = {None, "", "localhost", "127.0.0.1", "::1", b"localhost"}  # None: addresses that hold their content
SERVER = f"""
import sys

def tell(event, words):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = words[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(words[1], tuple):
        host = words[1][0]
    else:
        return
    if host not in {HERE!r}:
        print("ASKED", host, file=sys.stderr, flush=True)

sys.addaudithook(tell)
from streamlit.web.cli import main
main()
"""


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def open_demo(folder: Path) -> Iterator[tuple["Page", Callable[[], set[str]]]]:
    """Serve the demo to the runs in `folder` and open it; yields the page and what tells whom anything was asked of.

    Raises UserError without Chromium or playwright.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("this needs playwright; install it: pip install -r requirements-dev.txt") from None
    program = find_chromium()
    if program is None:
        raise UserError("this needs Chromium; install it: apt install chromium")
    address, log = f"http://localhost:{free_port()}", folder / "server.log"
    words = ["run", str(APP), "--server.headless=true", f"--server.port={urlsplit(address).port}"]
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-c", SERVER, *words], cwd=folder, stdout=file, stderr=file)
    try:
        wait_for(f"{address}/_stcore/health", server, log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            hosts: list[str | None] = []
            page.context.on("request", lambda request: hosts.append(urlsplit(request.url).hostname))
            page.on("websocket", lambda opened: hosts.append(urlsplit(opened.url).hostname))
            page.goto(address)
            by_server = lambda: [line[6:] for line in log.read_text().splitlines() if line.startswith("ASKED ")]  # noqa: E731
            yield page, lambda: {str(host) for host in (*hosts, *by_server())}
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(PATIENCE * 10):
        try:
            urllib.request.urlopen(address, timeout=PATIENCE).close()
            return
        except OSError:
            if server.poll() is not None:
                raise UserError(f"the demo's server ended: {log.read_text()[-500:]!r}") from None
            time.sleep(0.1)
    raise UserError(f"the demo's server did not answer within {PATIENCE} s")
