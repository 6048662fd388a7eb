"""Load the HTTP endpoint: many clients at once, against inference_visualize.py on the same pictures.

`python -m benchmarks.serve FOLDER` sends each picture of a folder once, by CLIENTS clients at the same time, captions
the folder with inference_visualize.py, in turns, and writes the medians to benchmarks/results/speed.json. Both take the
captioner in pretrained/, and both times are of the work alone: Python has been started, and the model loaded.
"""

from cli import UserError, run_script  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import inference_visualize
from benchmarks.recipes import environment
from benchmarks.speed import OUT, TURNS, seconds
from captioning import Captioner
from data.folders import pictures_at
from utils import PRETRAINED, write_atomically

CLIENTS = 200
ROOT = Path(__file__).parents[1]
CONTENT_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="with the pictures")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="default: results/speed.json")
    args = parser.parse_args()
    pictures, _ = pictures_at(args.folder)
    if not pictures:
        raise UserError(f"there are no pictures in {args.folder}; name another folder")
    figures = measure(pictures)
    for name, value in figures.items():
        print(f"{name:36} {value}")
    result = json.loads(args.out.read_text()) | figures if args.out.is_file() else figures
    write_atomically(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(f"wrote {args.out}")


def measure(pictures: Sequence[Path]) -> dict[str, Any]:
    """Return pictures a second of both, and what the endpoint's clients had to wait."""
    requests = [request_of(path) for path in pictures]
    loaded = mock.patch.object(Captioner, "load", return_value=Captioner.load(PRETRAINED))
    served, scripted, waits = [], [], []  # type: tuple[list[float], list[float], list[float]]
    with tempfile.TemporaryDirectory() as folder, server() as port, loaded:
        sys.argv = ["inference_visualize.py", *map(str, pictures), "--language", "en", "--out", folder]
        for turn in range(TURNS + 1):
            began = time.perf_counter()
            found = asyncio.run(ask_all(port, requests))
            took = time.perf_counter() - began
            if len(found) != len(requests):
                raise UserError(f"{len(requests) - len(found):,} of {len(requests):,} requests were lost; see above")
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
                alone = seconds(inference_visualize.main)
            print(f"turn {turn}: {took:.1f} s by the endpoint, {alone:.1f} s by inference_visualize.py", flush=True)
            if turn:  # the first one warms up
                served, scripted, waits = [*served, took], [*scripted, alone], [*waits, *found]
    rates = [len(pictures) / statistics.median(times) for times in (served, scripted)]
    return {
        "serve_environment": environment() | {"load": round(os.getloadavg()[0], 1)},
        "serve_clients": CLIENTS,
        "serve_pictures": len(pictures),
        "serve_images_per_second": round(rates[0], 1),
        "inference_visualize_images_per_second": round(rates[1], 1),
        "serve_over_inference_visualize": round(rates[0] / rates[1], 2),
        "serve_median_wait_s": round(statistics.median(waits), 2),
        "serve_longest_wait_s": round(max(waits), 2),
    }


@contextmanager
def server() -> Iterator[int]:
    """Run the endpoint as a process of its own; yields its port."""
    command = [sys.executable, "-m", "serve", "--language", "en", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        found = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
        assert found
        try:
            yield int(found[1])
        finally:
            process.terminate()


def request_of(path: Path) -> bytes:
    content = path.read_bytes()
    head = f"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}"
    return f"{head}\r\n\r\n".encode() + content


async def ask_all(port: int, requests: Sequence[bytes]) -> list[float]:
    """Send all requests, CLIENTS at a time, each client over a connection of its own; returns how long each took that
    was answered with a caption, in seconds.
    """
    left, waits = iter(requests), list[float]()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in left:  # which the clients share
            began = time.perf_counter()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = CONTENT_LENGTH.search(head)
            answer = await reader.readexactly(int(length[1]) if length else 0)
            if b" 200 " in head and "caption" in json.loads(answer)["pictures"][0]:
                waits.append(time.perf_counter() - began)
            else:
                print(head.partition(b"\r\n")[0].decode(), answer.decode()[:200])
        writer.close()

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return waits


if __name__ == "__main__":
    raise SystemExit(run_script(main))
