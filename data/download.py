"""Fetch a dataset: python -m data.download flickr8k

A download that was cut off goes on where it stopped; what is complete is checked against its checksum before it is
unpacked. `--source` takes the files from a mirror, or from a folder, instead of the addresses below. Datasets that need
an account or a request are in docs/data.md.
"""

from cli import (
    Parser,
    UserError,
    run_script,
    say,
    shorten,
)  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import hashlib
import http.client
import queue
import re
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cli.files import open_file, read_file
from utils import DAMAGED

TIMEOUT = 60  # seconds without an answer, or without SLOWEST bytes in each
SLOWEST = 100
ATTEMPTS = 5
FINISHED = ".downloaded"  # lists the files that were unpacked, one a line


@dataclass(frozen=True)
class Source:
    """A file to fetch: `size` in bytes, roughly, for the disk; `checksum` as algorithm:digest, None where unknown."""

    url: str
    size: int
    checksum: str | None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def most(self) -> int:
        """Return how many bytes may come, of a size that is known roughly."""
        return 2 * self.size + (1 << 20)


FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
COCO = "http://images.cocodataset.org"
PICTURES = Source(f"{FLICKR8K}/Flickr8k_Dataset.zip", 1_115_419_746, "md5:f18a1e2920de5bd84dae7cf08ec78978")
TEXT = Source(f"{FLICKR8K}/Flickr8k_text.zip", 2_340_801, "md5:bf6c1abcb8e4a833b7f922104de18627")
CHINESE_TEXT = Source(
    "https://raw.githubusercontent.com/li-xirong/flickr8kcn/master/data/flickr8kzhc.caption.txt", 3_000_000, None
)
COCO2014 = [
    Source(f"{COCO}/zips/train2014.zip", 13_510_573_713, "md5:0da8c0bd3d6becc4dcb32757491aca88"),
    Source(f"{COCO}/zips/val2014.zip", 6_645_013_297, "md5:a3d79f5ed8d289b7a7554ce06a5782b3"),
    Source(f"{COCO}/annotations/annotations_trainval2014.zip", 252_872_794, "md5:0a379cfc70b0e71301e0f377548639bd"),
]
KARPATHY = Source(
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
    36_745_453,
    "sha256:4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
)
SOURCES = {  # name: where it goes by default, and what it is made of
    "flickr8k": ("archive", [PICTURES, TEXT]),
    "flickr8k_splits": ("archive", [TEXT]),
    "flickr8k_cn": ("archive", [CHINESE_TEXT]),
    "coco2014": ("coco", COCO2014),
    "karpathy": ("coco", [KARPATHY]),
}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", metavar="DATASET", choices=SOURCES, help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--to", metavar="FOLDER", type=Path, help="where to unpack (default: archive, or coco)")
    parser.add_argument("--source", metavar="URL", help="where the files lie instead: an address or a folder")
    args = parser.parse_options()
    if not args.dataset:
        parser.print_help()
        return
    folder, sources = SOURCES[args.dataset]
    fetch(sources, args.to or Path(folder), args.source)
    say(f"next: python -m data.annotations {args.to or folder}")


def fetch(sources: list[Source], folder: Path, mirror: str | None = None) -> None:
    """Download, check and unpack `sources` into `folder`, except those that are there already."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = folder / FINISHED
    finished = read_file(marks, 1 << 20).decode(errors="replace").splitlines() if marks.exists() else []
    places = {source: find_place(source, mirror) for source in sources if source.name not in finished}
    check_disk(list(places), folder)
    for source in sources:
        if source not in places:
            say(f"{source.name} is unpacked in {folder}/ already")
            continue
        part, place = folder / f"{source.name}.part", places[source]
        if part.is_symlink() or (part.exists() and not part.is_file()):
            raise UserError(f"{part} is no file; move it away, since the download goes there")
        if isinstance(place, Path):
            if place.stat().st_size > source.most:
                raise UserError(f"{place} has more than {source.most:,} bytes, so it is another file; check --source")
            with open_file(place) as original, open(part, "wb") as file:
                shutil.copyfileobj(original, file)
        else:
            download(place, source, part)
        if source.checksum:
            algorithm, _, expected = source.checksum.partition(":")
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, algorithm).hexdigest()
            if found != expected:
                part.unlink()
                raise UserError(
                    f"{source.name} came damaged ({algorithm} {found}, not {expected}), deleted; run this again"
                )
        if source.name.endswith(".zip"):
            unpack(part, source, folder)
            part.unlink()
        else:
            part.replace(folder / source.name)
        with open(marks, "a") as file:
            file.write(f"{source.name}\n")


def find_place(source: Source, mirror: str | None) -> str | Path:
    """Return the address of a file, or where it lies on this machine; raises UserError for a mirror that is neither."""
    if not mirror:
        return source.url
    if "://" not in mirror:
        place = Path(mirror, source.name)
        if not place.is_file():
            raise UserError(f"there is no file {place}; name the folder it lies in, or an address: --source https://…")
        return place
    try:
        address = urllib.parse.urlsplit(mirror)
        if address.scheme.lower() in ("http", "https") and address.hostname and address.port != 0:
            return f"{mirror.rstrip('/')}/{source.name}"
    except ValueError:  # as of http://[ and of ports that are no numbers
        pass
    raise UserError(f"--source {shorten(mirror)} is no address; write https://HOST/FOLDER, or the path of a folder")


def unpack(part: Path, source: Source, folder: Path) -> None:
    """Unpack a zip; raises UserError for one that is damaged, which is deleted, or too large."""
    try:
        with zipfile.ZipFile(part) as archive:
            members = [each for each in archive.infolist() if not each.filename.startswith("__MACOSX/")]
            needed = sum(member.file_size for member in members)
            if needed > shutil.disk_usage(folder).free:
                raise UserError(f"{source.name} unpacks to {needed / 1e9:.1f} GB; make room in {folder}, or use --to")
            for member in tqdm(members, desc=f"unpacking {source.name}", unit="file", disable=None):
                archive.extract(member, folder)
    except (*DAMAGED, zlib.error) as error:
        part.unlink()
        raise UserError(f"{source.name} came damaged ({shorten(str(error), 200)}), deleted; run this again") from None


def check_disk(sources: list[Source], folder: Path) -> None:
    """Raise UserError unless the disk can take all files, unpacked about as large, and the largest archive."""
    needed = sum(source.size for source in sources) + max((source.size for source in sources), default=0)
    needed -= sum(part.stat().st_size for part in folder.glob("*.part"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has room for {free / 1e9:.1f} GB, and {needed / 1e9:.1f} GB are needed; make room or use --to"
        )


def download(url: str, source: Source, part: Path) -> None:
    """Bring the file `part` to its end, from where it stops; raises UserError after several attempts."""
    for attempt in range(ATTEMPTS):
        try:
            receive(url, source, part)
            return
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:  # urllib's are OSErrors
            if attempt == ATTEMPTS - 1 or not isinstance(error, OSError | http.client.HTTPException):
                words = " ".join(str(error).split()).partition(". ")[0]
                reason = shorten(words or type(error).__name__, 200)
                raise UserError(
                    f"cannot download {url} ({reason}); the same command resumes, or name another place: --source"
                ) from None


def receive(url: str, source: Source, part: Path) -> None:
    """Append what the file at `url` has beyond `part`; raises OSError or HTTPException where it does not all arrive.

    Raises UserError where more comes than the file can have.
    """
    begun = part.stat().st_size if part.is_file() else 0
    if begun > source.most:
        begun = 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = in_time(partial(OPENER.open, request, timeout=TIMEOUT))
    except urllib.error.HTTPError as error:
        total = re.fullmatch(r"bytes \*/(\d{1,18})", error.headers.get("Content-Range", ""))
        if error.code == 416 and begun and (int(total[1]) == begun if total else source.checksum):
            return  # it has no more bytes than these
        if error.code == 416 and begun:
            part.unlink()  # and the next attempt starts over
        raise
    with answer, tqdm(total=source.size, desc=source.name, unit="B", unit_scale=True, disable=None) as bar:
        if answer.status == 206:
            sent = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", answer.headers.get("Content-Range", ""))
            if not sent or int(sent[1]) != begun or int(sent[2]) + 1 != int(sent[3]):
                part.unlink(missing_ok=True)
                raise ConnectionError("it sends another part of the file than was asked for")
        if answer.status not in (200, 206):
            raise ConnectionError(f"it answers {answer.status}")
        size = begun if answer.status == 206 else 0
        bar.update(size)
        with open(part, "ab" if size else "wb") as file:
            since, arrived = time.monotonic(), 0
            while piece := answer.read1(1 << 16):
                bar.update(file.write(piece))
                size, arrived = size + len(piece), arrived + len(piece)
                if size > source.most:
                    break
                if time.monotonic() - since > TIMEOUT:
                    if arrived < TIMEOUT * SLOWEST:
                        raise TimeoutError(f"it sends fewer than {SLOWEST:,} bytes a second")
                    since, arrived = time.monotonic(), 0
        if size > source.most:
            part.unlink()
            raise UserError(
                f"{url} sends more than {source.most:,} bytes, so it is not {source.name}, and was deleted; name "
                "another place: --source"
            )
        if answer.length:  # bytes that were announced and did not come
            raise ConnectionError("the connection was cut off")


def in_time(call: Callable[[], Any]) -> Any:
    """Return what a call returns; raises TimeoutError after TIMEOUT, also where a byte comes now and then."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def answer() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=answer, daemon=True).start()  # which does not keep the script from ending
    try:
        result, error = results.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError("it does not answer in time") from None
    if error:
        raise error
    return result


def make_opener() -> urllib.request.OpenerDirector:
    """Return what opens addresses of http and https alone; Python's own one follows a redirect to FTP, too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
        *(urllib.request.UnknownHandler, urllib.request.HTTPRedirectHandler),
        *(urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor),
    ):
        opener.add_handler(handler())
    return opener


OPENER = make_opener()


if __name__ == "__main__":
    raise SystemExit(run_script(main))
