"""docs/reliability.md, its table written from benchmarks/results/reliability.json."""

import json
import re
from pathlib import Path

from utils import write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "reliability.json"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
TABLE = re.compile("(?<=<!-- results -->\n).*?(?=<!-- /results -->)", re.DOTALL)


def write_page() -> None:
    write_atomically(PAGE, fill(PAGE.read_text(encoding="utf-8")).encode())


def fill(page: str) -> str:
    """Return the page with its table written anew."""
    lines = ["| check | tried | lost | figures | command |", "|---|---|---|---|---|"]
    for row in json.loads(RESULTS.read_text(encoding="utf-8")):
        cells = [row["check"], f"{row['tried']:,}", f"{row['lost']:,}", row["figures"], f"`{row['command']}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return TABLE.sub(lambda _: "\n".join(lines) + "\n", page)
