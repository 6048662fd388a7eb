"""The demo as its user has it: served as `streamlit run app.py` does, and opened in Chromium."""

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

from benchmarks.web import find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

APP = Path(__file__).parents[1] / "app.py"
PATIENCE = 120  # seconds: a busy machine takes long to import PyTorch
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


@contextmanager
def open_demo(folder: Path) -> Iterator[tuple["Page", Callable[[], set[str]]]]:
    """Serve the demo to the runs in `folder` and open it in Chromium, which has to be installed.

    Yields the page, and a function that returns the hosts that the page or its server have asked for anything.
    """
    from playwright.sync_api import sync_playwright

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address, log = f"http://localhost:{port}", folder / "server.log"
    words = ["run", str(APP), "--server.headless=true", f"--server.port={port}"]
    with open(log, "w") as file:
        server = subprocess.Popen([sys.executable, "-c", SERVER, *words], cwd=folder, stdout=file, stderr=file)
    try:
        wait_for(f"{address}/_stcore/health", server, log)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
            page = browser.new_page()
            page.set_default_timeout(PATIENCE * 1000)
            hosts: list[str | None] = []
            page.context.on("request", lambda request: hosts.append(urlsplit(request.url).hostname))
            page.on("websocket", lambda opened: hosts.append(urlsplit(opened.url).hostname))

            def asked() -> set[str]:
                by_server = [line[6:] for line in log.read_text().splitlines() if line.startswith("ASKED ")]
                return {str(host) for host in (*hosts, *by_server)}

            page.goto(address)
            yield page, asked
    finally:
        server.terminate()
        server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(PATIENCE * 10):
        try:
            urllib.request.urlopen(address, timeout=PATIENCE).close()
            return
        except OSError:
            if server.poll() is not None:
                raise RuntimeError(f"the demo's server ended: {log.read_text()[-500:]}") from None
            time.sleep(0.1)
    raise RuntimeError(f"the demo's server did not answer within {PATIENCE} s")
