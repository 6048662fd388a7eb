"""Fetch a dataset: python -m data.download flickr8k

A download that was cut off goes on where it stopped; what is complete is checked against its checksum before it is
unpacked. `--source` takes the files from a mirror, or from a folder, instead of the addresses below. Datasets that need
an account or a request are in docs/data.md.
"""

from cli import Parser, UserError, run_script, say  # first, so that Ctrl-C is quiet while the others are imported

# isort: split
import argparse
import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

TIMEOUT = 60  # seconds without a byte
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
    finished = marks.read_text().splitlines() if marks.is_file() else []
    left = [source for source in sources if source.name not in finished]
    check_disk(left, folder)
    for source in sources:
        if source not in left:
            say(f"{source.name} is unpacked in {folder}/ already")
            continue
        part = folder / f"{source.name}.part"
        download(source, part, mirror)
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
            with zipfile.ZipFile(part) as archive:
                members = [name for name in archive.namelist() if not name.startswith("__MACOSX/")]
                for name in tqdm(members, desc=f"unpacking {source.name}", unit="file", disable=None):
                    archive.extract(name, folder)
            part.unlink()
        else:
            part.replace(folder / source.name)
        with open(marks, "a") as file:
            file.write(f"{source.name}\n")


def check_disk(sources: list[Source], folder: Path) -> None:
    """Raise UserError unless the disk can take all files, unpacked about as large, and the largest archive."""
    needed = sum(source.size for source in sources) + max((source.size for source in sources), default=0)
    needed -= sum(part.stat().st_size for part in folder.glob("*.part"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has room for {free / 1e9:.1f} GB, and {needed / 1e9:.1f} GB are needed; make room or use --to"
        )


def download(source: Source, part: Path, mirror: str | None) -> None:
    """Bring the file `part` to its end, from where it stops; raises UserError after several attempts."""
    url = source.url
    if mirror:
        url = f"{mirror.rstrip('/')}/{source.name}" if "://" in mirror else Path(mirror, source.name).resolve().as_uri()
    for attempt in range(ATTEMPTS):
        try:
            receive(url, source, part)
            return
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
            if attempt == ATTEMPTS - 1:
                raise UserError(
                    f"cannot download {url} ({error}); the same command resumes, or name another place: --source"
                ) from None


def receive(url: str, source: Source, part: Path) -> None:
    """Append what the file at `url` has beyond `part`; raises OSError or HTTPException where it does not all arrive."""
    begun = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={begun}-"} if begun else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and begun:  # it has no more bytes than these
            return
        raise
    with answer, tqdm(total=source.size, desc=source.name, unit="B", unit_scale=True, disable=None) as bar:
        resumed = answer.status == 206
        bar.update(begun if resumed else 0)
        with open(part, "ab" if resumed else "wb") as file:
            while piece := answer.read(1 << 20):
                bar.update(file.write(piece))
        if getattr(answer, "length", None):  # bytes that were announced and did not come
            raise ConnectionError("the connection was cut off")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
