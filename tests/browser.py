"""Gallery pages as they are written and as a headless Chromium shows them, and texts that try to act in a page."""

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from demo import find_chromium

CHROMIUM = find_chromium()
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

HOSTILE = [
    "</script><script>document.title = 'injected'</script>",
    "<img src=x onerror=\"document.title = 'injected'\">",
    "<!--<script>",
    "`${document.title = 'injected'}` \\\" \u2028 ' &lt;",
]


def read_rows(page: Path) -> list[dict[str, Any]]:
    """Return the rows that a gallery holds, one for each picture."""
    rows = page.read_text(encoding="utf-8").partition("const rows = [\n")[2].partition("];\nconst scores")[0]
    return json.loads(f"[{rows.rstrip().rstrip(',')}]")


def browse(page: Path, address: str = "", script: str = "") -> str:
    """Return the page's DOM after three seconds in Chromium; `script` runs at the page's end."""
    assert CHROMIUM
    scripted = page.with_name("scripted.html")
    scripted.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--virtual-time-budget=3000"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", scripted.as_uri() + address]
    return subprocess.run(command, capture_output=True, check=True, timeout=120, encoding="utf-8").stdout


def title(dom: str) -> str:
    return html.unescape(re.findall("<title>(.*?)</title>", dom)[0])


def captions(dom: str, kind: str = "caption") -> list[str]:
    """Return the best caption of each picture in a gallery, or with the kind `other` the others."""
    found = re.findall(rf'<p class="{kind}"[^>]*>(.*?)</p>', dom, re.S)
    return [html.unescape(re.sub("<[^>]*>", "", text)) for text in found]
