"""What a power cut can leave of files, by the calls on them that strace has listed."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512  # bytes that a disk writes at once
KNOWN = "openat,write,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,mkdir,mkdirat"
OTHERS = "open,creat,pwrite64,writev,pwritev,ftruncate,truncate,fallocate,link,linkat,symlink,symlinkat,sendfile"
TRACE = f"trace={KNOWN},{OTHERS},copy_file_range"
STRACE = ["strace", "-ff", "-y", "-xx", "-s", "100000000", "--absolute-timestamps=format:unix,precision:ns"]
STRACE += ["--seccomp-bpf", "-e", TRACE]
CALL = re.compile(r"(\d+\.\d+) (\w+)\((.*)\) += (\d+)(.*)")  # one that succeeded
TEXT = re.compile(r'["<]((?:\\x[0-9a-f]{2})*)[">]')  # an argument, or the path of an open file or folder

State = dict[Path, bytes]  # the content of each file, by its path below the disk's root


@dataclass
class Call:
    """A call as strace writes it: its texts are paths and what is written, and `flags` the rest of the line."""

    name: str
    texts: list[bytes]
    flags: str


def read_calls(folder: Path) -> Iterator[Call]:
    """Yield the calls of all threads, which strace has written to files in this folder, as they followed each other."""
    found = [CALL.match(line) for path in folder.iterdir() for line in path.read_text().splitlines()]
    for call in sorted(filter(None, found), key=lambda call: float(call[1])):
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in TEXT.findall(call[3] + call[5])]
        yield Call(call[2], texts, TEXT.sub("", call[3]))


@dataclass(eq=False)
class File:
    content: bytes = b""
    flushed: bytes = b""  # what of it is surely on the disk


class Disk:
    """Files and folders below `root`, empty at first, as programs see them and as they are on the disk.

    A file's content is surely on the disk once the file was flushed (fsync). A name, of a file or of a new folder, is
    there or gone only once the folder that holds it was flushed, which is all that POSIX promises.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names: dict[Path, File | None] = {}  # None for a folder
        self.flushed_names: dict[Path, File | None] = {}

    def do(self, call: Call) -> bool:
        """Repeat a call; returns whether it did something here."""
        texts = [os.fsdecode(text) for text in call.texts]
        if call.name.endswith(("at", "at2")):  # a folder, and a path that begins there
            paths = [Path(folder, name) for folder, name in zip(texts[::2], texts[1::2], strict=False)]
        elif call.name in ("write", "fsync", "fdatasync"):
            paths = [Path(texts[0])]
        else:
            paths = [self.root / text for text in texts]
        if not paths[-1].is_relative_to(self.root) or "(deleted)" in call.flags:
            return False
        path = paths[-1].relative_to(self.root)
        file = self.names.get(path)
        match call.name:
            case "openat" if "O_CREAT" in call.flags or "O_TRUNC" in call.flags:
                file = self.names[path] = file or File()
                file.content = b"" if "O_TRUNC" in call.flags else file.content
            case "openat":
                return False
            case "write" if file:
                file.content += call.texts[1]
            case "fsync" | "fdatasync" if file:
                file.flushed = file.content
            case "fsync" | "fdatasync":
                here = {name: each for name, each in self.names.items() if name.parent == path}
                elsewhere = {name: each for name, each in self.flushed_names.items() if name.parent != path}
                self.flushed_names = elsewhere | here
            case "rename" | "renameat" | "renameat2" if old := self.names.pop(paths[0].relative_to(self.root)):
                self.names[path] = old
            case "unlink" | "unlinkat" | "rmdir":
                del self.names[path]
            case "mkdir" | "mkdirat":
                self.names[path] = None
            case other:
                raise NotImplementedError(f"what {other} does to {path}")
        return True

    def states(self) -> dict[str, State]:
        """Return what may be there after a power cut now; what it leaves of files that were not flushed is anything."""
        sure = {
            path: file.flushed
            for path, file in self.flushed_names.items()
            if file and all(folder in self.flushed_names for folder in path.parents[:-1])
        }
        files = {path: file for path, file in self.names.items() if file}
        kept: dict[str, Callable[[bytes], bytes]] = {
            "everything": lambda content: content,
            "all names, but nothing in what was not flushed": lambda content: b"",
            "all names, but zeros in what was not flushed": lambda content: bytes(len(content)),
            "all names, but one sector of what was not flushed": lambda content: (
                content[:SECTOR] + bytes(max(0, len(content) - SECTOR))
            ),
        }
        found = {"what was flushed": sure}
        for what, keep in kept.items():
            left = {path: keep(file.content) for path, file in files.items() if file.flushed != file.content}
            found[what] = {path: left.get(path, file.flushed) for path, file in files.items()}
        return found
